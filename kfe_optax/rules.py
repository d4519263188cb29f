"""Which equations of a traced loss use a parameter as a layer does, without a mark: products of a kernel with data.

`dot_general` is a dense layer in any axes and orientation, its batch axes are blocks. What is added to its output along exactly
the kernel's output axes is its bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from kfe_optax import dense_maps
from kfe_optax.kinds import Kind
from kfe_optax.walks import Trail, Use

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Output(NamedTuple):
    """The output of a use, as it is or with its axes moved.

    Attributes:
      use: the number of the use.
      axes: for each axis, the kernel's own axis (without stacked ones) that it is, −1 for the examples and positions.
    """

    use: int
    axes: tuple[int, ...]


class Found(NamedTuple):
    """A use by a rule.

    Attributes:
      kind: the kind of layer.
      trail: the kernel's.
      x: the operand that is the layer's input.
      shapes: (x's shape, y's, x's dtype, y's, label).
      axes: see `Output`.
    """

    kind: Kind
    trail: Trail
    x: int
    shapes: Any
    axes: tuple[int, ...]

    def output(self, use: int) -> Output:
        return Output(use, self.axes)


def used(equation: Any, trails: list[Trail | None]) -> Found | None:
    """The use that an equation makes of a parameter among its operands; None where no rule knows it."""
    if equation.primitive.name != "dot_general":
        return None
    whole = [i for i, trail in enumerate(trails) if trail is not None and not trail.lost]
    if len(whole) != 1 or min(trails[whole[0]].dims, default=-1) < 0:  # ty: ignore
        return None
    (side,) = whole
    trail = trails[side]
    assert trail is not None
    operands = [v.aval for v in equation.invars]
    contracted, batch = equation.params["dimension_numbers"]
    if not contracted[0] or len(trail.dims) > 8:
        return None
    letters = iter(_LETTERS)
    names: list[list[str]] = [[""] * operand.ndim for operand in operands]
    for pairs in (batch, contracted):
        for first, second in zip(*pairs, strict=True):
            names[0][first] = names[1][second] = next(letters)
    for own in names:
        own[:] = [name or next(letters) for name in own]
    outputs = [names[0][axis] for axis in batch[0]]
    for own, *taken in zip(names, contracted, batch, strict=True):
        outputs += [name for axis, name in enumerate(own) if not any(axis in axes for axes in taken)]
    # The kernel's letters in the order of the parameter's own axes, those of stacks left out.
    order = sorted(range(len(trail.dims)), key=lambda axis: trail.dims[axis])
    kernel = "".join(names[side][axis] for axis in order)
    kind = dense_maps.einsum("".join(names[1 - side]), kernel, "".join(outputs))
    if kind is None:
        return None
    x, y = operands[1 - side], equation.outvars[0].aval
    shapes = (x.shape, y.shape, np.dtype(x.dtype).name, np.dtype(y.dtype).name, "")
    return Found(kind, trail, 1 - side, shapes, tuple(kernel.find(name) for name in outputs))


def moved(output: Output, equation: Any, name: str) -> Output:
    """The output behind an equation that changes nothing but its type or the order of its axes."""
    if name != "transpose":
        return output
    return output._replace(axes=tuple(output.axes[axis] for axis in equation.params["permutation"]))


def with_bias(use: Use, output: Output, bias: Trail) -> Use | None:
    """The use with a bias that is added to its output; None where it is none of this layer."""
    kind = use.info["kind"]
    own = [axis for axis in output.axes if axis >= 0]
    along = [axis for axis, dim in zip(output.axes, bias.dims, strict=True) if dim >= 0]
    if len(use.parameters) > 1 or sorted(own) != sorted(along) or bias.stopped:
        return None
    if bias.route != use.parameters[0].route:  # ty: ignore
        return None
    # The kernel's axes in the order of the bias's.
    placed = [(dim, axis) for axis, dim in zip(output.axes, bias.dims, strict=True) if dim >= 0]
    letters = "".join(kind.kernel[axis] for _, axis in sorted(placed))
    info = use.info | {"kind": dataclasses.replace(kind, bias=letters), "roles": ("kernel", "bias")}
    return dataclasses.replace(use, info=info, parameters=(*use.parameters, bias))
