"""Registered outputs: the tag at the loss, whose backward rule can answer with the model's own targets.

A registered loss has a *mode* and a *seed* among its residuals. As differentiated, the mode is GRADIENT and the backward rule
is the loss's own. The Fisher pull is the same pull with these leaves swapped: the rule then returns √c ∂(−log p(ỹ|z))/∂z, ỹ
drawn from the model (SAMPLED), √c times a column of a square root of the Fisher at the outputs (EXACT), or √c Bᵀu with
BᵀB the Fisher at the outputs and u a residual too (TANGENT): linear in u, so that its transpose is √c B J v. c is the cotangent
that arrives at that element of the loss: its weight in the scalar loss, whatever reduction, mask or factor the user wrote.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import explicit_axes, varying_axes
from kfe_optax._marks.registrations import Output

GRADIENT, SAMPLED, EXACT, SILENT, TANGENT = range(5)

FAINT = 2.0**-64
"""The cotangent of the loss with which the Fisher's pull starts where a term of the loss is not registered.

What is not known is no curvature, and the pull is linear in the loss's cotangent, but for the registered losses: they divide
what arrives by it, which a power of two does exactly, and answer with √c as ever. All other terms come to nothing, also inside
loops and vmaps, where a pull that starts at the registered losses would have to keep a weight for each iteration.
"""


class Control(NamedTuple):
    """The residuals that are swapped, and the rider that reads the loss's weights."""

    mode: (
        jax.Array | None
    )  # int32 (2,): the mode, and the column (EXACT) or the microbatch (SAMPLED); None in a cotangent
    seed: jax.Array | None  # uint32 (2,)
    rider: jax.Array | None  # (3,), see `_weights`
    cotangent: jax.Array | None  # u, of the shape of z, where the quadratic model is asked for
    scale: (
        jax.Array | None
    )  # S of a loss that is S times the one that counts; c and the weights of its elements are, too
    share: jax.Array | None = None  # where a part of the batch stands for all of it: Σc there by Σc over all


class Place(NamedTuple):
    """Where in the global batch a pass stands, and how its arrays are typed.

    Attributes:
      axis_name: the axis along which the batch is divided over devices.
      microbatches: k; the pass sees every k-th example.
      alone: whether no other pass sees the others, so that what it sees stands for all.
      examples: how many it sees, where k > 1.
      axes: the axes over which riders vary by their type.
      start: the cotangent of the loss with which the Fisher's pull starts, 1 or `FAINT`.
    """

    axis_name: Any
    microbatches: int
    alone: bool = False
    examples: int = 0
    axes: varying_axes.Axes = frozenset()
    start: float = 1.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tagged_loss(output: Output, place: Place, z: jax.Array, args: Any, control: Control) -> jax.Array:
    """`output.spec.loss(z, *args)`, with the backward rule of this module's docstring."""
    del place, control
    return output.spec.loss(z, *args)  # ty: ignore


def _loss_forward(output, place, z, args, control):
    del place
    return output.spec.loss(z, *args), (z, args, control._replace(rider=None))


def _loss_backward(output, place, residuals, c):
    _, args, control = residuals
    floats, rebuild = _float_args(args)
    backward = functools.partial(_loss_cotangents, output, place)
    dz, dfloats, weights = explicit_axes.automatic(
        backward, (residuals[0], floats, explicit_axes.WHOLE), *residuals, c
    )
    arguments = jax.tree.map(lambda a: None, args) if not floats else rebuild(dfloats, missing=None)
    return dz, arguments, _cotangents(control, varying_axes.over(place.axes, weights))


def _loss_cotangents(output, place, z, args, control, c):
    """The cotangents of z and of the arguments that are numbers, and the weights."""
    floats, rebuild = _float_args(args)

    def gradient():
        _, pull = jax.vjp(lambda z, floats: output.spec.loss(z, *rebuild(floats)), z, floats)
        return pull(c if control.share is None else c / control.share)

    weights = c if output.spec.mass is None else c * output.spec.mass(z, *args)

    def fisher(root):
        dz = root(jnp.sqrt(jnp.maximum(weights / place.start, 0) * _inverse(control.share)))
        return dz.astype(z.dtype), jax.tree.map(jnp.zeros_like, floats)

    outputs = z if output.spec.outputs is None else output.spec.outputs(z, *args)
    dz, dfloats = _by_mode(output, place, outputs, control, gradient, fisher)
    return dz, dfloats, _weights(c, weights, control.scale)


tagged_loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tagged_output(output: Output, place: Place, z: jax.Array, weights: Any, control: Control) -> jax.Array:
    """The identity on z for `register_output`: c is `weights`, not the cotangent that arrives."""
    del output, place, weights, control
    return z


def _output_forward(output, place, z, weights, control):
    del output, place
    return z, (z, weights, control._replace(rider=None))


def _output_backward(output, place, residuals, g):
    z, weights, control = residuals
    backward = functools.partial(_output_cotangents, output, place)
    dz, sums = explicit_axes.automatic(backward, (z, explicit_axes.WHOLE), *residuals, g)
    no_weights = None if weights is None else jnp.zeros_like(weights)
    return dz, no_weights, _cotangents(control, varying_axes.over(place.axes, sums))


