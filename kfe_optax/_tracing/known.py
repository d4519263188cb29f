"""What is known of a variable while parameters are followed: its trail, what it depends on, what its derivative reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax._tracing import origins
from kfe_optax._tracing.batch_axes import UNKNOWN, Labels
from kfe_optax._tracing.findings import Live, Trail
from kfe_optax._tracing.origins import NOWHERE, Origins
from kfe_optax._tracing.rules.base import Output
from kfe_optax._tracing.trails import CARRIED
from kfe_optax._tracing.untagged import NONE, Unseen

# Through these a derivative keeps its sign.
_POSITIVE = CARRIED | {"add", "add_any", "reduce_sum", "cumsum", "psum", "psum_invariant", "reshape"}
_POSITIVE |= {"broadcast_in_dim", "squeeze", "transpose", "slice", "concatenate", "stack"}

# What is made of numbers, such as 1/√d.
_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda number: 1 / np.sqrt(number),
}

# What a variable depends on at most.
NOTHING, PARAMETERS, DATA = 0, 1, 2


class Fact(NamedTuple):
    """Of a variable: its trail, what it depends on, what it comes from directly, what its derivative reaches, its examples."""

    trail: Trail | None
    level: int
    origins: Origins = NOWHERE
    live: Live = frozenset()
    batch: Labels = UNKNOWN
    number: Any = None  # what a constant is
    linear: Output | None = None  # the use that no mark stands at whose output it is
    unseen: Unseen = NONE  # the parameters that reach it otherwise than by uses


GIVEN = Fact(None, DATA, origins.DATA)


def union(facts: Sequence[Fact]) -> Origins:
    return NOWHERE.union(*(fact.origins for fact in facts))


def lives(facts: Sequence[Fact]) -> Live:
    return frozenset().union(*(fact.live for fact in facts))


def derivative(name: str, inputs: Sequence[Fact]) -> Live:
    """What the derivative of an equation's outputs reaches, and with which sign."""
    found: set[tuple[int, int]] = set()
    if name != "stop_gradient":
        for place, fact in enumerate(inputs):
            sign = _sign(name, place, inputs) if fact.live else 0
            found |= {(use, sign * before) for use, before in fact.live}
    return frozenset(found)


def _sign(name: str, place: int, inputs: Sequence[Fact]) -> int:
    """The sign of an equation's derivative with respect to one of its operands; 0 where it is not known."""
    if name in _POSITIVE:
        return 1
    if name in ("neg", "sub"):
        return -1 if name == "neg" or place == 1 else 1
    if name in ("mul", "div") and (name, place) != ("div", 1):
        factor = inputs[1 - place].number
        return 0 if factor is None else int(factor > 0) - int(factor < 0)
    return 0


def with_number(name: str, inputs: list[Fact]) -> Trail | None:
    """The trail of a parameter to which a number is added, or by which it is multiplied; None where it is something else."""
    if name == "neg":
        inputs = [*inputs, Fact(None, NOTHING, number=-1.0)]
    if len(inputs) != 2:
        return None
    place = 0 if inputs[1].number is not None else 1
    trail, number = inputs[place].trail, inputs[1 - place].number
    if trail is None or trail.lost or number is None:
        return None
    factors = {"mul": number, "neg": number, "add": 1.0, "sub": (1.0, -1.0)[place]}
    if (name, place) == ("div", 0) and number:
        factors["div"] = 1 / number
    factor = factors.get(name)
    return None if factor is None else dataclasses.replace(trail, factor=trail.factor * float(factor))


def number_of(name: str, inputs: list[Fact]) -> Any:
    """What an equation makes of numbers alone; None where it is not known."""
    numbers = [fact.number for fact in inputs]
    known = name in _ARITHMETIC and numbers and all(number is not None for number in numbers)
    return _ARITHMETIC[name](*numbers) if known else None


def all_unseen(facts: Sequence[Fact]) -> Unseen:
    return Unseen(frozenset().union(*(fact.unseen.paths for fact in facts)))


def float_leaf(leaf: Any) -> bool:
    """Whether a parameter can be differentiated."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jnp.inexact)
