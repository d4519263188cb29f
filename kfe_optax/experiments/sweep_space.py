"""What a sweep varies: the fields and their values as ``config.sweep`` says them, and a config with some of them set."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.optimizers import optimizer_settings

SWEEP_HELP = """\
sweep
  Trains config.optimizer with many settings, which Optuna chooses, and writes sweep.csv (a row a trial), sweep.png,
  best.py (the best setting as a config) and sweep.journal (Optuna's study 'sweep', which its dashboard opens).

  --config.sweep.search=grid|random|tpe
  --config.sweep.learning_rate=...   values of config.OPTIMIZER.learning_rate; also .damping, .max_kl (0: no clip)
                                     and .batch_size; empty: the config's own value
      0.01,0.1,1                     these values
      0.01:1:5                       grid: 5 values from 0.01 to 1, evenly spaced in the logarithm
      0.01:1                         random, tpe: log-uniform between 0.01 and 1 (a count is ignored)
      x0.1:x10:5                     the same, as multiples of the config's own value
  --config.sweep.others="momentum=0.8,0.9; damping.end=0.1:1:3; fisher=sampled,empirical; nesterov=0,1"
                                     any other field of config.OPTIMIZER
  --config.sweep.objective=train_loss
                                     or validation_loss, test_accuracy, ...; accuracy alone is that of the
                                     validation set, or of the test set where there is none
  --config.sweep.trials=25           random, tpe: how many settings
  --config.sweep.seeds=0,1,2         seeds of each setting, which is judged by their mean; empty: config.seed
  --config.sweep.steps=100           steps of a run; 0: config.steps
  --config.sweep.examples=2000       training images of the final evaluation; 0: all
  --resume                           goes on with the study in --workdir

  A schedule keeps its shape: its 'value' is what is swept, and its 'end' is scaled alike.

examples
  kfe-optax sweep --config=configs/mnist_small.py --config.optimizer=kfac \\
      --config.sweep.learning_rate=0.03:3:5 --config.sweep.damping=0.01:10:4 --workdir=runs/grid
  kfe-optax sweep --config=configs/mnist_small.py --config.sweep.search=tpe --config.sweep.learning_rate=0.03:3 \\
      --config.sweep.damping=0.01:10 --config.sweep.max_kl=0.1:10 --workdir=runs/tpe
  kfe-optax train --config=runs/tpe/best.py
"""

# The fields with a sweep setting of their own; a method that lacks one is swept without it.
_NAMED = ("learning_rate", "damping", "max_kl", "batch_size")
_KINDS = {bool: "0 or 1", str: "words", int: "whole numbers", float: "numbers"}
_BOOLEANS = {"0": False, "false": False, "1": True, "true": True}


def read_space(config: ConfigDict) -> dict[str, Any]:
    """What ``config.sweep`` lets each field be, a distribution of Optuna's.

    Example::

        config.sweep.learning_rate = "0.01:1:5"
        len(read_space(config)["learning_rate"].choices)    # 5
    """
    texts = {name: config.sweep[name] for name in _NAMED if config.sweep[name].strip()}
    for part in filter(None, map(str.strip, config.sweep.others.split(";"))):
        name, _, values = (piece.strip() for piece in part.partition("="))
        if not (name and values) or name in texts:
            raise ExperimentError(
                f"config.sweep.others holds '{part}'; write FIELD=VALUES, each field once, with ';' between fields, as in "
                "'momentum=0.8,0.9; damping.end=0.1:1:3'."
            )
        texts[name] = values
    lacking = set(_NAMED[:-1]) - set(optimizer_settings(config, config.optimizer))
    space = {name: _parse(name, text, config) for name, text in texts.items() if name not in lacking}
    if not space:
        raise ExperimentError(
            "config.sweep names no field to vary; set config.sweep.learning_rate, as in '0.01,0.1,1'."
        )
    return space


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """``config`` with fields of its optimizer, or ``batch_size``, set to ``values``, which may be traced.

    A field that is a schedule keeps its shape: ``value`` becomes the given one and ``end`` is scaled by the same ratio.

    Example::

        with_values(config, {"damping": 0.3, "learning_rate.end": 0.01, "batch_size": 64})
    """
    found = copy.deepcopy(config)
    with found.ignore_type():
        for name, value in values.items():
            inner, last = _place(name, found)
            own = inner[last]
            if isinstance(own, ConfigDict):
                own.end = own.end * (value / own.value) if own.end else own.end
                own.value = value
            else:
                inner[last] = value
    return found


def _place(name: str, config: ConfigDict) -> tuple[ConfigDict, str]:
    """The sub-config that holds a field, and the field's name there."""
    inner: Any = config if name == "batch_size" else config[config.optimizer]
    *outer, last = name.split(".")
    for part in outer:
        inner = inner.get(part) if isinstance(inner, ConfigDict) else None
    if not isinstance(inner, ConfigDict) or last not in inner:
        raise ExperimentError(
            f"A sweep names the field '{name}', which the optimizer's settings do not have; they have "
            f"{', '.join(config[config.optimizer])}."
        )
    return inner, last


def _parse(name: str, text: str, config: ConfigDict) -> Any:
    """The values, or but for a grid the range, that ``text`` describes."""
    inner, last = _place(name, config)
    own, kind, grid = inner[last], inner.get_type(last), config.sweep.search == "grid"
    if isinstance(own, ConfigDict):
        own, kind = own.value, float
    if kind not in _KINDS:
        raise ExperimentError(f"A sweep varies numbers, words and booleans, and '{name}' is {own!r}.")
    try:
        if ":" not in text:
            words = [word.strip() for word in text.split(",") if word.strip()]
            return CategoricalDistribution(list(dict.fromkeys(_value(word, own, kind) for word in words)))
        ends, count = text.split(":")[:2], text.split(":")[2:]
        low, high = (_value(end.strip(), own, kind) for end in ends)
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


def _value(text: str, own: Any, kind: type) -> Any:
    """A word, a boolean or a number; with a leading x that multiple of the config's own."""
    if kind in (bool, str):
        return _BOOLEANS[text.lower()] if kind is bool else text
    number = own * float(text[1:]) if text.startswith("x") else float(text)
    if not math.isfinite(number) or (text.startswith("x") and not own):
        raise ValueError(f"{text} is no finite number, or a multiple of nothing.")
    return round(number) if kind is int else number
