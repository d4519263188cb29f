"""What is added to the output of a use along exactly the parameter's output axes is its bias.

Something else may be added before: the derivative of z + r by z is 1, so that a bias added to the sum is one of z. Of several
uses whose outputs are added (x W + h U + b) it belongs to the last one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kfe_optax._layers.kinds import Dense, Embedding, Norm
from kfe_optax._layers.views import View
from kfe_optax._tracing.findings import Trail, Use
from kfe_optax._tracing.rules.base import Output


def moved(output: Output, equation: Any) -> Output | None:
    """The output behind an equation that moves its entries; None where an axis of the kernel is no axis any more."""
    name = equation.primitive.name
    if name == "transpose":
        return output._replace(axes=tuple(output.axes[axis] for axis in equation.params["permutation"]))
    if name not in ("reshape", "squeeze"):
        return output
    after, order = equation.outvars[0].aval.shape, moved_first(equation)
    before = [equation.invars[0].aval.shape[axis] for axis in order]
    axes = [-1] * len(after)
    for axis, own in enumerate(output.axes[axis] for axis in order):
        if own >= 0:
            ahead = math.prod(before[:axis])
            same = [
                i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == ahead
            ]
            if len(same) != 1:
                return None
            axes[same[0]] = own
    return output._replace(axes=tuple(axes))


def summed(outputs: Sequence[Output]) -> Output | None:
    """The sum of these outputs and of what else is added to them, as the output of one use; None where a use is in it twice."""
    last = max(outputs, key=lambda output: output.use)
    return last if [output.use for output in outputs].count(last.use) == 1 else None


def moved_first(equation: Any) -> Sequence[int]:
    """The order in which a reshape reads the axes of its operand."""
    order = equation.params.get("dimensions") if equation.primitive.name == "reshape" else None
    return range(equation.invars[0].aval.ndim) if order is None else order


def without_axes(trail: Trail, shape: tuple[int, ...], gone: list[bool]) -> Trail:
    """The trail of a parameter, here of this shape, of which the axes marked in `gone`, all of size 1, are none any more."""
    own = sorted(
        (dim, size, is_gone) for dim, size, is_gone in zip(trail.dims, shape, gone, strict=True) if dim >= 0
    )
    if not any(is_gone for *_, is_gone in own):
        return trail
    before = tuple(size for _, size, _ in own)
    kept = [(dim, size) for dim, size, is_gone in own if not is_gone]
    view = View(tuple(range(len(before))), before, tuple(size for _, size in kept))
    new = {dim: i for i, (dim, _) in enumerate(kept)}
    dims = tuple(new.get(dim, -1) for dim in trail.dims)
    return dataclasses.replace(trail, dims=dims, views=(*trail.views, view))


def with_bias(use: Use, output: Output, bias: Trail, shape: tuple[int, ...]) -> Use | None:
    """The use with a bias that is added to its output; None where it is none of this layer.

    `shape` is that of the bias as it is added; axes of size 1 are none of its own.
    """
    kind, kernel = use.info["kind"], use.parameters[0]
    assert kernel is not None
    if (
        len(use.parameters) > 1
        or bias.stopped
        or bias.flipped
        or kernel.stopped
        or bias.path == kernel.path
        or bias.factor != 1
        or bias.kept is not None
        or bias.route != kernel.route
        or len(bias.dims) != len(output.axes)
    ):
        return None
    own = [axis for axis in output.axes if axis >= 0]
    wide = [
        dim >= 0 and (size > 1 or axis >= 0)
        for dim, size, axis in zip(bias.dims, shape, output.axes, strict=True)
    ]
    along = [axis for axis, is_wide in zip(output.axes, wide, strict=True) if is_wide]
    if sorted(own) != sorted(along) or isinstance(kind, Embedding):
        return None
    # The kernel's axes in the order of the bias's.
    placed = sorted(
        (dim, axis) for axis, dim, is_wide in zip(output.axes, bias.dims, wide, strict=True) if is_wide
    )
    if isinstance(kind, Dense):
        kind = dataclasses.replace(kind, bias="".join(kind.kernel[axis] for _, axis in placed))
    elif [axis for _, axis in placed] != sorted(own):
        return None
    elif isinstance(kind, Norm):
        kind = dataclasses.replace(kind, parameters=("scale", "bias"))
    bias = without_axes(bias, shape, [not is_wide for is_wide in wide])
    vmaps = tuple((size, (*mapped, True)) for size, mapped in use.info["vmaps"])
    info = use.info | {"kind": kind, "roles": (*use.info["roles"], "bias"), "vmaps": vmaps}
    return dataclasses.replace(use, info=info, parameters=(kernel, bias))
