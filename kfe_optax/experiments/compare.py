"""The ``compare`` command: several optimizers on one config, with equal steps, epochs or seconds, over several seeds."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from kfe_optax.experiments.batches import make_batches
from kfe_optax.experiments.data import load
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import check_optimizers, make_jobs
from kfe_optax.experiments.optimizers import config_of
from kfe_optax.experiments.parallel import refuse_processes
from kfe_optax.experiments.progress import say
from kfe_optax.experiments.records import FIELDS, Recorder
from kfe_optax.experiments.runs import Run, comparison_table, plot_runs
from kfe_optax.experiments.training import Amount, Training, amount, evaluate
from kfe_optax.experiments.workdirs import claimed

# The share of a budget in seconds that is first spent on finding an optimizer's speed, with so many
# steps at least, and the first steps, which do not count: the curvature is refreshed in each of them.
_REHEARSAL = 0.1
_REHEARSED_STEPS = 40
_UNTYPICAL_STEPS = 10


def compare(config: ConfigDict, workdir: str | Path, console: Console | None = None) -> list[Run]:
    """Trains each of ``config.compare.optimizers`` from the same start on the same batches.

    Each gets ``config.compare.budget``, "300 steps", "20 epochs" or "30 seconds" of training, or else ``config.steps``
    steps, from each of ``config.compare.seeds`` seeds. Prints a table, and writes ``compare.png`` and ``compare.csv`` to
    ``workdir``, and the files of each run, which TensorBoard shows beside each other, to ``runs`` in it. Every clock
    excludes compilation and the evaluations between the steps.

    Example::

        config.compare.update(optimizers="adam,ekfac", budget="30 seconds", seeds=5)
        runs = compare(config, "runs/comparison")
    """
    console = console or Console()
    names = [name.strip() for name in config.compare.optimizers.split(",") if name.strip()]
    if not names:
        raise ExperimentError("config.compare.optimizers is empty; name optimizers, as in 'adam,ekfac'.")
    own = {name: config_of(config, name) for name in names}
    refuse_processes(config, "compare")
    budget = amount(config, "compare.budget") if config.compare.budget else Amount(config.steps, "steps")
    dataset = load(config)
    say(console, f"data       {dataset.summary()}")
    steps = {name: _steps(own[name], dataset, budget) for name in names}
    check_optimizers(config, steps, dataset)
    with (
        claimed(workdir, "compare") as folder,
        (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file,
    ):
        table, runs = csv.DictWriter(file, ("optimizer", "seed", *FIELDS)), []
        table.writeheader()
        for name in names:
            for seed, training in _trainings(config, name, dataset, steps[name], budget):
                run = _run(name, seed, training, folder / "runs" / f"{name}-{seed}", console)
                table.writerows({"optimizer": name, "seed": seed, **row} for row in run.rows)
                file.flush()
                runs.append(run)
        plot_runs(runs, folder / "compare.png", title=config.title)
        console.print(comparison_table(runs, title=config.title))
        for label, name in (("figure", "compare.png"), ("curves", "compare.csv")):
            say(console, f"{label:<10} {folder / name}")
    return runs


def _steps(config: ConfigDict, dataset: Dataset, budget: Amount) -> int:
    """How many steps a budget is; of one in seconds, how many are rehearsed for."""
    if budget.unit == "epochs":
        return int(budget.number) * make_batches(config, dataset).steps_per_epoch
    return int(budget.number) if budget.unit == "steps" else config.steps


def _trainings(
    config: ConfigDict, name: str, dataset: Dataset, steps: int, budget: Amount
) -> Iterator[tuple[int, Training]]:
    """What is run for each seed, compiled once."""
    jobs, seconds = make_jobs(config, name, dataset, steps), 0.0
    if budget.unit == "seconds":
        # Schedules span the run, so the run's length in steps must be known before it starts: a
        # rehearsal finds the speed, and its state is thrown away.
        seconds, durations = budget.number, []
        job = jobs(config.seed)
        state = job.state
        while len(durations) < _REHEARSED_STEPS or sum(durations) < _REHEARSAL * seconds:
            clock = time.perf_counter()
            state, _ = job.step(state, job.batches(len(durations)))
            jax.block_until_ready(state)
            durations.append(time.perf_counter() - clock)
        steps = max(1, round(seconds / float(np.mean(durations[_UNTYPICAL_STEPS:]))))
        jobs = make_jobs(config, name, dataset, steps)
    for seed in range(config.seed, config.seed + config.compare.seeds):
        yield seed, Training(config, jobs(seed), dataset, steps, seconds)


def _run(name: str, seed: int, training: Training, folder: Path, console: Console) -> Run:
    """Trains one optimizer from one seed and evaluates the result on the whole sets."""
    job, rows = training.job, []
    with Recorder(folder, resume_at=-1) as recorder:
        training.run(name, console, lambda row: (rows.append(row), recorder.write(row)))
        measures = evaluate(job.task, job.devices.local(training.state), training.dataset)
        recorder.show("final", measures, training.step)
    say(
        console,
        f"{name:<10} training loss {measures['train_loss']:.5f} after {training.step} steps "
        f"in {training.seconds:.1f} s (compiled in {job.compile_seconds:.1f} s)",
    )
    return Run(name, seed, rows, job.compile_seconds, measures, job.task.loss_name)
