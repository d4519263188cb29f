"""Hyper-parameters over time: their description in a config, and the Optax schedule that it describes."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError

Schedule = Callable[[jax.Array], jax.Array]

_KINDS = ("constant", "linear", "cosine", "exponential", "steps")


def schedule(
    value: float,
    kind: str = "constant",
    *,
    end: float = 0.0,
    warmup: int = 0,
    steps: int = 0,
    boundaries: tuple[float, ...] = (),
    factor: float = 0.1,
) -> ConfigDict:
    """Describes a hyper-parameter over time.

    Args:
      value: the value that is held, or from which the schedule departs.
      kind: ``"constant"``, ``"linear"``, ``"cosine"``, ``"exponential"`` or ``"steps"``.
      end: the value at the end of a linear, cosine or exponential schedule; positive for the last.
      warmup: steps over which the value first grows linearly from zero; they count in ``steps``.
      steps: the step at which ``end`` is reached; 0 stands for the length of the run.
      boundaries: for ``"steps"``, fractions of ``steps``: from each of them on the value is
        multiplied by ``factor`` once more.
      factor: for ``"steps"``, see ``boundaries``.

    Example::

        # Of 200 epochs, 0.1 for the first 100, 0.01 to the 150th, then 0.001.
        schedule(0.1, "steps", boundaries=(0.5, 0.75), factor=0.1)

    On the command line: ``--config.sgd.learning_rate.boundaries="(0.5, 0.75)"``.
    """
    return ConfigDict(
        {
            "value": float(value),
            "kind": kind,
            "end": float(end),
            "warmup": int(warmup),
            "steps": int(steps),
            "boundaries": tuple(map(float, boundaries)),
            "factor": float(factor),
        }
    )


def as_schedule(value: float | ConfigDict) -> ConfigDict:
    """A number or a schedule as a schedule of its own."""
    # A copy: two optimizers that share a schedule in a config file are set one by one on the command line.
    return ConfigDict(value.to_dict()) if isinstance(value, ConfigDict) else schedule(value)


def make_schedule(settings: ConfigDict, run_steps: int) -> float | Schedule:
    """The Optax schedule, or the plain number, that a sub-config made by ``schedule`` describes.

    ``run_steps`` is the length of the run, where the sub-config does not name its own.
    """
    value, kind, end = settings.value, settings.kind, settings.end
    warmup, steps = settings.warmup, settings.steps or run_steps
    if kind not in _KINDS:
        raise ExperimentError(f"A schedule's kind is '{kind}'; choose one of {', '.join(_KINDS)}.")
    # Traced values, of a sweep, cannot be asked; the sweep has checked them.
    known = not any(isinstance(number, jax.Array) for number in (value, end))
    if kind == "exponential" and known and not (value > 0.0 and end > 0.0):
        raise ExperimentError(
            f"An exponential schedule goes from {value:g} to {end:g}; both must be positive: set "
            "its 'value' and 'end'."
        )
    if kind == "constant" and warmup == 0:
        return value
    if kind == "steps":
        _check_steps(settings)
    # Of a run of 50 steps, 0.14 is step 7 although 0.14 * 50 is a little more.
    places = [math.ceil(fraction * steps - 1e-6) for fraction in settings.boundaries]

    def at(count: jax.Array) -> jax.Array:
        # The step about to be taken counts, so that the first step of a warm-up is not lost.
        rise = jnp.minimum(1.0, (count + 1) / max(warmup, 1)) if warmup else 1.0
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if kind == "linear":
            level = value + (end - value) * progress
        elif kind == "cosine":
            level = end + (value - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif kind == "exponential":
            level = value * (end / value) ** progress
        elif kind == "steps":
            passed = sum(jnp.where(count >= place, 1, 0) for place in places)
            level = value * settings.factor**passed
        else:
            level = jnp.asarray(value)
        return rise * level

    return at


def _check_steps(settings: ConfigDict) -> None:
    """Refuses boundaries that are not fractions of the run in order, and factors that end it."""
    boundaries, factor = settings.boundaries, settings.factor
    rising = all(low < high for low, high in zip((0.0, *boundaries), (*boundaries, 1.0), strict=True))
    if not boundaries or not rising:
        raise ExperimentError(
            f"The boundaries of a schedule in steps are {boundaries}; give rising fractions of the run between 0 "
            "and 1, as in (0.5, 0.75)."
        )
    if not isinstance(factor, jax.Array) and not factor > 0.0:
        raise ExperimentError(f"The factor of a schedule in steps is {factor:g}; it must be positive.")
