"""Which equations of a traced loss use a parameter as a layer does, without a mark.

`dot_general` is a dense layer in any axes and orientation, whose batch axes are blocks; `conv_general_dilated` a convolution in
any layout; `gather` of whole vectors an embedding; a product with a parameter that is the same for all examples a scale. What is
added to the output of one of these along exactly the parameter's output axes is its bias.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax import dense_maps
from kfe_optax.batch_axes import Labels
from kfe_optax.kinds import Conv, Dense, Embedding, Kind, Norm
from kfe_optax.kinds.embedding import LOOKUP
from kfe_optax.kinds.patches import Geometry
from kfe_optax.layer import View
from kfe_optax.walks import Trail, Use

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Output(NamedTuple):
    """The output of a use, as it is or with its axes moved.

    Attributes:
      use: the number of the use.
      axes: for each axis, the kernel's own axis (as the layer uses it) that it is, −1 for the examples and positions.
    """

    use: int
    axes: tuple[int, ...]


class Found(NamedTuple):
    """A use by a rule.

    Attributes:
      kind: the kind of layer.
      trail: the kernel's.
      x: the operand that is the layer's input.
      shapes: (x's shape, y's, x's dtype, y's, label), in the order of axes that the kind has.
      axes: see `Output`.
      order: the axes of that operand in the order of the kind's input; −1 for one that the kind's input lacks.
      role: of the parameter.
    """

    kind: Kind
    trail: Trail
    x: int
    shapes: Any
    axes: tuple[int, ...]
    order: tuple[int, ...]
    role: str = "kernel"

    def output(self, use: int) -> Output:
        return Output(use, self.axes)

    def labels(self, labels: Labels) -> Labels:
        """Those of the operand, as those of the kind's input."""
        kept = [label for label in labels if label.axis in self.order]
        return frozenset(label._replace(axis=self.order.index(label.axis)) for label in kept)


def used(equation: Any, trails: list[Trail | None]) -> Found | None:
    """The use that an equation makes of a parameter among its operands; None where no rule knows it."""
    rule = _RULES.get(equation.primitive.name)
    whole = [i for i, trail in enumerate(trails) if trail is not None and not trail.lost]
    if rule is None or len(whole) != 1:
        return None
    (side,) = whole
    trail = trails[side]
    assert trail is not None
    return rule(equation, side, trail)


def _dense(equation: Any, side: int, trail: Trail) -> Found | None:
    operands = [v.aval for v in equation.invars]
    contracted, batch = equation.params["dimension_numbers"]
    if min(trail.dims) < 0 or not contracted[0]:
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
    x = operands[1 - side]
    axes = tuple(kernel.find(name) for name in outputs)
    return Found(kind, trail, 1 - side, _shapes(equation, x), axes, tuple(range(x.ndim)))


def _layout(spec: Any) -> tuple[int, ...]:
    """The axes of (batch, features, *spatial) in the order (batch, *spatial, features)."""
    return (spec[0], *spec[2:], spec[1])


def _conv(equation: Any, side: int, trail: Trail) -> Found | None:
    params = equation.params
    if side != 1 or min(trail.dims) < 0 or params["batch_group_count"] > 1:
        return None
    numbers = params["dimension_numbers"]
    out, into, *spatial = numbers.rhs_spec
    order = [trail.dims[axis] for axis in (*spatial, into, out)]
    own = sorted(trail.dims)
    shape = equation.invars[1].aval.shape
    before = tuple(shape[trail.dims.index(axis)] for axis in own)
    canonical = tuple(shape[axis] for axis in (*spatial, into, out))
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
    kind = Conv(geometry=geometry, feature_groups=params["feature_group_count"])
    x, y = equation.invars[0].aval, equation.outvars[0].aval
    inputs, outputs = _layout(numbers.lhs_spec), _layout(numbers.out_spec)
    moved = tuple(x.shape[axis] for axis in inputs), tuple(y.shape[axis] for axis in outputs)
    shapes = (*moved, np.dtype(x.dtype).name, np.dtype(y.dtype).name, "")
    features = len(canonical) - 1
    axes = tuple(features if axis == numbers.out_spec[1] else -1 for axis in range(y.ndim))
    return Found(kind, trail, 0, shapes, axes, inputs)


