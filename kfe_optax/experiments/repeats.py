"""Several optimizers over several seeds: their loss with a confidence band."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from scipy import stats

from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.job import make_jobs

_CONFIDENCE = 0.95


class Curves(NamedTuple):
    """One optimizer's runs: a row a seed, a column an interval of steps.

    ``losses`` are means of the batches' losses over the interval that ends at the step; ``seconds`` are
    of training, without compilation.
    """

    name: str
    steps: np.ndarray  # (intervals,)
    seconds: np.ndarray  # (seeds, intervals)
    losses: np.ndarray  # (seeds, intervals)
    compile_seconds: float

    @property
    def milliseconds(self) -> float:
        """The time of a step, over all seeds."""
        return float(1e3 * self.seconds[:, -1].mean() / self.steps[-1])


class Band(NamedTuple):
    """A mean over seeds and its confidence interval, each an array."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def repeat(
    config: ConfigDict,
    names: Sequence[str],
    dataset: Dataset,
    *,
    seeds: Sequence[int],
    every: int,
    console: Console | None = None,
) -> list[Curves]:
    """Trains each of ``names`` for ``config.steps`` steps from each of ``seeds``.

    Of a seed all optimizers have the same start and the same batches. They take ``every`` steps each in
    turn, so that a machine that is slow for a while is slow for all of them; each is compiled once.

    Example::

        curves = repeat(config, ("adam", "kfac"), load(config), seeds=range(5), every=20)
        band(curves[0].losses).mean[-1]
    """
    console = console or Console()
    makers = {name: make_jobs(config, name, dataset, config.steps) for name in names}
    steps = np.append(np.arange(every, config.steps, every), config.steps)
    losses = {name: np.zeros((len(seeds), len(steps))) for name in names}
    seconds = {name: np.zeros((len(seeds), len(steps))) for name in names}
    compiled = dict.fromkeys(names, 0.0)
    for row, seed in enumerate(seeds):
        jobs = {name: maker(seed) for name, maker in makers.items()}
        states = {name: job.state for name, job in jobs.items()}
        compiled = {name: job.compile_seconds for name, job in jobs.items()}
        for column, end in enumerate(steps):
            begin = steps[column - 1] if column else 0
            # The host's part, which is the same for all, is off the clock.
            batches = [jobs[names[0]].batches(step) for step in range(begin, end)]
            for name, job in jobs.items():
                found, clock = [], time.perf_counter()
                for batch in batches:
                    states[name], loss = job.step(states[name], batch)
                    found.append(loss)
                jax.block_until_ready(states[name])
                seconds[name][row, column] = time.perf_counter() - clock
                losses[name][row, column] = np.mean(jax.device_get(found), dtype=np.float64)
        ends = ", ".join(f"{name} {losses[name][row, -1]:.5f}" for name in names)
        console.print(f"seed {seed}     {ends}", highlight=False, soft_wrap=True)
    return [
        Curves(name, steps, np.cumsum(seconds[name], axis=1), losses[name], compiled[name]) for name in names
    ]


def band(losses: np.ndarray) -> Band:
    """The geometric mean over seeds (the first axis) and its 95 % confidence interval.

    Student's t of the logarithms, as suits losses that are positive and drawn on a logarithmic axis; of
    one seed the interval is the mean. A diverged seed makes the mean infinite or NaN.

    Example::

        band(np.array([[0.1], [0.2]])).mean          # [0.1414]
    """
    logs = np.log(losses)
    count, mean = len(logs), logs.mean(axis=0)
    if count < 2:
        half = np.zeros_like(mean)
    else:
        quantile = stats.t.ppf(0.5 + _CONFIDENCE / 2, count - 1)
        half = quantile * logs.std(axis=0, ddof=1) / np.sqrt(count)
    return Band(np.exp(mean), np.exp(mean - half), np.exp(mean + half))
