"""Gradients that no tag sees: where a parameter meets the examples in a way that is no use of a layer.

A value is followed that depends on parameters by other equations than uses (w itself, 2w, a penalty, w − w₀). It meets the
examples where it is multiplied with data or repeated over them. What it may be without: one number that is added to the loss, of
the whole batch or of each example, and data of its own shape, such as a mask or the parameters of another model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

WHOLE, NUMBER, WIDE = range(3)
"""How far a value was repeated: not at all, as a single number, as an array."""


class Unseen(NamedTuple):
    """Of a value: the paths of the parameters that reach it, and how far it was repeated."""

    paths: frozenset[Any] = frozenset()
    width: int = WHOLE


NONE = Unseen()

_ADDED = frozenset({"add", "sub", "add_any", "concatenate", "stack"})
_ENTRYWISE = _ADDED | {"mul", "div", "max", "min", "pow", "rem", "atan2", "select_n", "clamp"}


def size(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))


def behind(equation: Any, given: Sequence[Unseen], data: Sequence[bool]) -> tuple[Unseen, frozenset[Any]]:
    """(what reaches the outputs of an equation, the parameters that meet data in it); `data`: which operands depend on data."""
    name = equation.primitive.name
    own = [(one, size(v.aval)) for one, v in zip(given, equation.invars, strict=True) if one.paths]
    if not own or not equation.outvars or name == "stop_gradient":
        return NONE, frozenset()
    aval = equation.outvars[0].aval
    paths = frozenset().union(*(one.paths for one, _ in own))
    if not any(is_data and not one.paths for one, is_data in zip(given, data, strict=True)):
        return Unseen(paths, _width(name, own, size(aval))), frozenset()
    numbers = all(count == 1 or one.width == NUMBER for one, count in own)
    if size(aval) <= 1 or (numbers and name in _ADDED):
        return NONE, frozenset()
    shapes = {v.aval.shape for v in equation.invars} - {()}
    alike = name in _ENTRYWISE and shapes == {aval.shape}
    if alike and not numbers and all(one.width != WIDE for one, _ in own):
        return Unseen(paths), frozenset()
    return NONE, paths


def _width(name: str, own: list[tuple[Unseen, int]], count: int) -> int:
    """How far the result was repeated, of an equation on such values alone."""
    if count <= 1:
        return WHOLE
    widths = {one.width for one, before in own if before > 1}
    if name == "broadcast_in_dim" and own[0][1] < count:
        return NUMBER if own[0][1] == 1 or widths == {NUMBER} else WIDE
    if WIDE in widths:
        return WIDE
    return NUMBER if widths == {NUMBER} else WHOLE
