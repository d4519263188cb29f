"""The trials of a sweep: which fields vary, over which values, in a grid or drawn at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.growth import refuse_growth
from kfe_optax.experiments.optimizers import STEP_FIELDS, optimizer_settings
from kfe_optax.experiments.parallel import refuse_devices
from kfe_optax.experiments.ranges import check_config, check_settings
from kfe_optax.experiments.schedules import make_schedule

SWEEP_HELP = """\
sweep
  Trains config.optimizer once for each setting of its hyper-parameters, all trials in one compiled
  program, and writes sweep.csv (every trial), sweep.png (the final loss colored over learning
  rate x damping) and best.py (the best setting as a config) to --workdir.

  --config.sweep.search=grid|random
  --config.sweep.learning_rate=...   values of config.OPTIMIZER.learning_rate; also .damping and
                                     .max_kl (0: no clip); empty: the config's own value
      0.01,0.1,1                     these values
      0.01:1:5                       grid: 5 values from 0.01 to 1, evenly spaced in the logarithm
      0.01:1                         random: log-uniform between 0.01 and 1 (a count is ignored)
      x0.1:x10:5                     the same, as multiples of the config's own value
  --config.sweep.others="momentum=0.8,0.9; damping.end=0.1:1:3"
                                     any other number of config.OPTIMIZER
  --config.sweep.trials=30           random: how many settings are drawn, with config.seed
  --config.sweep.seeds=0,1,2         each setting is run with each of these; empty: config.seed
  --config.sweep.steps=100           steps a trial; 0: config.steps
  --config.sweep.examples=2000       training images of the final loss; 0: all
  --config.sweep.chunk=8             trials between two writes, and between two looks at Ctrl-C
  --resume                           skips the trials that sweep.csv in --workdir already holds

  A schedule keeps its shape: its 'value' is what is swept, and its 'end' is scaled alike.
  The images are taken as they are: config.data.augment must be empty.

examples
  kfe-optax sweep --config=configs/mnist_small.py --config.optimizer=kfac \\
      --config.sweep.learning_rate=0.03:3:5 --config.sweep.damping=0.01:10:4 --workdir=runs/grid
  kfe-optax sweep --config=configs/mnist_small.py --config.sweep.search=random \\
      --config.sweep.trials=30 --config.sweep.learning_rate=0.03:3 \\
      --config.sweep.damping=0.01:10 --config.sweep.max_kl=0.1:10 --workdir=runs/random
  kfe-optax train --config=runs/random/best.py
