"""Runs of many settings of one optimizer, compiled once for all that differ in real numbers alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import Job, TrainState, make_jobs
from kfe_optax.experiments.optimizers import make_optimizer
from kfe_optax.experiments.sweep_space import with_values
from kfe_optax.experiments.training import evaluate

Values = Mapping[str, Any]
_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Trainer:
    """Trains and judges settings of ``config.optimizer`` from each of ``seeds``, each as ``train`` would, to rounding.

    Words, booleans, whole numbers, 0 (often an absence) and the batch size fix the form of a step: each combination is
    compiled for itself. Where the optimizer cannot be built of traced numbers, so is each setting.

    Example::

        trainer = Trainer(config, dataset, seeds=(0,))
        trainer.run({"learning_rate": 0.1}, stop=lambda: False, show=print)["train_loss"]
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, seeds: Sequence[int]):
        self.steps, self._seeds = config.sweep.steps or config.steps, seeds
        self._config, self._dataset = config, dataset
        self._compiled: dict[tuple[Any, ...], tuple[Callable[..., Job], Callable[..., Any]]] = {}
        self._traceable = True

    def run(
        self, values: Values, stop: Callable[[], bool], show: Callable[[int, float, float], None]
    ) -> dict[str, float] | None:
        """The mean final measures by SET_MEASURE; none of them where a seed diverged, None where ``stop`` said so.

        ``show(step, loss, steps_per_second)`` counts the steps of all seeds.
        """
        totals: dict[str, float] = {}
        for place, seed in enumerate(self._seeds):
            job, state = self._start(values, seed)
            clock = time.perf_counter()
            for step in range(1, self.steps + 1):
                if stop():
                    return None
                state, loss = job.step(state, job.batches(step - 1))
                if step % self._config.log_every == 0 or step == self.steps:
                    if not math.isfinite(loss):
                        return {}
                    show(place * self.steps + step, float(loss), step / (time.perf_counter() - clock))
            last = job.devices.local(state)
            for name, value in evaluate(job.task, last, self._dataset, self._config.sweep.examples).items():
                totals[name] = totals.get(name, 0.0) + value / len(self._seeds)
        return totals if all(map(math.isfinite, totals.values())) else {}

    def _start(self, values: Values, seed: int) -> tuple[Job, TrainState]:
        """The compiled step of a setting, and its first state."""
        names = [
            name for name, value in values.items() if self._traceable and value and isinstance(value, float)
        ]
        numbers = {name: values[name] for name in names}
        fixed = {name: value for name, value in values.items() if name not in names}
        key = (*numbers, *fixed.items())
        try:
            if key not in self._compiled:
                self._compiled[key] = self._compile(with_values(self._config, fixed), numbers)
        except (ExperimentError, *_NOT_TRACEABLE):
            if not numbers:
                raise
            self._traceable = False
            return self._start(values, seed)
        jobs, init = self._compiled[key]
        job = jobs(seed)
        state = job.devices.local(job.state)
        return job, job.devices.place(state._replace(opt_state=init(state.params, _array(numbers))))

    def _compile(self, config: ConfigDict, numbers: Values) -> tuple[Callable[..., Job], Callable[..., Any]]:
        """``jobs(seed)``, and the optimizer's first state of parameters and numbers."""
        inits = []

        def make(name: str, settings: ConfigDict, *others: Any) -> optax.GradientTransformationExtraArgs:
            def of(found: Any) -> optax.GradientTransformationExtraArgs:
                own = with_values(config, dict(zip(numbers, found, strict=True)))
                return make_optimizer(name, own[name], *others)

            # So they are part of the optimizer's state, and arguments of the compiled step.
            injected = optax.inject_hyperparams(of)
            inits.append(jax.jit(lambda params, found: injected(found).init(params)))
            return injected(_array(numbers))

        first = with_values(config, numbers)
        jobs = make_jobs(first, config.optimizer, self._dataset, self.steps, make=make)
        return jobs, inits[0]


def _array(numbers: Values) -> np.ndarray:
    return np.array(list(numbers.values()), np.float32)
