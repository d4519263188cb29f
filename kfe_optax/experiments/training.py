"""The loop that ``train`` and ``compare`` share: steps on a clock, and what is recorded between them."""

from __future__ import annotations

import functools
import operator
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console

import kfe_optax as kfe
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import Job, TrainState
from kfe_optax.experiments.parallel import writes
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.records import FIELDS, Row
from kfe_optax.experiments.task import Task

_INFO = ("damping", "kl_factor", "last_refresh", "failures", "nonfinite")


class Amount(NamedTuple):
    """So many steps, epochs or seconds."""

    number: float
    unit: str


def amount(config: ConfigDict, field: str, units: Sequence[str] = ("steps", "epochs", "seconds")) -> Amount:
    """What ``config.<field>`` says, as "300 steps" does."""
    text = str(functools.reduce(operator.getitem, field.split("."), config))
    found = re.fullmatch(r" *(\d+\.?\d*) *([a-z]+?)s? *", text)
    number, unit = (float(found[1]), f"{found[2]}s") if found else (0.0, "")
    if unit not in units or number <= 0 or (unit != "seconds" and number != int(number)):
        raise ExperimentError(
            f"config.{field} is '{text}'; give a number above 0 and one of {', '.join(units)}, as in '10 {units[0]}'."
        )
    return Amount(number, unit)


def evaluate(task: Task, state: TrainState, dataset: Dataset, train_examples: int = 0) -> dict[str, float]:
    """The task's measures over every split, such as ``test_loss``; of the training set over its first examples, or all."""
    measures = {}
    for split, (images, labels) in dataset.splits().items():
        seen = slice(train_examples or None) if split == "train" else slice(None)
        found = task.evaluate(state.evaluated, images[seen], labels[seen], state.model_state)
        measures |= {f"{split}_{name}": value for name, value in found.items()}
    return measures


class Training:
    """A run of a job for ``steps`` steps, or for ``budget`` seconds: its state, its clock, and its rows.

    The clock counts training alone.
    """

    def __init__(self, config: ConfigDict, job: Job, dataset: Dataset, steps: int, budget: float = 0.0):
        self.config, self.job, self.dataset, self.steps, self.budget = config, job, dataset, steps, budget
        self.state, self.step, self.seconds = job.state, 0, 0.0
        self._evaluations = (
            None if config.evaluate_every == "end" else amount(config, "evaluate_every", ("steps", "epochs"))
        )
        self._began = time.perf_counter()

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.seconds >= self.budget if self.budget else self.step >= self.steps

    def run(
        self,
        name: str,
        console: Console,
        write: Callable[[Row], Any],
        stop: Callable[[], bool] = lambda: False,
        save: Callable[[], None] | None = None,
    ) -> None:
        """Takes steps until the run has ended or ``stop()`` says so, with a progress bar ``name``.

        ``write`` receives a row every ``config.log_every`` steps, at every evaluation and at the end; ``save`` is called
        every ``config.checkpoint_every`` steps and at the end.
        """
        if self.step == 0 and self._evaluations:
            write({"step": 0, "epoch": 0.0, "seconds": 0.0, "loss": float("nan"), **self._measures()})
        with ProgressDisplay(name, self.steps, console, start=self.step) as display:
            self._take_steps(write, display, stop, save)

    def _take_steps(self, write: Callable, display: ProgressDisplay, stop: Callable, save: Any) -> None:
        logged, logged_seconds = self.step, self.seconds
        self._began = time.perf_counter()
        while not self.ended and not stop():
            self.state, loss = self.job.step(self.state, self.job.batches(self.step))
            self.step += 1
            if self.budget:
                # Not at the end of an interval only: the dearest optimizer would have the longest overtime.
                self.stop_clock()
            last, evaluates = self.ended, self._evaluates()
            saves = save and (last or self.step % self.config.checkpoint_every == 0)
            logs = last or evaluates or self.step % self.config.log_every == 0
            if not (logs or saves):
                continue
            # Only here does the host wait for the device. The step of an interruption is not
            # logged: the resumed run's file shall equal that of an uninterrupted one.
            self.stop_clock()
            if logs:
                speed = (self.step - logged) / max(self.seconds - logged_seconds, 1e-9)
                logged, logged_seconds = self.step, self.seconds
                row = self._row(float(loss), speed) | (self._measures() if last or evaluates else {})
                write({name: row[name] for name in FIELDS if name in row})
                display.show(self.step, row["loss"], speed, row.get("damping"))
            if saves:
                save()
            self._began = time.perf_counter()

    def stop_clock(self) -> None:
        """Waits for the device, and adds the time since the clock last ran."""
        jax.block_until_ready(self.state)
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now

    def _evaluates(self) -> bool:
        if self._evaluations is None:
            return False
        number, unit = self._evaluations
        return self.step % (number * (self.job.batches.steps_per_epoch if unit == "epochs" else 1)) == 0

    def _measures(self) -> dict[str, float]:
        if not writes():
            return {}
        state = self.job.devices.local(self.state)
        return evaluate(self.job.task, state, self.dataset, self.config.evaluate_examples)

    def _row(self, loss: float, speed: float) -> dict[str, float | int]:
        numbers = {
            "step": self.step,
            "epoch": self.step / self.job.batches.steps_per_epoch,
            "seconds": self.seconds,
            "steps_per_second": speed,
            "loss": loss,
        }
        info = self.job.devices.local(kfe.info(self.state.opt_state))
        known = {name: getattr(info, name, None) for name in _INFO}
        return numbers | {name: value.item() for name, value in known.items() if value is not None}
