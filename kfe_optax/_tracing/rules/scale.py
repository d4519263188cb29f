"""`mul` with a parameter that is the same for all examples is the scale of a normalization."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.kinds import Norm
from kfe_optax._tracing.findings import Trail
from kfe_optax._tracing.rules.base import Found, Rule, shapes
from kfe_optax._tracing.rules.bias import without_axes


class Mul(Rule):
    """γ∘x, γ broadcast over the examples at least."""

    primitive = "mul"

    def use(self, equation, side, trail):
        return features_of(equation, side, trail, "scale")

    def layout(self, equation, x, operands):
        given = jnp.broadcast_to(operands[x], equation.outvars[0].aval.shape)
        return super().layout(equation, 0, [given])


def features_of(equation: Any, side: int, trail: Trail, role: str) -> Found | None:
    """The use of a parameter in this role, that is broadcast over the examples at least; None where it is not.

    Its first axes may be members of a stack, as under a vmap over parameters and data.
    """
    y = equation.outvars[0].aval
    if len(trail.dims) != y.ndim or not y.ndim:
        return None
    shape = equation.invars[side].aval.shape
    # Axes of size 1 that are broadcast are none of its own, as in (features, 1, 1).
    sizes = zip(trail.dims, shape, y.shape, strict=True)
    trail = without_axes(trail, shape, [dim >= 0 and own == 1 != wide for dim, own, wide in sizes])
    own = sorted(dim for dim in trail.dims if dim >= 0)
    members = next(i for i, dim in enumerate((*trail.dims, -1)) if dim not in own[i : i + 1])
    features = [(dim, axis) for axis, dim in enumerate(trail.dims) if dim >= 0 and axis >= members]
    if not features or trail.dims[members] >= 0:
        return None
    if any(size != wide for size, wide, dim in zip(shape, y.shape, trail.dims, strict=True) if dim >= 0):
        return None
    kind = Norm(parameters=(role,), axes=tuple(axis - y.ndim for _, axis in sorted(features)))
    axes = tuple(own.index(dim) if dim >= 0 else -1 for dim in trail.dims)
    x = jax.ShapeDtypeStruct(y.shape[members:], equation.invars[1 - side].aval.dtype)
    vmaps = tuple((size, (True, True, True)) for size in reversed(y.shape[:members]))
    sides = shapes(x, jax.ShapeDtypeStruct(x.shape, y.dtype))
    return Found(kind, trail, 1 - side, sides, axes, tuple(range(y.ndim)), role, vmaps)
