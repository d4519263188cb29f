"""The ``sweep`` command: many settings of one optimizer, a table, a picture, and the best config."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.sweep_best import Setting, best_config, rank_settings, settings_table, write_config
from kfe_optax.experiments.sweep_plot import plot_sweep
from kfe_optax.experiments.sweep_program import Program, make_program
from kfe_optax.experiments.sweep_records import Row, SweepRecords
from kfe_optax.experiments.sweep_space import Trial, chunks, make_space
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.train import check_positive
from kfe_optax.experiments.workdirs import claimed


class SweepOutcome(NamedTuple):
    """How a sweep ended: its settings, the best first, and how many trials are recorded."""

    settings: list[Setting]
    recorded: int
    interrupted: bool


def sweep(
    config: ConfigDict, workdir: str | Path, *, resume: bool = False, console: Console | None = None
) -> SweepOutcome:
    """Runs the trials that ``config.sweep`` describes and writes everything to ``workdir``.

    The folder receives ``sweep.csv`` with a row a trial, ``sweep.png``, and ``best.py``, the config
    of the setting with the lowest final training loss (the mean over its seeds). With ``resume`` the
    trials that ``sweep.csv`` already holds are skipped. Ctrl-C ends a sweep after the current chunk.

    Example::

        config.optimizer = "kfac"
        config.sweep.learning_rate = "0.03,0.1,0.3"
        outcome = sweep(config, "runs/sweep")
        print(outcome.settings[0].values, outcome.settings[0].train_loss)
    """
    console = console or Console()
    space = make_space(config)
    steps = config.sweep.steps or config.steps
    if steps < 1 or config.sweep.examples < 0 or config.sweep.chunk < 1:
        raise ExperimentError(
            "config.sweep.steps and config.sweep.examples cannot be negative, and config.sweep.chunk must be "
            "at least 1."
        )
    check_positive(config, "batch_size")
    dataset = load(config)
    _say(console, "data", dataset.summary())
    for name in space.unused:
        _say(console, "note", f"{config.optimizer} has no {name}; config.sweep.{name} is not used")
    with claimed(workdir, "sweep", ("sweep.csv", "sweep.json", "sweep.png", "best.py")) as folder:
        fingerprint = dataset.fingerprint()
        with SweepRecords(folder, config, space.fields, fingerprint, resume=resume) as records:
            done = {row.trial.index for row in records.rows}
            left = [trial for trial in space.trials if trial.index not in done]
            if done:
                _say(console, "resumed", f"{len(done)} of {len(space.trials)} trials are already recorded")
            size = min(config.sweep.chunk, len(left))
            interrupted = False
            if left:
                program = make_program(config, space.fields, dataset, steps, size)
                _say(
                    console,
                    "sweep",
                    f"{config.optimizer}, {len(left)} trials of {steps} steps over {', '.join(space.fields)}, "
                    f"compiled in {program.compile_seconds:.1f} s",
                )
                interrupted = _run(config, program, records, left, size, steps, console)
        settings = rank_settings(records.rows)
        outcome = SweepOutcome(settings, len(records.rows), interrupted)
        if not interrupted:
            loss_name = make_task(config, dataset).loss_name
            _report(config, outcome, space.fields, steps, loss_name, folder, console)
    return outcome


def _run(
    config: ConfigDict,
    program: Program,
    records: SweepRecords,
    left: list[Trial],
    size: int,
    steps: int,
    console: Console,
) -> bool:
    """Runs and records chunk by chunk; returns whether it was interrupted before the end."""
    finished, seconds = 0, 0.0
    groups = chunks(left, size)
    with (
        Interruption() as interruption,
        ProgressDisplay(f"sweep {config.optimizer}", len(left) * steps, console) as display,
    ):
        for number, group in enumerate(groups):
            clock = time.perf_counter()
            losses = program.run(group)
            seconds += time.perf_counter() - clock
            records.write([Row(trial, found) for trial, found in zip(group, losses, strict=True)])
            finished += len(group)
            best = rank_settings(records.rows)[0].train_loss
            display.show(finished * steps, best, finished * steps / seconds)
            if interruption.requested:
                return number + 1 < len(groups)
    return False


def _report(
    config: ConfigDict,
    outcome: SweepOutcome,
    fields: tuple[str, ...],
    steps: int,
    loss_name: str,
    folder: Path,
    console: Console,
) -> None:
    settings = outcome.settings
    title = f"{config.title}: {config.optimizer}, {steps} steps"
    plot_sweep(settings, fields, folder / "sweep.png", title, loss_name)
    console.print(settings_table(settings, fields, title, loss_name))
    _say(console, "trials", str(folder / "sweep.csv"))
    _say(console, "figure", str(folder / "sweep.png"))
    best, path = settings[0], folder / "best.py"
    if best.diverged:
        path.unlink(missing_ok=True)
        _say(console, "best", "none: every setting diverged; lower config.sweep.learning_rate")
        return
    heading = (
        f"The best of {len(settings)} settings of {config.optimizer} in a sweep: final training loss "
        f"{best.train_loss:.5f}."
    )
    write_config(best_config(config, fields, best, steps), path, heading)
    _say(console, "best", str(path))


def _say(console: Console, label: str, text: str) -> None:
    console.print(f"{label:<10} {text}", highlight=False, soft_wrap=True)
