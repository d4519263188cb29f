"""The ``compare`` command: several optimizers on one config, with equal steps or equal seconds."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console

from kfe_optax.experiments.data import load
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.growth import refuse_growth
from kfe_optax.experiments.job import Job, TrainState, check_optimizers, make_job
from kfe_optax.experiments.optimizers import find_method, optimizer_settings
from kfe_optax.experiments.parallel import refuse_processes
from kfe_optax.experiments.plots import plot_runs
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.report import comparison_table
from kfe_optax.experiments.runs import Point, Run
from kfe_optax.experiments.train import check_positive, evaluate
from kfe_optax.experiments.workdirs import claimed

# The share of a budget in seconds that is first spent on finding an optimizer's speed, with so many
# steps at least, and the first steps, which do not count: the curvature is refreshed in each of them.
_REHEARSAL = 0.1
_REHEARSED_STEPS = 40
_UNTYPICAL_STEPS = 10


def compare(config: ConfigDict, workdir: str | Path, console: Console | None = None) -> list[Run]:
    """Trains each of ``config.compare.optimizers`` from the same start on the same batches.

    Each gets ``config.compare.seconds`` of training, or else ``config.compare.steps`` steps, or
    else ``config.steps``. Prints a table, and writes ``compare.png`` and ``compare.csv`` to
    ``workdir``. Every clock excludes compilation and the evaluations between the steps.

    Example::

        config.compare.optimizers = "adam,ekfac"
        runs = compare(config, "runs/comparison")
    """
    console = console or Console()
    names = _optimizer_names(config)
    refuse_processes(config, "compare")
    check_positive(config, "steps", "log_every")
    dataset = load(config)
    console.print(f"data       {dataset.summary()}", highlight=False, soft_wrap=True)
    check_optimizers(config, names, dataset, config.compare.steps or config.steps)
    with claimed(workdir, "compare", ("compare.csv", "compare.png")) as workdir:
        runs = []
        for name in names:
            run = _run(config, name, dataset, console)
            runs.append(run)
            console.print(
                f"{name:<10} training loss {run.measures['train_loss']:.5f} after {run.steps} steps "
                f"in {run.seconds:.1f} s (compiled in {run.compile_seconds:.1f} s)",
                highlight=False,
                soft_wrap=True,
            )
        _write_curves(runs, workdir / "compare.csv")
        plot_runs(runs, workdir / "compare.png", title=config.title)
        console.print(comparison_table(runs, title=config.title))
        for label, name in (("figure", "compare.png"), ("curves", "compare.csv")):
            console.print(f"{label:<10} {workdir / name}", highlight=False, soft_wrap=True)
    return runs


def _optimizer_names(config: ConfigDict) -> list[str]:
    """The optimizers to compare, each of them known and configured before the first one runs."""
    names = [name.strip() for name in config.compare.optimizers.split(",") if name.strip()]
    if not names:
        raise ExperimentError("config.compare.optimizers is empty; name optimizers, as in 'adam,ekfac'.")
    for name in names:
        find_method(name)
        optimizer_settings(config, name)
    if config.compare.seconds < 0 or config.compare.steps < 0 or config.compare.examples < 1:
        raise ExperimentError(
            "config.compare.steps and config.compare.seconds cannot be negative, and "
            "config.compare.examples must be at least 1."
        )
    if config.compare.seconds:
        # How long such a run is, and so which sizes it has, is known only at its end.
        refuse_growth(config, "compare with config.compare.seconds")
    return names


def _run(config: ConfigDict, name: str, dataset: Dataset, console: Console) -> Run:
    """Trains one optimizer for its budget and evaluates the result on the whole sets."""
    budget = config.compare.seconds
    planned = config.compare.steps or config.steps
    compile_seconds = 0.0
    if budget:
        # Schedules span the run, so the run's length in steps must be known before it starts: a
        # rehearsal finds the speed, and its state is thrown away.
        job = make_job(config, name, dataset, planned)
        compile_seconds += job.compile_seconds
        planned = max(1, round(budget / _seconds_per_step(job, _REHEARSAL * budget)))
    job = make_job(config, name, dataset, planned)
    compile_seconds += job.compile_seconds
    state, curve = _train(config, job, name, planned, budget, dataset, console)
    return Run(
        name,
        tuple(curve),
        compile_seconds,
        evaluate(job.task, state.evaluated, dataset, state.model_state),
        job.task.loss_name,
    )


def _train(
    config: ConfigDict,
    job: Job,
    name: str,
    planned: int,
    budget: float,
    dataset: Dataset,
    console: Console,
) -> tuple[TrainState, list[Point]]:
    """The loop: intervals of ``log_every`` steps on the clock, an evaluation off the clock."""
    # The same images for every point and every optimizer: a curve without a batch's noise.
    images = dataset.train_images[: config.compare.examples]
    labels = dataset.train_labels[: config.compare.examples]

    def measured(placed: TrainState) -> float:
        state = job.devices.local(placed)
        return job.task.evaluate(state.evaluated, images, labels, state.model_state)["loss"]

    state, step, seconds = job.state, 0, 0.0
    curve = [Point(0, 0.0, measured(state))]
    with ProgressDisplay(name, planned, console) as display:
        while seconds < budget if budget else step < planned:
            clock = time.perf_counter()
            for _ in range(config.log_every if budget else min(config.log_every, planned - step)):
                state, _ = job.step(state, job.batches(step))
                step += 1
                if budget:
                    # Not at the end of the interval only: the dearest optimizer would have the longest overtime.
                    jax.block_until_ready(state)
                    if seconds + time.perf_counter() - clock >= budget:
                        break
            jax.block_until_ready(state)
            seconds += time.perf_counter() - clock
            loss = measured(state)
            curve.append(Point(step, seconds, loss))
            display.show(step, loss, step / seconds)
    return job.devices.local(state), curve


def _seconds_per_step(job: Job, budget: float) -> float:
    """Runs the job for ``budget`` seconds or some steps and returns the time of a typical step."""
    state, durations = job.state, []
    while len(durations) < _REHEARSED_STEPS or sum(durations) < budget:
        clock = time.perf_counter()
        state, _ = job.step(state, job.batches(len(durations)))
        jax.block_until_ready(state)
        durations.append(time.perf_counter() - clock)
    typical = durations[_UNTYPICAL_STEPS:]
    return sum(typical) / len(typical)


def _write_curves(runs: Sequence[Run], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("optimizer", "step", "seconds", "loss"))
        for run in runs:
            for point in run.curve:
                rows.writerow((run.name, point.step, f"{point.seconds:.3f}", repr(point.loss)))