def _embedding(equation: Any, side: int, trail: Trail) -> Found | None:
    numbers, table = equation.params["dimension_numbers"], equation.invars[0].aval
    y = equation.outvars[0].aval
    # Whole vectors, in the output with an axis of size 1 in their front where the gather was a slice.
    collapsed, offsets = tuple(numbers.collapsed_slice_dims), tuple(numbers.offset_dims)
    rank = y.ndim - len(offsets)
    vectors = (
        side == 0
        and len(trail.dims) == 2
        and 0 <= trail.dims[0] < trail.dims[1]
        and table.shape[0] > 1
        and rank > 0
        and numbers.start_index_map[0] == 0
        and (collapsed, offsets) in (((0,), (rank,)), ((), (rank, rank + 1)))
        and tuple(equation.params["slice_sizes"]) == (1, table.shape[1])
        and not numbers.operand_batching_dims
    )
    if not vectors:
        return None
    shape = (*y.shape[:rank], y.shape[-1])
    shapes = (shape[:-1], shape, "float32", np.dtype(y.dtype).name, LOOKUP)
    return Found(Embedding(), trail, 1, shapes, (*(-1,) * (y.ndim - 1), 1), tuple(range(rank)))


def _scale(equation: Any, side: int, trail: Trail) -> Found | None:
    """γ∘x, γ broadcast over the examples at least."""
    y = equation.outvars[0].aval
    if len(trail.dims) != y.ndim or not y.ndim:
        return None
    shape = equation.invars[side].aval.shape
    # Axes of size 1 that are broadcast are none of its own, as in (features, 1, 1).
    gone = [dim >= 0 and own == 1 != all_ for dim, own, all_ in zip(trail.dims, shape, y.shape, strict=True)]
    trail = without_axes(trail, shape, gone)
    if trail.dims[0] >= 0 or max(trail.dims) < 0:
        return None
    features = [(dim, axis) for axis, dim in enumerate(trail.dims) if dim >= 0]
    if any(shape[axis] != y.shape[axis] for _, axis in features):
        return None
    kind = Norm(parameters=("scale",), axes=tuple(axis - y.ndim for _, axis in sorted(features)))
    shapes = (
        y.shape,
        y.shape,
        *(np.dtype(v.aval.dtype).name for v in (equation.invars[1 - side], equation.outvars[0])),
        "",
    )
    own = sorted(dim for dim, _ in features)
    axes = tuple(own.index(dim) if dim >= 0 else -1 for dim in trail.dims)
    return Found(kind, trail, 1 - side, shapes, axes, tuple(range(y.ndim)), "scale")


_RULES = {"dot_general": _dense, "conv_general_dilated": _conv, "gather": _embedding, "mul": _scale}


def _shapes(equation: Any, x: Any) -> Any:
    y = equation.outvars[0].aval
    return (x.shape, y.shape, np.dtype(x.dtype).name, np.dtype(y.dtype).name, "")


def as_layer(
    equation: Any, x: int, operands: list[Any]
) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """(the kind's input, y to the kind's output, and back) of an equation that is a use with this operand as its input."""
    name, given = equation.primitive.name, operands[x]
    if name == "gather":
        tokens, shape = given[..., 0], equation.outvars[0].aval.shape
        last = equation.invars[0].aval.shape[0] - 1
        if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            tokens = jnp.clip(tokens, 0, last)
        elif jnp.issubdtype(tokens.dtype, jnp.signedinteger):
            # An index that is out of bounds reads no row; a negative one would count from the end.
            tokens = jnp.where(tokens < 0, last + 1, tokens)
        tokens = tokens.astype(jnp.float32)
        return tokens, lambda y: y.reshape(*tokens.shape, shape[-1]), lambda y: y.reshape(shape)
    if name == "mul":
        return jnp.broadcast_to(given, equation.outvars[0].aval.shape), _same, _same
    if name == "dot_general":
        return given, _same, _same
    numbers = equation.params["dimension_numbers"]
    outputs = _layout(numbers.out_spec)
    inverse = sorted(range(len(outputs)), key=lambda axis: outputs[axis])
    return (
        jnp.transpose(given, _layout(numbers.lhs_spec)),
        lambda y: jnp.transpose(y, outputs),
        lambda y: jnp.transpose(y, inverse),
    )


def _same(y: jax.Array) -> jax.Array:
    return y


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
        or kernel.stopped
        or bias.path == kernel.path
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
    info = use.info | {"kind": kind, "roles": (*use.info["roles"], "bias")}
    return dataclasses.replace(use, info=info, parameters=(kernel, bias))
