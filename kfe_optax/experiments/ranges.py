"""Which numbers a config may hold: those that could only train garbage, or nothing at all, are refused before a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError

_LARGEST_WHOLE = 2**31 - 1  # the counts of a state and JAX's seeds are of 32 bits


class _Range(NamedTuple):
    """A test of a finite number, and what passes it in words."""

    holds: Callable[[float], bool]
    words: str


_NOT_NEGATIVE = _Range(lambda number: number >= 0, "a finite number that is not negative")
_POSITIVE = _Range(lambda number: number > 0, "a finite number above 0")
_AT_LEAST_ONE = _Range(lambda number: number >= 1, "a whole number of at least 1")
_BELOW_ONE = _Range(lambda number: 0 <= number < 1, "a number from 0 up to, and not including, 1")
_AT_MOST_ONE = _Range(lambda number: 0 <= number <= 1, "a number from 0 to 1")

_RANGES: Mapping[str, _Range] = {
    **dict.fromkeys(("momentum", "b1", "b2", "averaging", "dropout"), _BELOW_ONE),
    **dict.fromkeys(("decay", "scale_decay"), _AT_MOST_ONE),
    **dict.fromkeys(("factor_update_period", "inverse_update_period", "basis_update_period"), _AT_LEAST_ONE),
    **dict.fromkeys(("scale_update_period", "damping_period", "num_samples", "max_dim"), _AT_LEAST_ONE),
    **dict.fromkeys(("damping", "coarse_damping", "initial_damping"), _POSITIVE),
    **dict.fromkeys(("length", "variations", "inputs", "outputs"), _AT_LEAST_ONE),
}
# In config.model every whole number counts units, layers or pixels.
_SIZES: Mapping[type, _Range] = {int: _AT_LEAST_ONE, float: _NOT_NEGATIVE}


def check_config(config: ConfigDict) -> None:
    """Refuses a seed, lengths, sizes of the data and sizes of the model that cannot be.

    Raises:
      ExperimentError: a number is not finite or out of its range.
    """
    _check("config.seed", config.seed, _NOT_NEGATIVE)
    for field in ("steps", "log_every", "checkpoint_every"):
        # That they are positive is asked by the commands that use them.
        _check(f"config.{field}", abs(config.get(field, 1)), _NOT_NEGATIVE)
    for field, value in config.data.items():
        _check(f"config.data.{field}", value, _RANGES.get(field, _NOT_NEGATIVE))
    if "compare" in config:
        _check("config.compare.seconds", config.compare.seconds, _NOT_NEGATIVE)
    for field, value in config.model.items():
        several = isinstance(value, list | tuple)
        for number in value if several else (value,):
            place = f"{'A number of ' * several}config.model.{field}"
            _check(place, number, _RANGES.get(field, _SIZES.get(type(number), _POSITIVE)))


def check_settings(name: str, settings: ConfigDict, run_steps: int) -> None:
    """Refuses numbers of ``config.<name>`` that no optimizer can train with; traced ones pass.

    Rates, strengths and bounds are finite and not negative, dampings positive in every one of ``run_steps``
    steps, moments below 1, weights of running averages at most 1, periods at least 1.

    Raises:
      ExperimentError: a number is not finite or out of its range, or a sub-config is no schedule.

    Example::

        check_settings("adam", settings.adam(1e-3, b1=1.0), run_steps=100)  # refused
    """
    for field, value in settings.items():
        place, allowed = f"config.{name}.{field}", _RANGES.get(field, _NOT_NEGATIVE)
        if not isinstance(value, ConfigDict):
            _check(place, value, allowed)
            continue
        if "kind" not in value or "value" not in value:
            raise ExperimentError(
                f"{place} is neither a number nor a schedule; write settings.schedule(...)."
            )
        # The step after the last one would be the first with the end of a schedule that spans the run.
        reached = value.kind in ("linear", "cosine") and 0 < value.get("steps", 0) < run_steps
        for part, number in value.items():
            in_use = part == "value" or (part == "end" and reached)
            _check(f"{place}.{part}", number, allowed if in_use else _NOT_NEGATIVE)


def _check(place: str, number: Any, allowed: _Range) -> None:
    """Raises for a number outside ``allowed``; what is no number passes."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return
    if isinstance(number, int) and abs(number) > _LARGEST_WHOLE:
        raise ExperimentError(f"{place} is {number}; give a whole number of at most {_LARGEST_WHOLE}.")
    if not (math.isfinite(number) and allowed.holds(number)):
        raise ExperimentError(f"{place} is {number}; give {allowed.words}.")
