"""Where a value's examples are: first axes, followed from equation to equation up to the registered losses.

A label says that an axis of a value runs over so many entries of the first axis of its source, one after the other, each with as
many entries as the axis is longer: (n, t, d) and, flattened, (n t, d), but not (t n, d). What an equation does with the axis that
is not said here ends the label, and its output is a source of its own: nodes that are gathered, tokens that are dispatched to
experts, sums over segments. The first axis of a registered loss's output is the batch, and with it all axes of the same source.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple


class Label(NamedTuple):
    """An axis of a value, the size of its source's first axis, and the source."""

    axis: int
    size: int
    source: Hashable


Labels = frozenset[Label]
UNKNOWN: Labels = frozenset()

# Entry by entry, or operand by operand.
_NAMES = """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp complex conj
    convert_element_type copy copy_p cos cosh cumlogsumexp cummax cummin cumprod cumsum digamma div eq erf erf_inv erfc
    exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max mesh_cast min mul name ne neg
    nextafter not optimization_barrier or pcast pmax pmin pow psum psum_invariant pvary real reduce_precision rem reshard round
    rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor"""
_SAME = frozenset(_NAMES.split())

# Of each matrix in the last two axes, one by one.
_MATRICES = frozenset(
    {"cholesky", "eigh", "geqrf", "householder_product", "lu", "qr", "svd", "triangular_solve"}
)


def named(labels: Labels, aval: Any, source: Hashable) -> Labels:
    """The labels of a value that depends on data: a source itself where nothing is known of its first axis."""
    return labels if any(label.axis == 0 for label in labels) else labels | at(0, aval, source)


def everywhere(aval: Any, source: Hashable) -> Labels:
    """The labels of an argument, whose examples may lie along any axis (members or time may come first): each is a source."""
    return frozenset(
        Label(axis, size, (source, axis)) for axis, size in enumerate(getattr(aval, "shape", ()))
    )


def at(axis: int, aval: Any, source: Hashable) -> Labels:
    """The label of a value that is a source along this axis."""
    shape = getattr(aval, "shape", ())
    return frozenset({Label(axis, shape[axis], source)}) if axis < len(shape) else UNKNOWN


def behind(equation: Any, given: Sequence[Labels]) -> list[Labels]:
    """The labels of an equation's outputs, from those of its operands."""
    found = []
    name = equation.primitive.name
    one_by_one = name in _SAME and len(equation.outvars) > 1
    for i, out in enumerate(equation.outvars):
        labels = set()
        for place, own in enumerate(given):
            if one_by_one and place != i:
                continue
            shape = getattr(equation.invars[place].aval, "shape", ())
            for label in own:
                axis = _moved(equation, name, place, label, shape)
                if axis is not None and _fits(label, shape, axis, out.aval.shape, name):
                    labels.add(label._replace(axis=axis))
        found.append(frozenset(labels))
    return found


def sliced(labels: Labels) -> Labels:
    """The labels of what a loop takes along the first axis."""
    return frozenset(x._replace(axis=x.axis - 1) for x in labels if x.axis)


def stacked(labels: Labels) -> Labels:
    """The labels of what a loop stacks along a new first axis."""
    return frozenset(x._replace(axis=x.axis + 1) for x in labels)


def joined(branches: Sequence[Labels]) -> Labels:
    """The labels of a value that comes from one of several branches; a constant one knows none."""
    known = [labels for labels in branches if labels]
    return frozenset.intersection(*known) if known else UNKNOWN


def _rest(size: int, of: int) -> int:
    return size % of if of else 1


def _fits(label: Label, shape: Any, axis: int, out: Any, name: str) -> bool:
    if axis >= len(out):
        return False
    return not _rest(out[axis], label.size) if name == "reshape" else out[axis] == shape[label.axis]


def _moved(equation: Any, name: str, place: int, label: Label, shape: Any) -> int | None:
    """Where a labelled axis of an operand is in the output; None where its order is not kept."""
    params, axis = equation.params, label.axis
    if name in _SAME:
        return axis
    if name == "reshape":
        order = (
            range(len(shape)) if params["dimensions"] is None else params["dimensions"]
        )  # axes are moved first
        moved, sizes = label._replace(axis=list(order).index(axis)), [shape[i] for i in order]
        return _reshaped(moved, sizes, equation.outvars[0].aval.shape)
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name == "squeeze":
        return _without(axis, params["dimensions"])
    if name in ("argmax", "argmin", "reduce") or (name.startswith("reduce_") and "axes" in params):
        return _without(axis, params["dimensions" if name == "reduce" else "axes"])
    if name == "stack":
        return axis + (axis >= params["axis"])
    if name == "unstack":
        return _without(axis, (params["axis"],))
    if name == "dot_general":
        return _multiplied(equation, place, axis)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        is_batch = place == 0 and axis == numbers.lhs_spec[0] and params["batch_group_count"] == 1
        return numbers.out_spec[0] if is_batch else None
    if name == "gather":
        return _gathered(equation, place, axis, shape)
    if name.startswith("scatter") or name in (
        "dynamic_slice",
        "dynamic_update_slice",
        "slice",
        "pad",
        "tile",
        "fft",
    ):
        return axis if place == 0 else None  # the size says whether all of the axis is there, and once
    if name in ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"):
        return axis if params["window_dimensions"][axis] == 1 else None
    if name in _MATRICES:
        return axis if place == 0 and axis < len(shape) - 2 else None
    if name in ("concatenate", "sort", "rev", "split", "top_k"):
        key = {"rev": "dimensions", "split": "axis", "top_k": "axis"}.get(name, "dimension")
        changed = params.get(key, len(shape) - 1)
        return None if axis in (changed if isinstance(changed, tuple) else (changed,)) else axis
    return None


def _without(axis: int, removed: Sequence[int]) -> int | None:
    return None if axis in removed else axis - sum(r < axis for r in removed)


def _reshaped(label: Label, shape: Sequence[int], out: Sequence[int]) -> int | None:
    """The axis that begins where the labelled one began and holds whole examples."""
    before = math.prod(shape[: label.axis])
    for axis, size in enumerate(out):
        if math.prod(out[:axis]) == before and (size > 1 or label.size == 1) and not _rest(size, label.size):
            return axis
    return None


def _multiplied(equation: Any, place: int, axis: int) -> int | None:
    contracted, batch = equation.params["dimension_numbers"]
    if axis in batch[place]:
        return batch[place].index(axis)
    free = _without(axis, (*contracted[place], *batch[place]))
    if free is None or axis in contracted[place]:
        return None
    left = len(equation.invars[0].aval.shape) - len(contracted[0])
    return free + (len(batch[0]) if place == 0 else left)


def _gathered(equation: Any, place: int, axis: int, shape: Sequence[int]) -> int | None:
    numbers = equation.params["dimension_numbers"]
    rank = len(equation.outvars[0].aval.shape)
    batch = [i for i in range(rank) if i not in numbers.offset_dims]
    if place == 1:
        return batch[axis] if axis < len(batch) else None
    if axis in numbers.operand_batching_dims:
        # Each example's own entries.
        own = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
        return batch[own]
    kept = _without(axis, (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims))
    whole = equation.params["slice_sizes"][axis] == shape[axis]
    return numbers.offset_dims[kept] if kept is not None and whole else None
