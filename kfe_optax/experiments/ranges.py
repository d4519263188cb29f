"""Which numbers a config may hold: those that could only train garbage, or nothing at all, are refused before a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments.errors import require

_LARGEST_WHOLE = 2**31 - 1  # the counts of a state and JAX's seeds are of 32 bits

_Range = tuple[Callable[[float], bool], str]
_NOT_NEGATIVE: _Range = (lambda number: number >= 0, "a finite number that is not negative")
_POSITIVE: _Range = (lambda number: number > 0, "a finite number above 0")
_AT_LEAST_ONE: _Range = (lambda number: number >= 1, "a whole number of at least 1")
_BELOW_ONE: _Range = (lambda number: 0 <= number < 1, "a number from 0 up to, and not including, 1")
_AT_MOST_ONE: _Range = (lambda number: 0 <= number <= 1, "a number from 0 to 1")
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("momentum", "b1", "b2", "averaging", "dropout"), _BELOW_ONE),
    **dict.fromkeys(("decay", "scale_decay"), _AT_MOST_ONE),
    **dict.fromkeys(("factor_update_period", "inverse_update_period", "basis_update_period"), _AT_LEAST_ONE),
    **dict.fromkeys(("scale_update_period", "damping_period", "num_samples", "max_dim"), _AT_LEAST_ONE),
    **dict.fromkeys(("damping", "coarse_damping", "initial_damping"), _POSITIVE),
    **dict.fromkeys(("length", "variations", "inputs", "outputs", "batch_size"), _AT_LEAST_ONE),
    **dict.fromkeys(("steps", "log_every", "checkpoint_every", "evaluate_examples"), _AT_LEAST_ONE),
    **dict.fromkeys(("seeds", "trials", "every"), _AT_LEAST_ONE),
}


def check_config(config: ConfigDict) -> None:
    """Refuses seeds, lengths, sizes of the data and sizes of the model that cannot be."""
    _check({name: value for name, value in config.items() if name != "model"}, "config")
    for section in ("data", "compare", "sweep", "diagnose"):
        _check(config.get(section, {}), f"config.{section}")
    # In config.model every whole number counts units, layers or pixels.
    _check(config.model, "config.model", _AT_LEAST_ONE)


def check_settings(name: str, settings: ConfigDict) -> None:
    """Refuses numbers of ``config.<name>`` that no optimizer can train with; traced ones pass.

    Rates, strengths and bounds are finite and not negative, dampings positive, moments below 1, weights of running
    averages at most 1, periods at least 1.
    """
    for field, value in settings.items():
        place = f"config.{name}.{field}"
        if isinstance(value, ConfigDict):
            words = f"{place} is neither a number nor a schedule; write settings.schedule(...)."
            require("kind" in value and "value" in value, words)
            _check(value, place, ranges={"value": _RANGES.get(field, _NOT_NEGATIVE)})
    _check(settings, f"config.{name}")


def _check(
    fields: Mapping[str, Any] | ConfigDict,
    place: str,
    whole: _Range = _NOT_NEGATIVE,
    ranges: Mapping[str, _Range] = _RANGES,
) -> None:
    """Refuses numbers out of the range of their field's name; what is no number passes."""
    for field, value in fields.items():
        several = isinstance(value, list | tuple)
        name = f"{'A number of ' * several}{place}.{field}"
        for number in value if several else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            too_large = isinstance(number, int) and abs(number) > _LARGEST_WHOLE
            require(not too_large, f"{name} is {number}; give a whole number of at most {_LARGEST_WHOLE}.")
            holds, words = ranges.get(field, whole if isinstance(number, int) else _NOT_NEGATIVE)
            require(math.isfinite(number) and holds(number), f"{name} is {number}; give {words}.")
