"""The growing batch of Martens and Grosse (2015): few examples while the steps are large, many at the end."""

from __future__ import annotations

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError


class Phase(NamedTuple):
    """Steps with one batch size: from step ``start`` (counted from 0) to the next phase's."""

    start: int
    batch_size: int


def growing_batch(first: int, largest: int, steps: int, sizes: int) -> tuple[Phase, ...]:
    """Batches that grow exponentially from ``first`` examples to ``largest`` over ``steps`` steps.

    Step k = 1, 2, ... takes m_k = min(⌊m₁ 2^((k−1)/c)⌋, S) examples, c = (steps − 1)/log₂(S/m₁), so that
    the last of ``steps`` steps and all after it take S (Martens and Grosse 2015, section 13, with
    steps = 500). Every size is a compilation; therefore m_k is rounded down to a ladder of ``sizes``
    sizes at equal ratios, m₁ and S among them.

    Args:
      first: m₁.
      largest: S.
      steps: after how many steps S is reached.
      sizes: the rungs of the ladder; fewer where two would be the same number.

    Raises:
      ExperimentError: the batch does not grow, or the ladder has not both ends.

    Example::

        growing_batch(1000, 16000, steps=500, sizes=5)   # sizes 1000, 2000, 4000, 8000, 16000
    """
    if not 1 <= first < largest:
        raise ExperimentError(
            f"config.batch_growth lets the batch grow from config.batch_size = {first} to {largest} examples; let it "
            "end with more than it begins with."
        )
    if steps < 2 or sizes < 2:
        raise ExperimentError(
            f"config.batch_growth has 'steps' {steps} and 'sizes' {sizes}; both must be at least 2."
        )
    ratio = largest / first
    rungs = [round(first * ratio ** (rung / (sizes - 1))) for rung in range(sizes)]
    phases: list[Phase] = []
    for rung in dict.fromkeys(rungs):
        # The first step with m_k >= rung; the floor changes nothing, because a rung is whole. Of the
        # root of a power, 1e-9 is rounding.
        start = math.ceil((steps - 1) * math.log(rung / first) / math.log(ratio) - 1e-9)
        if phases and phases[-1].start == start:
            phases.pop()  # it would have no step
        phases.append(Phase(start, rung))
    return tuple(phases)


def phases_of(config: ConfigDict, examples: int) -> tuple[Phase, ...]:
    """The phases that ``config.batch_size`` and ``config.batch_growth`` describe; one without a growth.

    ``config.batch_growth.steps`` is 0 for a constant batch size, and ``config.batch_growth.largest`` is
    0 for the whole training set of ``examples`` examples.
    """
    growth = config.get("batch_growth")
    if not growth or not growth.steps:
        return (Phase(0, config.batch_size),)
    largest = growth.largest or examples
    if largest > examples:
        raise ExperimentError(
            f"config.batch_growth.largest is {largest} and there are {examples} training images; set it to at most "
            "as many, or to 0 for all of them."
        )
    return growing_batch(config.batch_size, largest, growth.steps, growth.sizes)


def refuse_growth(config: ConfigDict, command: str) -> None:
    """Refuses a growing batch for a command whose compiled program has one batch size."""
    growth = config.get("batch_growth")
    if growth and growth.steps:
        raise ExperimentError(
            f"config.batch_growth is set, and '{command}' has one batch size for all steps; set "
            "--config.batch_growth.steps=0 for it."
        )
