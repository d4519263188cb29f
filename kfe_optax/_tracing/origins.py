"""What a value comes from directly: layers, with no other layer between, and the data.

The data count where a function of them is more than a mask: neither what is drawn with their keys, nor what they choose
(predicates, indices), nor a factor that all features of a row share or that consists of comparisons, nor what is the same for
all examples (running statistics, a table of positions), since the first axis is the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._layers.flow import SAME


class Origin(NamedTuple):
    """A use whose output reaches a variable with no other layer between, or the data.

    Attributes:
      use: its place among the uses; negative for the data.
      when: in which iteration of its loop (see `kfe_optax._layers.flow`).
    """

    use: int
    when: str


Origins = frozenset[Origin]
NOWHERE: Origins = frozenset()

# The data as they are; as what may only mask or scale, unless it is added somewhere; repeated along the first axis.
_PLAIN, _FACTOR, _COMMON = Origin(-1, SAME), Origin(-2, SAME), Origin(-3, SAME)
DATA: Origins = frozenset({_PLAIN})

_ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "max", "min", "pow", "rem", "atan2", "select_n", "clamp"}
)


def behind(equation: Any, given: Sequence[Origins]) -> Origins:
    """The origins of an equation's outputs, from those of its operands."""
    if not equation.outvars:
        return NOWHERE  # a callback
    read = [_read(origins, v.aval) for origins, v in zip(given, equation.invars, strict=True)]
    if any(map(_layered, read)):
        read = [
            origins if _layered(origins) else _beside(equation, i, origins) for i, origins in enumerate(read)
        ]
        return NOWHERE.union(*read)
    origins = NOWHERE.union(*read)
    name = equation.primitive.name
    if name == "broadcast_in_dim":
        return _broadcast(equation, origins)
    return moved(origins) if name in ("reshape", "transpose") else origins


def chosen(choice: Origins, values: Origins) -> Origins:
    """The origins of a conditional, which says where its predicate and its branches come from."""
    if _layered(values):
        choice = frozenset(origin for origin in choice if origin.use >= 0)
    return _renamed(choice, _PLAIN, _FACTOR) | values


def moved(origins: Origins) -> Origins:
    """The origins when the first axis becomes another one."""
    return _renamed(origins, _COMMON, _PLAIN)


def _layered(origins: Origins) -> bool:
    return any(origin.use >= 0 for origin in origins)


def _renamed(origins: Origins, old: Origin, new: Origin) -> Origins:
    return (origins - {old}) | {new} if old in origins else origins


def _read(origins: Origins, aval: Any) -> Origins:
    """A key is no data, and what a comparison says is a mask."""
    if _is(aval, jax.dtypes.prng_key):
        return frozenset(origin for origin in origins if origin.use >= 0)
    return _renamed(origins, _PLAIN, _FACTOR) if _is(aval, jnp.bool_) else origins


def _beside(equation: Any, place: int, origins: Origins) -> Origins:
    """What counts of the data in operand `place` of an equation that reads layers in another one."""
    aval, out = equation.invars[place].aval, equation.outvars[0].aval
    if not _is(aval, jnp.inexact) and _is(out, jnp.inexact):
        return NOWHERE  # a predicate, an index
    name = equation.primitive.name
    if name == "conv_general_dilated" and place == 1:
        return NOWHERE  # the same filter for all examples
    if name == "dot_general" and _shared_by_product(equation, place):
        return NOWHERE
    if name in _ELEMENTWISE:
        shape = aval.shape
        if not shape or (shape[0] == 1 < out.shape[0]):
            return NOWHERE
        if name in ("mul", "div"):
            origins = NOWHERE if shape[-1] == 1 else origins - {_FACTOR}
    return origins - {_COMMON}


def _is(aval: Any, kind: Any) -> bool:
    """Whether a value is an array of such a dtype; a token of an effect is none."""
    return hasattr(aval, "dtype") and jax.dtypes.issubdtype(aval.dtype, kind)


def _shared_by_product(equation: Any, place: int) -> bool:
    """Whether an operand is one matrix for all examples, or holds weights that all features of the other operand share."""
    contracted, batched = equation.params["dimension_numbers"]
    if place == 1 and not batched[0] and 0 not in contracted[0]:
        return True
    other = 1 - place
    last = equation.invars[other].aval.ndim - 1
    return last not in (*contracted[other], *batched[other])


def _broadcast(equation: Any, origins: Origins) -> Origins:
    """Repeated along the first axis, data are the same for all examples; along the last one, for all features."""
    shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    sizes = dict(zip(equation.params["broadcast_dimensions"], shape, strict=True))
    grown = [size > 1 and sizes.get(axis, 1) == 1 for axis, size in enumerate(out)]
    if origins and any(grown[:1]):
        return frozenset({_COMMON})
    return _renamed(origins, _PLAIN, _FACTOR) if any(grown[-1:]) else origins
