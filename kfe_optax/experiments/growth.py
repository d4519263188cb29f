"""The growing batch of Martens and Grosse (2015): few examples while the steps are large, many at the end."""

from __future__ import annotations

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from kfe_optax.experiments.errors import require


class Phase(NamedTuple):
    """Steps with one batch size: from step ``start`` (counted from 0) to the next phase's."""

    start: int
    batch_size: int


def growing_batch(first: int, largest: int, steps: int, sizes: int) -> tuple[Phase, ...]:
    """Batches that grow exponentially from ``first`` examples to ``largest`` over ``steps`` steps.

    Step k = 1, 2, ... takes m_k = min(⌊m₁ 2^((k−1)/c)⌋, S) examples, c = (steps − 1)/log₂(S/m₁) (Martens and Grosse
    2015, section 13, with steps = 500). Every size is a compilation; therefore m_k is rounded down to a ladder of at
    most ``sizes`` sizes at equal ratios, m₁ and S among them.
    """
    words = f"config.batch_growth grows from config.batch_size = {first} to {largest} examples in {steps} steps and {sizes} sizes"
    grows = 1 <= first < largest and steps >= 2 and sizes >= 2
    require(
        grows, f"{words}; let it end with more than it begins with, and 'steps' and 'sizes' be at least 2."
    )
    ratio = largest / first
    phases: dict[int, Phase] = {}
    for rung in range(sizes):
        size = round(first * ratio ** (rung / (sizes - 1)))
        # The first step with m_k >= size; the floor changes nothing, because a size is whole. Of the
        # root of a power, 1e-9 is rounding. Of two sizes that start together the first would have no step.
        start = math.ceil((steps - 1) * math.log(size / first) / math.log(ratio) - 1e-9)
        phases[start] = Phase(start, size)
    return tuple(phases.values())


def phases_of(config: ConfigDict, examples: int) -> tuple[Phase, ...]:
    """The phases that ``config.batch_size`` and ``config.batch_growth`` describe; one without a growth.

    ``config.batch_growth.steps`` is 0 for a constant batch size, and ``largest`` is 0 for all ``examples``.
    """
    growth = config.get("batch_growth")
    if not growth or not growth.steps:
        return (Phase(0, config.batch_size),)
    words = f"config.batch_growth.largest is {growth.largest} and there are {examples} training images"
    require(growth.largest <= examples, f"{words}; set it to at most as many, or to 0 for all of them.")
    return growing_batch(config.batch_size, growth.largest or examples, growth.steps, growth.sizes)


def refuse_growth(config: ConfigDict, command: str) -> None:
    """Refuses a growing batch for a command whose compiled program has one batch size."""
    words = f"config.batch_growth is set, and '{command}' has one batch size for all steps"
    growth = config.get("batch_growth")
    require(not growth or not growth.steps, f"{words}; set --config.batch_growth.steps=0 for it.")
