"""Tags: custom_vjp identities whose riders' cotangents are a layer's statistics, and what marks a layer in a loss.

A *tag* returns a layer's output y unchanged. Its *rider* is a pytree of zeros that the forward pass never reads; the tag's
backward rule defines the rider's cotangent to be what curvature needs: the layer's input x and g = ∂L/∂y row by row (a *row
rider*), or sums over all uses of the layer (an *additive rider*: Σ x xᵀ, Σ g gᵀ, the number of rows, on request the
per-example gradients). While a loss is traced, `tag_dense` leaves marks (see `marks`); rules know the other uses (see
`_tracing.rules`). The tags are put on where the traced loss is rebuilt (see `rebuild`); nothing stands in the caller's tree.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import warnings
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax._jax import explicit_axes, retracing, varying_axes
from kfe_optax._layers.kinds import Dense, Kind
from kfe_optax._layers.layer import WITHOUT_BIAS
from kfe_optax._marks import marks
from kfe_optax._statistics import additive, riders

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Num

Roles = tuple[str, ...]


class Listener:
    """What listens while a loss is traced: it numbers the registered losses and the row masks.

    What is the same on all devices along `axes` (an average over them, say) is drawn from on each of them.
    """

    def __init__(self, axes: varying_axes.Axes = frozenset()):
        self.axes = axes
        self.registered: list[tuple[Any, tuple[int, ...], bool]] = []  # spec, the outputs' shape, unweighted
        self.masks = itertools.count()


_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("kfe_listener", default=None)
_row_mask: contextvars.ContextVar[Any] = contextvars.ContextVar("kfe_row_mask", default=None)


def listener() -> Listener | None:
    """The active listener, or None outside `find_layers` and `value_grad_and_taps`."""
    return _listener.get()


@contextlib.contextmanager
def listening(active: Listener) -> Generator[None]:
    """A context in which layers and losses leave marks; restored on every exit, private to the thread."""
    token = _listener.set(active)
    try:
        with retracing.fresh():
            yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def masked_rows(mask: Any) -> Generator[None]:
    """A context in which layers are marked with this row mask (see `masks`)."""
    token = _row_mask.set(mask)
    try:
        yield
    finally:
        _row_mask.reset(token)


def _mark_layer(kind: Kind, roles: Roles, x: Any, y: Any, parameters: Any) -> Any:
    """Marks `y`, the output of a layer of the given kind for the input `x`; the identity when nobody listens.

    `roles` names the roles of the parameters that the layer consists of; `parameters` are they as the layer used them.
    """
    if _listener.get() is None:
        return y
    # An integer input (one-hot rows) has no tangent; the layer computes with it in the output's dtype anyway.
    x = x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else jnp.asarray(x, jnp.result_type(y))
    mask = _row_mask.get()
    masks = () if mask is None else (mask,)
    return marks.layer_mark.bind(
        y,
        jax.lax.stop_gradient(x),
        *parameters,
        *masks,
        kind=kind,
        roles=roles,
        shapes=(x.shape, y.shape, np.dtype(x.dtype).name, np.dtype(y.dtype).name, ""),
        masked=mask is not None,
        vmaps=(),
    )


def mark_loss(spec: Any, z: Any, args: tuple[Any, ...]) -> Any:
    """A registered loss, marked; outside of `find_layers` and `value_grad_and_taps` this is not called."""
    active = _listener.get()
    assert active is not None
    serial = len(active.registered)
    # `register_output` has weights of its own, 1/n where it is given none.
    active.registered.append((spec, z.shape, spec.loss is None and args[0] is None))
    z, args = varying_axes.over(active.axes, (z, args))
    leaves, structure = jax.tree.flatten(args)

    def function(z, *leaves):
        return z if spec.loss is None else spec.loss(z, *jax.tree.unflatten(structure, leaves))

    elements = spec.loss is not None
    return marks.bind_loss(function, (), (z, *leaves), structure=structure, serial=serial, elements=elements)


def tag_dense(
    x: Num[Array, " n *positions d_in"],
    y: Float[Array, " n *positions d_out"],
    params: Mapping[str, Any],
    *,
    kernel: str = "kernel",
    bias: str | None = "bias",
) -> Float[Array, " n *positions d_out"]:
    """Marks y = x @ params[kernel] + params[bias] as a dense layer in a plain JAX function; returns y unchanged.

    Args:
      x: the layer's input, (n, ..., d_in); the first axis is the batch, further leading axes are shared positions.
      y: the layer's output, (n, ..., d_out).
      params: the mapping that holds the layer's parameters.
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
            f"tag_dense takes the mapping that holds the layer's parameters, not a {type(params).__name__}: pass "
            "{'kernel': kernel, 'bias': bias}."
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
    roles = {"kernel": params[kernel]}
    if bias is not None and bias in params:
        roles["bias"] = params[bias]
    return _mark_layer(Dense(), tuple(roles), x, y, tuple(roles.values()))


def plain(params: Any) -> Any:
    """The parameters as they are: deprecated, since nothing stands in the parameter tree any more."""
    warnings.warn(
        "kfe.plain is no longer needed: a loss is given its parameters as they are.",
        DeprecationWarning,
        stacklevel=2,
    )
    return params


class Use(NamedTuple):
    """What is static about one use of a layer: enough to form its statistics."""

    kind: Kind
    kernel: tuple[int, ...]
    bias: bool
    label: str
    factor: float
    examples: int
    row_bytes: int


def row_tag(use: Use, x: jax.Array, y: jax.Array, live: jax.Array | None, rider: riders.Rider) -> jax.Array:
    """The identity on y; the rider receives x and g = ∂L/∂y as they are (the kind's `row_values`), and which rows are live."""
    return _tag((_row_values, use, riders.spec(rider)), x, y, live, rider)


def additive_tag(
    use: Use, x: jax.Array, y: jax.Array, live: jax.Array | None, rider: riders.Rider
) -> jax.Array:
    """The identity on y; the rider receives sums (see `additive`), as JAX adds up the cotangents of a broadcast variable."""
    return _tag((additive.of_use, use, riders.spec(rider)), x, y, live, rider)


def _row_values(use, x, g, live, spec):
    del spec
    values = use.kind.row_values(x, g)
    if use.label == WITHOUT_BIAS:
        # Of the kinds whose uses share a row (see `Kind.per_example`): the bias stands last among a feature's parameters.
        parts = len(use.kind.parameters)
        values["output"] = values["output"].at[..., parts - 1 :: parts].set(0)
    return values if live is None else values | {"live": live}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tag(static: Any, x: jax.Array, y: jax.Array, live: jax.Array | None, rider: riders.Rider) -> jax.Array:
    del static, x, live, rider
    return y


def _forward(static, x, y, live, rider):
    del static, rider
    return y, (x, live)


def _backward(static, residuals, g):
    values, use, spec = static

    def fitted(x, live, g):
        # y = x (cW) is (cx) W.
        scaled = x if use.factor == 1 else x * jnp.asarray(use.factor, x.dtype)
        return riders.fit(values(use, scaled, g, live, spec), spec)

    kinds = dict(spec)
    found = explicit_axes.automatic(fitted, kinds, *residuals, g)
    return None, g, None, {name: varying_axes.like(value, kinds[name]) for name, value in found.items()}


_tag.defvjp(_forward, _backward)