"""

_SEARCHES = ("grid", "random")
# The fields with a sweep setting of their own; a method that lacks one is swept without it.
_NAMED = ("learning_rate", "damping", "max_kl")
_POSITIVE = ("learning_rate", "damping")
_STRUCTURAL = ("max_dim", "subspace")  # parts of the states' shapes


class Trial(NamedTuple):
    """One run of a sweep: its place in the order of all, its value of each field, and its seed."""

    index: int
    values: tuple[float, ...]
    seed: int


class Space(NamedTuple):
    """The fields that vary, by their dotted names in ``config.<optimizer>``, and the trials in order.

    ``unused`` names the sweep settings that the optimizer has no field for.
    """

    fields: tuple[str, ...]
    trials: tuple[Trial, ...]
    unused: tuple[str, ...]


class _Range(NamedTuple):
    """What one sweep setting says: ``values``, or the ends of a range in ``low`` and ``high``."""

    values: tuple[float, ...]
    low: float = 0.0
    high: float = 0.0


def make_space(config: ConfigDict) -> Space:
    """Reads ``config.sweep`` for ``config.optimizer``.

    A grid is the product of all values. A random search draws ``config.sweep.trials`` settings:
    log-uniformly from a range, uniformly from a list. Setting s is drawn from (seed, s) alone, so
    that a longer search begins with the trials of a shorter one.

    Example::

        config.sweep.learning_rate = "0.01:1:5"
        config.sweep.damping = "0.1,1,10"
        len(make_space(config).trials)                      # 15
    """
    check_config(config)
    _check_data(config)
    refuse_growth(config, "sweep")
    refuse_devices(config, "sweep")
    if "sweep" not in config:
        raise ExperimentError("The config has no 'sweep'; let its file start from settings.base_config(...).")
    sweep, settings = config.sweep, optimizer_settings(config, config.optimizer)
    if sweep.search not in _SEARCHES:
        raise ExperimentError(
            f"config.sweep.search is '{sweep.search}'; choose one of {', '.join(_SEARCHES)}."
        )
    texts = {name: sweep[name] for name in _NAMED if sweep[name].strip()}
    unused = tuple(name for name in texts if name not in settings)
    texts = {name: text for name, text in texts.items() if name in settings} | _others(sweep.others)
    if not texts:
        raise ExperimentError(
            "config.sweep names no field to vary; set config.sweep.learning_rate, as in '0.01,0.1,1'."
        )
    ranges = {name: _parse(name, text, settings, sweep.search) for name, text in texts.items()}
    seeds = _seeds(sweep.seeds) or (config.seed,)
    if sweep.search == "grid":
        chosen = list(itertools.product(*(found.values for found in ranges.values())))
    else:
        if sweep.trials < 1:
            raise ExperimentError(f"config.sweep.trials is {sweep.trials}; set it to at least 1.")
        chosen = [_draw(ranges, config.seed, number) for number in range(sweep.trials)]
    whole = [isinstance(_own_value(name, settings), int) for name in texts]
    settings_of_trials = [
        tuple(float(round(value)) if integer else value for value, integer in zip(values, whole, strict=True))
        for values in chosen
    ]
    for values in settings_of_trials:
        of_trial = with_values(settings, dict(zip(texts, values, strict=True)))
        # In the compiled program they are traced, and the library can no longer tell.
        check_settings(config.optimizer, of_trial, sweep.steps or config.steps)
        _check_schedules(of_trial)
    runs = itertools.product(dict.fromkeys(settings_of_trials), seeds)
    return Space(
        tuple(texts),
        tuple(Trial(index, values, seed) for index, (values, seed) in enumerate(runs)),
        unused,
    )


def with_values(settings: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """``settings`` with the trial's values, which may be traced.

    A field that is a schedule keeps its shape: ``value`` becomes the trial's and ``end`` is scaled
    by the same ratio. A traced ``max_kl`` of 0 becomes an infinite bound, which is no clip, because
    one program cannot both have the clip and lack it. Whole numbers stay whole.

    Example::

        with_values(config.ekfac, {"damping": 0.3, "learning_rate.end": 0.01})
    """
    fields = settings.to_dict()
    for name, value in values.items():
        *outer, last = name.split(".")
        inner = fields
        for part in outer:
            inner = inner[part]
        own = inner[last]
        if isinstance(own, dict):
            own["end"] = own["end"] * (value / own["value"])
            own["value"] = value
        elif isinstance(own, int):
            inner[last] = value.astype(jnp.int32) if isinstance(value, jax.Array) else int(value)
        elif name == "max_kl" and isinstance(value, jax.Array):
            inner[last] = jnp.where(value > 0, value, jnp.inf)
        else:
            inner[last] = value
    return ConfigDict(fields)


def _check_data(config: ConfigDict) -> None:
    """Refuses an augmentation, which the compiled program of many trials does not have."""
    if config.data.augment:
        raise ExperimentError(
            f"config.data.augment is '{config.data.augment}', and a sweep takes the images as they are; set "
            "--config.data.augment= for the sweep, and augment again when you train with its best setting."
        )


def _check_schedules(settings: ConfigDict) -> None:
    """Refuses a schedule that cannot be, which the compiled program could no longer tell."""
    for field, value in settings.items():
        # A clip whose schedule starts at 0 is no clip, and its schedule is never made.
        if isinstance(value, ConfigDict) and (field != "max_kl" or value.value):
            make_schedule(value, run_steps=1)


def _others(text: str) -> dict[str, str]:
    """``"momentum=0.8,0.9; decay=0.9"`` by field."""
    found: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        if not (name and equals and values):
            raise ExperimentError(
                f"config.sweep.others holds '{part}'; write FIELD=VALUES, with ';' between fields, as in "
                "'momentum=0.8,0.9; damping.end=0.1:1:3'."
            )
        if name in _NAMED or name in found:
            where = f"config.sweep.{name}" if name in _NAMED else "one place"
            raise ExperimentError(f"config.sweep.others names '{name}'; set its values in {where}.")
        found[name] = values
    return found


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) < 2**31 for part in parts):
        raise ExperimentError(
            f"config.sweep.seeds is '{text}'; give whole numbers from 0 to 2147483647, as in '0,1,2'."
        )
    return tuple(dict.fromkeys(map(int, parts)))


def _own_value(name: str, settings: ConfigDict) -> float:
    """The number of ``config.<optimizer>`` that ``name`` stands for."""
    found: Any = settings
    for part in name.split("."):
        if not isinstance(found, ConfigDict) or part not in found:
            raise ExperimentError(
                f"A sweep names the field '{name}', which the optimizer's settings do not have; they have "
                f"{', '.join(settings)}."
            )
        found = found[part]
    if isinstance(found, ConfigDict):
        if not found.value:
            raise ExperimentError(
                f"The schedule of '{name}' starts at 0 and cannot be scaled; give it a positive 'value'."
            )
        found = found.value
    if name in STEP_FIELDS or name in _STRUCTURAL:
        raise ExperimentError(f"'{name}' fixes the shape of the program; set it for the whole sweep instead.")
    if found is not None and (isinstance(found, bool) or not isinstance(found, (int, float))):
        raise ExperimentError(f"A sweep varies numbers, and '{name}' is {found!r}; vary another field.")
    return 0.0 if found is None else found  # empty: no bound, or the library's own default


def _parse(name: str, text: str, settings: ConfigDict, search: str) -> _Range:
    """The values, or for a random search the range, that ``text`` describes."""
    own, grid = _own_value(name, settings), search == "grid"
    low_high_count = text.split(":")
    try:
        if len(low_high_count) == 1:
            found = _Range(tuple(_number(part, own) for part in text.split(",") if part.strip()))
        else:
            low, high = (_number(part, own) for part in low_high_count[:2])
            count = [int(part) for part in low_high_count[2:]]
            # A random search may keep the grid's count, which it does not use.
            if (
                len(count) > 1
                or (grid and len(count) == 0)
                or min(count, default=1) < 1
                or not 0 < low <= high
            ):
                raise ValueError
            values = np.geomspace(low, high, count[0]).tolist() if grid else []
            found = _Range(tuple(values), low, high)
        if not found.values and not found.high:
            raise ValueError
    except ValueError as error:
        form = "LOW:HIGH:COUNT" if grid else "LOW:HIGH"
        raise ExperimentError(
            f"The values of '{name}' in a {search} search are '{text}'; write numbers with commas between "
            f"them, or a range {form} with 0 < LOW <= HIGH, as in '0.01:1{':5' * grid}'."
        ) from error
    smallest = min(found.values or (found.low,))
    if smallest < 0 or (smallest == 0 and name in _POSITIVE):
        least = "be positive" if name in _POSITIVE else "not be negative"
        raise ExperimentError(f"The sweep of '{name}' goes down to {smallest:g}; its values must {least}.")
    return found


def _number(text: str, own: float) -> float:
    """A number, or with a leading x that multiple of the config's own."""
    text = text.strip()
    number = own * float(text[1:]) if text.startswith("x") else float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _draw(ranges: Mapping[str, _Range], seed: int, number: int) -> tuple[float, ...]:
    generator = np.random.default_rng((seed, number))
    return tuple(
        float(generator.choice(found.values))
        if found.values
        else math.exp(generator.uniform(math.log(found.low), math.log(found.high)))
        for found in ranges.values()
    )


def chunks(trials: Sequence[Trial], size: int) -> list[Sequence[Trial]]:
    """The trials in groups of ``size``; the last one may be smaller."""
    return [trials[start : start + size] for start in range(0, len(trials), size)]
