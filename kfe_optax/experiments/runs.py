"""What a comparison records of one optimizer: a curve and its end."""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """The loss on fixed training images after so many steps and seconds of training."""

    step: int
    seconds: float
    loss: float


class Run(NamedTuple):
    """One optimizer's curve, and the task's measures over the whole sets at its end.

    Example::

        ekfac.first_at_or_below(adam.curve[-1].loss)    # when EKFAC has what Adam ends with
    """

    name: str
    curve: tuple[Point, ...]
    compile_seconds: float
    measures: dict[str, float]
    loss_name: str

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.curve[-1].step

    @property
    def seconds(self) -> float:
        """Training time, without compilation and evaluation."""
        return self.curve[-1].seconds

    def first_at_or_below(self, loss: float) -> Point | None:
        """The first point of the curve with at most this loss, or None."""
        return next((point for point in self.curve if point.loss <= loss), None)
