"""Flax Linen: a method interceptor that tags calls of supported modules, and a TrainState that passes taps on."""

from __future__ import annotations

import contextlib
from typing import Any

import flax.linen as nn
import optax
from flax.training import train_state

from kfe_optax import tags

SUPPORTED: dict[type[nn.Module], str] = {nn.Dense: "dense"}
"""Linen module → kind. A subclass that overrides `__call__` is not mistaken for its base."""


def _kind(module: nn.Module) -> str | None:
    for supported, kind in SUPPORTED.items():
        if isinstance(module, supported) and type(module).__call__ is supported.__call__:
            return kind
    return None


def _roles(module: nn.Module) -> tuple[tuple[str, str], ...]:
    bias = getattr(module, "use_bias", False)
    return (("kernel", "kernel"), ("bias", "bias")) if bias else (("kernel", "kernel"),)


def _interceptor(next_function, args, kwargs, context):
    y = next_function(*args, **kwargs)
    module = context.module
    if context.method_name != "__call__" or module.scope is None:
        return y
    if not module.has_variable("params", tags.SLOT):
        return y
    box = module.get_variable("params", tags.SLOT)
    kind = _kind(module)
    if kind is None:
        tags.unsupported(type(module).__name__, box)
        return y
    x = args[0] if args else next(iter(kwargs.values()))
    return tags.tag(kind, _roles(module), x, y, module.get_variable("params", "kernel"), box)


def intercepting() -> contextlib.AbstractContextManager[Any]:
    """A context in which supported Linen modules are tagged."""
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
