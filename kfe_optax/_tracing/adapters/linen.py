"""Flax Linen: a method interceptor that marks calls of supported modules, and a TrainState that passes taps on."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from flax.core import meta
from flax.training import train_state

from kfe_optax._layers.kinds import Kind
from kfe_optax._layers.kinds.base import TRANSPOSED
from kfe_optax._layers.kinds.embedding import LOOKUP
from kfe_optax._statistics import tags
from kfe_optax._tracing.adapters import modules

SUPPORTED: dict[type[nn.Module], modules.Maker] = {
    nn.Dense: modules.dense,
    nn.DenseGeneral: modules.dense_general,
    nn.Conv: modules.conv,
    nn.ConvLocal: modules.conv_local,
    nn.ConvTranspose: modules.conv_transpose,
}
"""Linen modules of one kernel → kind. A subclass that overrides `__call__` is not mistaken for its base."""

NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm, nn.RMSNorm)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's first argument, which may be named."""
    return args[0] if args else next(kwargs[name] for name in ("inputs", "x", "query") if name in kwargs)


def _calls(module: nn.Module, base: type[nn.Module], method: str = "__call__") -> bool:
    """Whether a module's method is that of `base`."""
    return isinstance(module, base) and getattr(type(module), method) is getattr(base, method)


def _own(module: nn.Module) -> dict[str, Any]:
    """The parameters of the module itself, as it is given them."""
    if module.scope is None:
        return {}
    own = module.variables.get("params", {})
    arrays = {name: meta.unbox(value) for name, value in own.items()}
    return {name: v for name, v in arrays.items() if hasattr(v, "shape") and hasattr(v, "dtype")}


def _interceptor(next_function, args, kwargs, context):
    module, method = context.module, context.method_name
    if tags.listener() is None or method not in ("__call__", "attend"):
        return next_function(*args, **kwargs)
    if method == "__call__" and _calls(module, nn.OptimizedLSTMCell):
        return _gates(module, next_function, args, kwargs)
    y = next_function(*args, **kwargs)
    own = _own(module)
    if not own:
        return y
    x = _input(args, kwargs)
    if method == "attend":
        return _embedding(module, x, y, own, TRANSPOSED) if _calls(module, nn.Embed, "attend") else y
    if _calls(module, nn.Embed):
        return _embedding(module, x, y, own, LOOKUP)
    if any(_calls(module, base) for base in NORMS):
        return _norm(module, args, kwargs, y, own)
    if _calls(module, nn.Einsum):
        formula = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        return _marked(
            modules.einsum(module, x, own["kernel"].shape, formula or module.einsum_str), x, y, own
        )
    for base, make in SUPPORTED.items():
        if _calls(module, base):
            return _marked(make(module, x, own["kernel"].shape), x, y, own)
    tags.mark_unsupported(f"{type(module).__name__} has no curvature block", own.values())
    return y


def _marked(kind: Kind | str, x: Any, y: Any, own: dict[str, Any]) -> Any:
    if isinstance(kind, str):
        tags.mark_unsupported(kind, own.values())
        return y
    roles = tuple(name for name in ("kernel", "bias") if name in own)
    return tags.mark_layer(kind, roles, x, y, tuple(own[name] for name in roles))


def _embedding(module: nn.Module, x: Any, y: Any, own: dict[str, Any], use: str) -> Any:
    table = own["embedding"]
    kind = modules.embedding(module, x, table.shape)
    if isinstance(kind, str):
        tags.mark_unsupported(kind, own.values())
        return y
    # Tokens as numbers that float32 holds exactly, whatever the layer computes in.
    return tags.mark_layer(kind, ("kernel",), x, y, (table,), use, jnp.float32)


def _gates(module: nn.Module, next_function: Any, args: Any, kwargs: Any) -> Any:
    """The cell that it optimizes, which has the same parameters and a dense layer a gate instead of one product for all."""
    if module.is_initializing():
        return next_function(*args, **kwargs)
    plain: Any = nn.LSTMCell
    fields = {field.name for field in dataclasses.fields(plain)} - {"parent", "name"}
    cell = plain(**{name: getattr(module, name) for name in fields}, parent=None)
    return cell.apply({"params": module.variables["params"]}, *args, **kwargs)


def _norm(module: nn.Module, args: Any, kwargs: Any, y: Any, own: dict[str, Any]) -> Any:
    present = tuple(name for name in ("scale", "bias") if name in own)
    # The normalized input: the same module without scale and shift. Its batch statistics are not kept.
    plain = {name: False for name in ("use_scale", "use_bias") if hasattr(module, name)}
    bare = module.clone(parent=None, name=None, **plain)
    state = {name: dict(values) for name, values in module.variables.items() if name != "params"}
    normalized, _ = bare.apply(state, *args, mutable=list(state), **kwargs)
    kind = modules.norm(module, _input(args, kwargs), present)
    return tags.mark_layer(kind, present, normalized, y, tuple(own[name] for name in present))


def intercepting() -> contextlib.AbstractContextManager[Any]:
    """A context in which supported Linen modules mark themselves."""
    return nn.intercept_methods(_interceptor)


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes `taps` and passes them to the optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
      >>> model = nn.Dense(3)
      >>> x, labels = jnp.ones((4, 2)), jnp.arange(4) % 3
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x, labels):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, {"dense": params}["dense"], x, labels)
      >>> state = kfe.TrainState.create(apply_fn=model.apply, params=params, tx=kfe.kfac(1e-2, layers))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(1))
      >>> int(state.apply_gradients(grads=grads, taps=taps).step)
      1
    """

    def apply_gradients(self, *, grads: Any, taps: Any = None, **changes: Any) -> TrainState:
        """One step: `tx.update(grads, opt_state, params, taps=taps)`, then the new parameters, state and count."""
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, taps=taps)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)
