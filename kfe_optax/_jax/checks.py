"""What hyper-parameters may be: arrays (`optax.inject_hyperparams` makes them of numbers) and schedules are taken as they are."""

from __future__ import annotations

import math
import numbers
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np


def period(name: str, steps: Any) -> None:
    """Raises unless a period is a positive whole number."""
    whole(name, steps, unit=" of steps")


def refreshes(initial_refreshes: Any, refreshes_per_doubling: Any, **periods: Any) -> None:
    """Raises unless the periods of a method are positive whole numbers, and those of its first refreshes are, or zero."""
    for name, steps in periods.items():
        period(name, steps)
    whole("initial_refreshes", initial_refreshes, least=0, unit=" of steps")
    whole("refreshes_per_doubling", refreshes_per_doubling, least=0, unit=" of refreshes")


def whole(name: str, number: Any, least: int = 1, unit: str = "") -> None:
    """Raises unless a number is whole, and positive (or zero, for `least` = 0)."""
    if isinstance(number, jax.Array):
        one_number(name, number)
        return
    if not is_whole(number) or number < least:
        kind = "positive whole number" if least else "whole number, zero or positive,"
        raise ValueError(f"{name} must be a {kind}{unit}, not {number!r}.")


def is_whole(number: Any) -> bool:
    """Whether this is a whole number, of whatever type."""
    if isinstance(number, bool | np.bool_) or not isinstance(number, numbers.Real | np.generic):
        return False
    return math.isfinite(number) and number == int(number)


def one_of(name: str, chosen: Any, choices: Any) -> None:
    """Raises unless this is one of a `Literal`'s values."""
    *others, last = map(repr, get_args(choices))
    if chosen not in get_args(choices):
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, not {chosen!r}.")


def fraction(why: str, **given: Any) -> None:
    """Raises for a number outside (0, 1]; `why` says what it is good for there."""
    number(**given)
    for name, value in given.items():
        if not isinstance(value, jax.Array) and not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], where it {why}; it is {value!r}.")


def number(**given: Any) -> None:
    """Raises for what is no number, such as a string out of a config, where there can be no schedule either."""
    for name, value in given.items():
        if isinstance(value, np.ndarray | jax.Array):
            one_number(name, value)
        elif not isinstance(value, numbers.Real | np.generic):
            raise TypeError(f"{name} must be a number, not {value!r}.")


def number_or_schedule(**given: Any) -> None:
    """Raises for what is neither a number nor a schedule."""
    for name, value in given.items():
        _is_number(name, value)


def positive(**given: Any) -> None:
    """Raises for a number, such as a damping, that is not positive and finite."""
    for name, number in given.items():
        bound(**{name: number})
        if _is_number(name, number) and number == math.inf:
            raise ValueError(f"{name} must be finite, not {number!r}.")


def bound(**given: Any) -> None:
    """Raises for a number, such as the bound of a clip, that is not positive; infinity is no bound."""
    for name, number in given.items():
        if _is_number(name, number) and not number > 0:
            raise ValueError(f"{name} must be positive, not {number!r}.")


def not_negative(**given: Any) -> None:
    """Raises for a number, such as the strength of a penalty, that is negative."""
    for name, number in given.items():
        if _is_number(name, number) and not number >= 0:
            raise ValueError(f"{name} must be zero or positive, not {number!r}.")


def interval(lower_name: str, lower: Any, upper_name: str, upper: Any) -> None:
    """Raises unless 0 < lower ≤ upper."""
    if _is_number(lower_name, lower) and _is_number(upper_name, upper) and not 0 < lower <= upper:
        raise ValueError(f"{lower_name} must be positive and at most {upper_name}: {lower!r}, {upper!r}.")


def decay(name: str, weight: Any) -> None:
    """Raises for a number that is no weight of the past in a running average."""
    weight = getattr(weight, "decay", weight)
    if _is_number(name, weight) and not 0 <= weight <= 1:
        raise ValueError(
            f"{name} is the weight of the past in a running average and must lie in [0, 1], not be {weight!r}; give a number "
            "such as 0.95."
        )


def one_number(name: str, value: Any) -> None:
    """Raises for an array, given or returned by a schedule, that is not one number."""
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must be one number at each step, but has shape {jnp.shape(value)}: give a number, an array of shape () "
            "or a schedule that returns one."
        )


def loss(found: Any, has_aux: bool) -> tuple[Any, Any]:
    """(loss, aux) of what a loss function returned.

    Raises:
      ValueError: it is no real scalar, or no pair with `has_aux`.
    """
    aux = None
    if has_aux:
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ValueError(
                f"With has_aux=True the loss function must return a pair, (loss, aux), and it returned {_described(found)}."
            )
        found, aux = found
    if not hasattr(found, "dtype") and not isinstance(found, numbers.Number):
        hint = "; with has_aux=True it may return (loss, aux)" if isinstance(found, tuple | list) else ""
        raise ValueError(
            f"The loss must be a real scalar, and the loss function returned {_described(found)}{hint}."
        )
    if jnp.shape(found) != () or not jnp.issubdtype(jnp.result_type(found), jnp.floating):
        raise ValueError(
            f"The loss must be a real scalar, but has shape {jnp.shape(found)} and dtype {jnp.result_type(found)}; "
            "reduce it, for instance with .mean()."
        )
    return found, aux


def _described(found: Any) -> str:
    if hasattr(found, "dtype"):
        return f"an array of shape {jnp.shape(found)}"
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return "None" if found is None else f"a {type(found).__name__}"


def state(found: Any, kind: type) -> None:
    """Raises TypeError for the state of another transformation, or one that was restored as plain containers."""
    if not isinstance(found, kind):
        raise TypeError(
            f"The optimizer state is a {type(found).__name__} where this transformation's own is a {kind.__name__}: give update "
            "what tx.init, or the last tx.update, of the same optimizer returned; restore a checkpoint into the structure of "
            "tx.init(params)."
        )


def _is_number(name: str, value: Any) -> bool:
    """Whether this is a number that is known, not an array of JAX's or a schedule; raises for what is none of them."""
    if isinstance(value, numbers.Real | np.generic):
        return True
    if isinstance(value, np.ndarray | jax.Array):
        one_number(name, value)
        return isinstance(value, np.ndarray)
    if not callable(value):
        raise TypeError(
            f"{name} must be a number or a schedule (a function of the step count), not {value!r}."
        )
    return False
