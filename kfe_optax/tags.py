"""Tags: custom_vjp identities whose riders' cotangents are a layer's statistics.

A *tag* returns a layer's output y unchanged. Its *rider* is a pytree of zeros that the forward pass never reads; the tag's
backward rule defines the rider's cotangent to be what curvature needs: the layer's input x and g = ∂L/∂y row by row (a *row
rider*), or sums over all uses of the layer (an *additive rider*: Σ x xᵀ, Σ g gᵀ, the number of rows, on request the
per-example gradients). Riders sit beside the layer's parameters, so that whatever JAX or Flax does to parameters (jit, remat,
scan over layers, vmap) it does to the riders too.

This module knows no framework: an adapter (``kfe_optax.adapters``) or the user (``tag_dense``) calls `tag` with the *box*,
the content of the rider slot that it found beside the layer's parameters.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kfe_optax import explicit, sums, traces, varying
from kfe_optax.kinds import Dense, Kind

SLOT = "kfe_tag"
"""The name under which probes and riders stand beside a layer's parameters."""

Box = Mapping[str, Any]
Roles = tuple[tuple[str, str], ...]


class Listener(Protocol):
    """What listens to tags while a loss is traced: discovery, or the collection of taps."""

    def tag(self, kind: Kind, roles: Roles, x: Any, y: Any, parameters: Any, box: Box, label: str) -> Any:
        """Called for every tagged layer; returns y, tagged."""

    def unsupported(self, reason: str, box: Box) -> None:
        """Called for every module that owns parameters and has no kind, with the reason."""

    def output(self, spec: Any, z: Any, args: tuple[Any, ...]) -> Any:
        """Called for every registered loss; returns the loss, tagged (see `kfe_optax.losses`)."""


_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("kfe_listener", default=None)


def listener() -> Listener | None:
    """The active listener, or None outside `find_layers` and `value_grad_and_taps`."""
    return _listener.get()


@contextlib.contextmanager
def listening(active: Listener) -> Generator[None]:
    """Sends the tags met in this context to `active`; restored on every exit, private to the thread."""
    token = _listener.set(active)
    try:
        with traces.fresh():
            yield
    finally:
        _listener.reset(token)


def tag(
    kind: Kind, roles: Roles, x: Any, y: Any, parameters: Any, box: Box, label: str = "", dtype: Any = None
) -> Any:
    """Tags `y`, the output of a layer of the given kind for the input `x`; the identity when nobody listens.

    `roles` names the parameters that the layer consists of, as ((role, name beside the slot), ...); `parameters` are
    they as the layer used them. `label` tells different uses of one layer apart.
    """
    active = _listener.get()
    if active is None or not box:
        return y
    # An integer input (one-hot rows, tokens) has no tangent; the layer computes with it in the output's dtype anyway.
    wide = dtype or jnp.result_type(y)
    x = x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else jnp.asarray(x, wide)
    return active.tag(kind, roles, jax.lax.stop_gradient(x), y, parameters, box, label)


def unsupported(reason: str, box: Box) -> None:
    """Tells the listener why the parameters beside this slot belong to no layer."""
    active = _listener.get()
    if active is not None and box:
        active.unsupported(reason, box)