def _output_cotangents(output, place, z, weights, control, g):
    """The cotangent of z, and the weights."""
    free = z.shape[: z.ndim - output.spec.distribution.event_ndim]
    if weights is None:
        c = jnp.full(free, 1 / output.examples, jnp.promote_types(z.dtype, jnp.float32))
    else:
        c = jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(free) - weights.ndim)), free)
    if control.scale is not None:
        c = c * control.scale

    def fisher(root):
        return root(jnp.sqrt(jnp.maximum(c, 0) * _inverse(control.share))).astype(z.dtype)

    def gradient():
        return g if control.share is None else g / control.share

    return _by_mode(output, place, z, control, gradient, fisher), _weights(c, c, control.scale)


tagged_output.defvjp(_output_forward, _output_backward)


def _inverse(share: jax.Array | None) -> Any:
    return 1 if share is None else 1 / share


def _weights(c: jax.Array, fisher: jax.Array, scale: jax.Array | None) -> jax.Array:
    """(Σc, Σc²), without the loss's scale, and how many weights in the Fisher are negative, in the rider's dtype.

    A negative weight counts as zero in the Fisher, and so in Σc.
    """
    wide = c.astype(jnp.result_type(float))
    wide = wide if scale is None else wide / scale
    return jnp.stack(
        [jnp.maximum(wide, 0).sum(), jnp.square(wide).sum(), jnp.sum(fisher < 0, dtype=wide.dtype)]
    )


def _cotangents(control: Control, weights: jax.Array) -> Control:
    nothing = None if control.cotangent is None else jnp.zeros_like(control.cotangent)
    return Control(None, None, weights, nothing, None)


def _by_mode(output, place, z, control, gradient, fisher):
    # The distribution's arithmetic is done in float32 at least: a softmax in bfloat16 loses its small probabilities.
    distribution = output.spec.distribution
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    expand = (..., *(None,) * distribution.event_ndim)

    def sampled():
        return fisher(lambda root: root[expand] * _sample(output, place, wide, control))

    def exact():
        return fisher(lambda root: root[expand] * _column(output, wide, control.mode[1]))

    def silent():
        return jax.tree.map(varying_axes.zeros, jax.eval_shape(sampled))

    def tangent():
        return fisher(lambda root: root[expand] * distribution.root_transpose(wide, control.cotangent))

    branches = [gradient, sampled, exact, silent]
    if control.cotangent is not None:
        branches.append(tangent)
    return jax.lax.switch(control.mode[0], branches)


def _sample(output: Output, place: Place, z: jax.Array, control: Control) -> jax.Array:
    assert control.seed is not None
    assert control.mode is not None
    key = jax.random.wrap_key_data(control.seed, impl="threefry2x32")
    distribution = output.spec.distribution
    if output.nested:
        # Inside vmap and scan one seed serves every iteration: independent draws need something that tells them apart.
        bits = jax.lax.bitcast_convert_type(z.astype(jnp.float32), jnp.uint32).ravel()
        mixed = (bits ^ (bits >> 15)) * jnp.arange(1, 2 * bits.size, 2, dtype=jnp.uint32)
        return distribution.sample(jax.random.fold_in(key, mixed.sum(dtype=jnp.uint32)), z)
    if not output.batched:
        return distribution.sample(jax.random.fold_in(key, control.mode[1]), z)
    # The global example, so that the draws depend neither on the number of devices nor on that of microbatches.
    index = jnp.arange(z.shape[0])
    if place.axis_name is not None:
        index = index + jax.lax.axis_index(place.axis_name) * z.shape[0]
    if place.microbatches > 1:
        # An example is several events where they are flattened, (n t, d).
        events = max(z.shape[0] // place.examples, 1)
        example, event = jnp.divmod(index, events)
        index = (example * place.microbatches + control.mode[1]) * events + event
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
    return jax.vmap(distribution.sample)(keys, z)


def _column(output: Output, z: jax.Array, column: jax.Array) -> jax.Array:
    """Column `column` of all examples at once: Bᵀ of one element's unit vector, zero at the other positions."""
    shape = output.shape[1:] if output.batched else output.shape
    unit = (jnp.arange(math.prod(shape)) == column).reshape(shape).astype(z.dtype)
    return output.spec.distribution.root_transpose(z, jnp.broadcast_to(unit, z.shape))


def _float_args(args: Any) -> tuple[list[jax.Array], Callable[..., Any]]:
    """The differentiable leaves of a loss's further arguments, and how to put them back."""
    leaves, structure = jax.tree.flatten(args)
    differentiable = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def rebuild(floats, **missing):
        source = iter(floats)
        filled = [
            next(source) if is_float else missing.get("missing", leaf)
            for leaf, is_float in zip(leaves, differentiable, strict=True)
        ]
        return jax.tree.unflatten(structure, filled)

    return [leaf for leaf, is_float in zip(leaves, differentiable, strict=True) if is_float], rebuild


def control_zeros(
    registered: Iterable[Output], tangents: bool, scale: jax.Array | None, alone: bool
) -> list[Control]:
    """One fresh control per registration, each an array of its own: the pull's leaves are found by identity."""
    return [
        Control(
            jnp.zeros(2, jnp.int32),
            jnp.zeros(2, jnp.uint32),
            jnp.zeros(3),
            jnp.zeros(output.shape) if tangents else None,
            scale,
            jnp.ones(()) if alone else None,
        )
        for output in registered
    ]
