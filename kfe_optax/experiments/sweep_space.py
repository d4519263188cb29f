"""What a sweep varies: fields of the config, and the values that each may have."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from kfe_optax.experiments.errors import ExperimentError, require

_KINDS: dict[Any, str] = {bool: "0 or 1", str: "words", int: "whole numbers", float: "numbers"}
# Beside the optimizer's own fields; the data are read once for all trials.
_ROOTS = ("model", "batch_size", "steps", "averaging", "layers")
_BOOLEANS = {"0": False, "false": False, "1": True, "true": True}


def read_space(config: ConfigDict) -> dict[str, Any]:
    """What ``config.sweep.space`` lets each field be, a distribution of Optuna's.

    Example::

        config.sweep.space = "kfac.learning_rate=0.01:1:5"
        len(read_space(config)["kfac.learning_rate.value"].choices)    # 5
    """
    space: dict[str, Any] = {}
    roots = (config.optimizer, *_ROOTS)
    form = "write FIELD=VALUES, each field once, with ';' between fields, as in 'kfac.damping=0.1:1:3; batch_size=64,128'"
    for part in filter(None, map(str.strip, config.sweep.space.split(";"))):
        name, _, text = (piece.strip() for piece in part.partition("="))
        *outer, last = name.split(".")
        words = f"A sweep of '{config.optimizer}' varies what is below config.{', config.'.join(roots)}"
        require(name.split(".")[0] in roots, f"{words}, and not '{name}'.")
        try:
            inner: Any = functools.reduce(operator.getitem, outer, config)
            if isinstance(inner[last], ConfigDict):
                name, inner, last = f"{name}.value", inner[last], "value"
            kind = inner.get_type(last)
        except (KeyError, TypeError, AttributeError) as error:
            words = f"A sweep names the field '{name}', which the config does not have."
            raise ExperimentError(words) from error
        require(text and name not in space, f"config.sweep.space holds '{part}'; {form}.")
        space[name] = _parse(name, text, kind, config.sweep.search == "grid")
    require(space, f"config.sweep.space names no field to vary; {form}.")
    return space


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """``config`` with fields set to ``values``.

    Example::

        with_values(config, {"kfac.damping.value": 0.3, "batch_size": 64})
    """
    found = copy.deepcopy(config)
    found.update_from_flattened_dict(values)
    return found


def _parse(name: str, text: str, kind: type, grid: bool) -> Any:
    """The values, or but for a grid the range, that ``text`` describes."""
    require(kind in _KINDS, f"A sweep varies numbers, words and booleans, and '{name}' is none.")
    try:
        if ":" not in text:
            values = [_value(word.strip(), kind) for word in text.split(",") if word.strip()]
            return CategoricalDistribution(list(dict.fromkeys(values)))
        ends, count = text.split(":")[:2], text.split(":")[2:]
        low, high = (_value(end.strip(), kind) for end in ends)
        if not 0 < low <= high or len(count) > 1:
            raise ValueError
        if grid:
            values = np.geomspace(low, high, int(count[0])).tolist()
            return CategoricalDistribution(list(dict.fromkeys(map(round, values) if kind is int else values)))
        return (IntDistribution if kind is int else FloatDistribution)(low, high, log=True)
    except (ValueError, TypeError, LookupError) as error:
        raise ExperimentError(
            f"The values of '{name}' are '{text}'; write {_KINDS[kind]} with commas between them, or for numbers a range "
            f"LOW:HIGH{':COUNT' * grid} with 0 < LOW <= HIGH."
        ) from error


def _value(text: str, kind: type) -> Any:
    """A word, a boolean or a finite number."""
    if kind in (bool, str):
        return _BOOLEANS[text.lower()] if kind is bool else text
    if not math.isfinite(float(text)):
        raise ValueError
    return kind(text)