def tag_dense(
    x: jax.Array,
    y: jax.Array,
    params: Mapping[str, Any],
    *,
    kernel: str = "kernel",
    bias: str | None = "bias",
) -> jax.Array:
    """Marks y = x @ params[kernel] + params[bias] as a dense layer in a plain JAX function; returns y unchanged.

    Args:
      x: the layer's input, (n, ..., d_in); the first axis is the batch, further leading axes are shared positions.
      y: the layer's output, (n, ..., d_out).
      params: the mapping that holds the layer's parameters, as it came in with the loss's `params` (its rider travels
        in it, through scan and vmap as the kernel does).
      kernel: the name of the (d_in, d_out) kernel in `params`.
      bias: the name of the (d_out,) bias in `params`; ignored when `params` has none, None for no bias.

    Raises:
      TypeError: `params` is not a mapping.
      ValueError: `params` holds no such kernel, or the shapes of x, y and the kernel disagree.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, labels):
      ...     hidden = jnp.tanh(kfe.tag_dense(x, x @ params["in"]["kernel"], params["in"]))
      ...     logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
      ...     logits = kfe.tag_dense(hidden, logits, params["out"])
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> params = {"in": {"kernel": jnp.ones((5, 4))}, "out": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> list(kfe.find_layers(loss_fn, params, jnp.ones((8, 5)), jnp.zeros(8, int)))
      ['in', 'out']
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"tag_dense takes the mapping that holds the layer's parameters, not a {type(params).__name__}: keep each "
            "layer's kernel and bias in a dict of the parameter tree and pass that dict, so that the rider beside the "
            "kernel reaches the tag."
        )
    if kernel not in params:
        raise ValueError(
            f"tag_dense found no {kernel!r} among {sorted(params)}; name the kernel with kernel=..."
        )
    shape = jnp.shape(params[kernel])
    if len(shape) != 2 or jnp.shape(x)[-1:] != shape[:1] or jnp.shape(y)[-1:] != shape[1:]:
        raise ValueError(
            f"tag_dense expects y = x @ {kernel} + bias, but x has shape {jnp.shape(x)}, {kernel} {shape} and y "
            f"{jnp.shape(y)}; pass the layer's own input and output."
        )
    roles = [("kernel", kernel)]
    if bias is not None and bias in params:
        roles.append(("bias", bias))
    used = tuple(params[name] for _, name in roles)
    return tag(Dense(), tuple(roles), x, y, used, params.get(SLOT, {}))


def plain(params: Any) -> Any:
    """The parameters without the riders, for a loss that reads the parameters itself.

    Inside `find_layers` and `value_grad_and_taps` the parameter tree carries zero riders beside the layers' kernels. A
    sum of squares does not see them; a loss that counts leaves, compares structures or divides by a leaf's norm reads
    `kfe.plain(params)` instead. Outside it is the identity. Of an `nnx.Module` it returns the `nnx.State` of its
    parameters.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> kfe.plain({"dense": {"kernel": jnp.ones((2, 2)), "kfe_tag": {"input": jnp.zeros((4, 2))}}})["dense"].keys()
      dict_keys(['kernel'])
    """
    from kfe_optax import adapters  # adapters build on tags

    return adapters.strip(params)


Rider = dict[str, jax.Array]
_Spec = tuple[tuple[str, Any], ...]


class Use(NamedTuple):
    """What is static about one use of a layer: enough to form its statistics."""

    kind: Kind
    kernel: tuple[int, ...]
    bias: bool
    label: str
    examples: int
    row_bytes: int


def _spec(rider: Rider) -> _Spec:
    # Types are static: the zeros themselves need not wait among the residuals for the backward pass.
    return tuple((name, jax.typeof(zeros)) for name, zeros in sorted(rider.items()))


def _fit(values: dict[str, jax.Array], spec: _Spec) -> Rider:
    """The rider's cotangent: the values in the rider's shapes (see `Layer.rider_shapes`), zeros for what this use has not."""
    return {
        name: values[name].reshape(kind.shape).astype(kind.dtype)
        if name in values
        else jnp.zeros(kind.shape, kind.dtype)
        for name, kind in spec
    }


def row_tag(use: Use, x: jax.Array, y: jax.Array, live: jax.Array | None, rider: Rider) -> jax.Array:
    """The identity on y; the rider receives x and g = ∂L/∂y as they are (the kind's `row_values`), and which rows are live."""
    return _tag((_row_values, use, _spec(rider)), x, y, live, rider)


def additive_tag(use: Use, x: jax.Array, y: jax.Array, live: jax.Array | None, rider: Rider) -> jax.Array:
    """The identity on y; the rider receives sums (see `sums`), which is what JAX makes of cotangents of a broadcast variable."""
    return _tag((sums.of_use, use, _spec(rider)), x, y, live, rider)


def _row_values(use, x, g, live, spec):
    del spec
    values = use.kind.row_values(x, g)
    return values if live is None else values | {"live": live}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tag(static: Any, x: jax.Array, y: jax.Array, live: jax.Array | None, rider: Rider) -> jax.Array:
    del static, x, live, rider
    return y


def _forward(static, x, y, live, rider):
    del static, rider
    return y, (x, live)


def _backward(static, residuals, g):
    values, use, spec = static

    def fitted(x, live, g):
        return _fit(values(use, x, g, live, spec), spec)

    kinds = dict(spec)
    riders = explicit.automatic(fitted, kinds, *residuals, g)
    return None, g, None, {name: varying.like(rider, kinds[name]) for name, rider in riders.items()}


_tag.defvjp(_forward, _backward)
