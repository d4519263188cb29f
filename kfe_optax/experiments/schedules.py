"""Hyper-parameters over time: their description in a config, and the schedule that it describes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.errors import chosen, require

Schedule = Callable[[jax.Array], jax.Array]


def _steps(own: ConfigDict, progress: jax.Array, run: jax.Array, count: jax.Array) -> Any:
    del progress, count
    # Of a run of 50 steps, 0.14 is step 7 although 0.14 * 50 is a little more.
    return own.value * own.factor ** sum(jnp.where(run >= place - 1e-6, 1, 0) for place in own.boundaries)


# The level of a schedule: of the share that has passed of the steps behind a warm-up, that of all steps, and the step itself.
KINDS: Mapping[str, Callable[..., Any]] = {
    "constant": lambda own, progress, run, count: own.value,
    "linear": lambda own, progress, run, count: own.value + (own.end - own.value) * progress,
    "cosine": lambda own, progress, run, count: (
        own.end + (own.value - own.end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    ),
    "exponential": lambda own, progress, run, count: own.value * (own.end / own.value) ** progress,
    "steps": _steps,
    # The momentum of Sutskever et al. (2013), 1 - 2^(-1 - log2(1 + t // 250)), with which K-FAC's paper ran its baseline.
    "rising": lambda own, progress, run, count: jnp.minimum(1 - 0.5 / (1 + count // 250), own.value),
}
# Of a decay: its warm-up counts steps in the place of updates.
BY_STEPS = "by_steps"


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
    """Describes a hyper-parameter over time: ``value`` held, or from which a ``kind`` of ``KINDS`` departs.

    A linear, cosine or exponential schedule reaches ``end`` at step ``steps``, 0 for the length of the run. One in
    ``"steps"`` is multiplied by ``factor`` at each of ``boundaries``, fractions of ``steps``. Over ``warmup`` steps, which
    count in ``steps``, the value first grows linearly from zero. ``"rising"`` is a momentum that starts at a half and approaches
    ``value`` (Sutskever et al. 2013). ``"by_steps"`` makes of a ``decay`` what
    ``kfe.factors.DecayBySteps`` does.

    Example::

        # Of 200 epochs, 0.1 for the first 100, 0.01 to the 150th, then 0.001.
        schedule(0.1, "steps", boundaries=(0.5, 0.75), factor=0.1)
    """
    numbers = {"end": float(end), "warmup": int(warmup), "steps": int(steps)}
    places = tuple(map(float, boundaries))
    return ConfigDict(
        {"value": float(value), "kind": kind, **numbers, "boundaries": places, "factor": float(factor)}
    )


def as_schedule(value: float | ConfigDict) -> ConfigDict:
    """A number or a schedule as a schedule of its own."""
    # A copy: two optimizers that share a schedule in a config file are set one by one on the command line.
    return ConfigDict(value.to_dict()) if isinstance(value, ConfigDict) else schedule(value)


def make_schedule(settings: ConfigDict, run_steps: int) -> float | Schedule:
    """The schedule, or the plain number, that a sub-config made by ``schedule`` describes.

    ``run_steps`` is the length of the run, where the sub-config does not name its own.
    """
    _check(settings)
    if settings.kind == BY_STEPS:
        return kfe.factors.DecayBySteps(settings.value)
    warmup, steps = settings.warmup, settings.steps or run_steps
    if settings.kind == "constant" and warmup == 0:
        return settings.value

    def at(count: jax.Array) -> jax.Array:
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        level = jnp.asarray(KINDS[settings.kind](settings, progress, count / steps, count))
        # The step about to be taken counts, so that the first step of a warm-up is not lost.
        return jnp.minimum(1.0, (count + 1) / warmup) * level if warmup else level

    return at


def _check(settings: ConfigDict) -> None:
    """Refuses what is no schedule."""
    kind, value, end, factor = settings.kind, settings.value, settings.end, settings.factor
    chosen("A schedule's kind", kind, (*KINDS, BY_STEPS))
    words = f"An exponential schedule goes from {value:g} to {end:g}; both must be positive: set its 'value' and 'end'."
    require(kind != "exponential" or (value > 0 and end > 0), words)
    if kind == "steps":
        places = (0.0, *settings.boundaries, 1.0)
        rising = places[2:] and all(low < high for low, high in itertools.pairwise(places))
        words = f"The boundaries of a schedule in steps are {settings.boundaries}"
        require(rising, f"{words}; give rising fractions of the run between 0 and 1, as in (0.5, 0.75).")
        require(factor > 0, f"The factor of a schedule in steps is {factor}; it must be positive.")
