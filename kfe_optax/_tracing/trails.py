"""What each equation does to the trail of a parameter (see `findings.Trail`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from kfe_optax._layers.views import View
from kfe_optax._tracing.findings import Trail
from kfe_optax._tracing.rules import bias

CARRIED = frozenset(
    {"convert_element_type", "copy", "copy_p", "sharding_constraint", "pvary", "pcast", "reshard"}
)
"""Equations whose output is their operand, as far as layers are concerned."""


OWN_DERIVATIVE = "a function with a derivative of its own"


def step(equation: Any, inputs: Sequence[Trail | None]) -> Trail | None:
    """The trail behind an equation without a program inside."""
    name = equation.primitive.name
    present = [t for t in inputs if t is not None]
    if not present:
        return None
    trail = present[0]
    if name == "sub" and _from_itself(*inputs):
        return trail
    if len(present) > 1 or trail.lost:
        return dataclasses.replace(trail, lost=trail.lost or name)
    if trail.kept is not None and name not in CARRIED:
        return dataclasses.replace(trail, lost=name)
    if name == "stop_gradient":
        return dataclasses.replace(trail, stopped=True)
    if name in CARRIED and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
        return trail
    if name == "transpose":
        return dataclasses.replace(trail, dims=tuple(trail.dims[i] for i in equation.params["permutation"]))
    if name == "broadcast_in_dim":
        return _broadcasted(equation, trail)
    if name in ("reshape", "squeeze"):
        return _reshaped(equation, trail)
    if name == "rev" and not trail.views:
        axes = {trail.dims[axis] for axis in equation.params["dimensions"]}
        return dataclasses.replace(trail, flipped=tuple(sorted(axes ^ set(trail.flipped))))
    return dataclasses.replace(trail, lost=name)


def _from_itself(value: Trail | None, less: Trail | None) -> bool:
    """Whether a parameter that is stopped is taken from itself: w − w₀, a tangent at w₀ that has the derivative of w."""
    if value is None or less is None or value.stopped or not less.stopped:
        return False
    return not value.lost and dataclasses.replace(less, stopped=False) == value


def _broadcasted(equation: Any, trail: Trail) -> Trail:
    """The trail behind a broadcast, whose new axes are no parameter's."""
    axes, before = equation.params["broadcast_dimensions"], equation.invars[0].aval.shape
    after = equation.outvars[0].aval.shape
    grown = [after[axis] != size for axis, size in zip(axes, before, strict=True)]
    if any(is_grown and own >= 0 for is_grown, own in zip(grown, trail.dims, strict=True)):
        if trail.flipped:
            return dataclasses.replace(trail, lost="rev")
        trail = bias.without_axes(trail, before, grown)
    dims = [-1] * len(after)
    for axis, own in zip(axes, trail.dims, strict=True):
        dims[axis] = own
    return dataclasses.replace(trail, dims=tuple(dims))


def _reshaped(equation: Any, trail: Trail) -> Trail:
    """The trail behind a reshape: with axes of size 1 added, or through a view of the parameter."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    order = bias.moved_first(equation)
    before = tuple(before[axis] for axis in order)
    trail = dataclasses.replace(trail, dims=tuple(trail.dims[axis] for axis in order))
    if [size for size in after if size != 1] == list(before):
        rest = iter(trail.dims)
        return dataclasses.replace(trail, dims=tuple(-1 if size == 1 else next(rest) for size in after))
    if min(trail.dims, default=-1) < 0 or trail.flipped:
        return dataclasses.replace(trail, lost=equation.primitive.name)
    order = sorted(trail.dims)
    shape = [before[trail.dims.index(axis)] for axis in order]
    view = View(tuple(map(order.index, trail.dims)), tuple(shape), tuple(after))
    return dataclasses.replace(trail, dims=tuple(range(len(after))), views=(*trail.views, view))


def into_scan(trail: Trail | None, index: int, carried: tuple[int, int], length: int) -> Trail | None:
    """The trail inside a scan of what is its operand `index`, behind (constants, carries)."""
    if trail is None:
        return None
    if trail.kept is not None:
        return dataclasses.replace(trail, lost="mul")
    constants, carries = carried
    if index < constants:
        return dataclasses.replace(trail, broadcast=True, route=(*trail.route, False))
    if index < constants + carries:
        return dataclasses.replace(trail, lost="the carry of a scan")
    if trail.views or trail.flipped or min(trail.dims, default=-1) < 0:
        return dataclasses.replace(trail, lost="rev" if trail.flipped else "reshape")
    axis, route = trail.dims[0], (*trail.route, True)
    return dataclasses.replace(trail, dims=trail.dims[1:], stack=(*trail.stack, (axis, length)), route=route)


def left(trail: Trail | None, name: str) -> Trail | None:
    """The trail inside an equation of this name that stays as it is."""
    if trail is None:
        return None
    what = f"{OWN_DERIVATIVE} (jax.{name[:10]})" if name.startswith("custom_") else f"a {name}"
    return dataclasses.replace(trail, lost=trail.lost or f"inside {what}")
