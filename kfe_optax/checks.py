"""What hyper-parameters may be: arrays (`optax.inject_hyperparams` makes them of numbers) and schedules are taken as they are."""

from __future__ import annotations

from typing import Any

import jax


def period(name: str, steps: Any) -> None:
    """Raises unless a period is a positive whole number."""
    if not isinstance(steps, jax.Array) and (steps != int(steps) or steps < 1):
        raise ValueError(f"{name} must be a positive whole number of steps, not {steps!r}.")


def positive(**given: Any) -> None:
    """Raises for a number, such as a damping, that is not positive."""
    for name, number in given.items():
        if _is_number(number) and not number > 0:
            raise ValueError(f"{name} must be positive, not {number!r}.")


def not_negative(**given: Any) -> None:
    """Raises for a number, such as the strength of a penalty, that is negative."""
    for name, number in given.items():
        if _is_number(number) and not number >= 0:
            raise ValueError(f"{name} must be zero or positive, not {number!r}.")


def interval(lower_name: str, lower: Any, upper_name: str, upper: Any) -> None:
    """Raises unless 0 < lower ≤ upper."""
    if _is_number(lower) and _is_number(upper) and not 0 < lower <= upper:
        raise ValueError(f"{lower_name} must be positive and at most {upper_name}: {lower!r}, {upper!r}.")


def decay(name: str, weight: Any) -> None:
    """Raises for a number that is no weight of the past in a running average."""
    if _is_number(weight) and not 0 <= weight <= 1:
        raise ValueError(
            f"{name} is the weight of the past in a running average and must lie in [0, 1], not be {weight!r}; give a number "
            "such as 0.95."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int)
