"""`conv_general_dilated` is a convolution, in any layout; also with the kernel flipped, as reverse mode makes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kfe_optax._layers.kinds import Conv
from kfe_optax._layers.kinds.patches import Geometry
from kfe_optax._layers.views import View
from kfe_optax._tracing.rules.base import Found, Rule, moved, shapes


class ConvGeneralDilated(Rule):
    """Strides, padding, dilations and feature groups as the equation has them."""

    primitive = "conv_general_dilated"
    flips = True

    def use(self, equation, side, trail):
        params = equation.params
        if side != 1 or min(trail.dims) < 0 or params["batch_group_count"] > 1:
            return None
        numbers = params["dimension_numbers"]
        out, into, *spatial = numbers.rhs_spec
        flipped = bool(trail.flipped)
        backwards = {*trail.flipped} == {trail.dims[axis] for axis in spatial}
        if flipped and (not backwards or params["feature_group_count"] > 1):
            return None
        # A kernel that is flipped has its input's features last.
        last = (out, into) if flipped else (into, out)
        order = [trail.dims[axis] for axis in (*spatial, *last)]
        own = sorted(trail.dims)
        shape = equation.invars[1].aval.shape
        before = tuple(shape[trail.dims.index(axis)] for axis in own)
        canonical = tuple(shape[axis] for axis in (*spatial, *last))
        if order != own:
            view = View(tuple(map(own.index, order)), before, canonical)
            trail = dataclasses.replace(trail, views=(*trail.views, view))
        geometry = Geometry(
            canonical[:-2],
            tuple(params["window_strides"]),
            tuple(tuple(pair) for pair in params["padding"]),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
        )
        kind = Conv(geometry=geometry, feature_groups=params["feature_group_count"], flipped=flipped)
        x, y = equation.invars[0].aval, equation.outvars[0].aval
        inputs, outputs = _layout(numbers.lhs_spec), _layout(numbers.out_spec)
        x, y = (
            jax.ShapeDtypeStruct(tuple(v.shape[axis] for axis in order), v.dtype)
            for v, order in ((x, inputs), (y, outputs))
        )
        features = len(canonical) - (2 if flipped else 1)
        axes = tuple(features if axis == numbers.out_spec[1] else -1 for axis in range(y.ndim))
        return Found(kind, trail, 0, shapes(x, y), axes, inputs)

    def layout(self, equation, x, operands):
        numbers = equation.params["dimension_numbers"]
        return moved(operands[x], _layout(numbers.lhs_spec), _layout(numbers.out_spec))


def _layout(spec: Any) -> tuple[int, ...]:
    """The axes of (batch, features, *spatial) in the order (batch, *spatial, features)."""
    return (spec[0], *spec[2:], spec[1])
