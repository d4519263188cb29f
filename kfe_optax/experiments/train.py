"""The ``train`` command: one optimizer, one config, with records and checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console

from kfe_optax.experiments.checkpoints import Checkpoints
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import TrainState, make_job
from kfe_optax.experiments.parallel import any_process, writes
from kfe_optax.experiments.progress import measures_table, say
from kfe_optax.experiments.records import Recorder
from kfe_optax.experiments.training import Training, evaluate
from kfe_optax.experiments.workdirs import claimed


class Outcome(NamedTuple):
    """How a run ended.

    ``measures`` holds ``train_loss``, ``test_loss`` and the task's other measures over the whole
    sets, or nothing when the run was interrupted. ``state`` is as one device has it, and ``step`` the one
    from which a resumed run continues, 0 where it begins.
    """

    state: TrainState
    step: int
    seconds: float
    interrupted: bool
    measures: dict[str, float]


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Trains ``config.optimizer`` for ``config.steps`` steps and writes everything to ``workdir``.

    The folder receives ``metrics.csv``, TensorBoard's files, ``checkpoints/`` and ``config.txt``.
    With ``resume`` the run continues from the newest checkpoint, bit for bit as if it had never
    stopped; ``config.steps`` may have grown meanwhile, which stretches the schedules that span the
    run. Ctrl-C, SIGTERM and SIGHUP end a run after the current step with a checkpoint, a second one without.

    ``config.devices`` may differ from one resumption to the next: a checkpoint fits any number of devices
    and of processes. Several processes call this together, each with its own part of the data;
    they stop together, after a logged step, and the first of them writes.

    Example::

        outcome = train(config, "runs/first")
        print(outcome.measures["train_loss"])
    """
    console = console or Console()
    dataset = load(config)
    say(console, f"data       {dataset.summary()}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(claimed(workdir, "train"))
        checkpoints = stack.enter_context(Checkpoints(folder, config, dataset.fingerprint()))
        # A job that may be restarted at any time passes --resume always, its first start included.
        continues = checkpoints.latest_step() is not None
        if continues and not resume:
            raise ExperimentError(
                f"'{folder}' already holds a run; add --resume to continue it, or choose another --workdir."
            )
        job = make_job(config, config.optimizer, dataset, config.steps)
        say(console, f"optimizer  {config.optimizer}, compiled in {job.compile_seconds:.1f} s")
        training, step = Training(config, job, dataset, config.steps), 0
        if continues:
            state, step, training.seconds = checkpoints.restore(job.devices.whole(job.state))
            training.state, training.step = job.devices.place(state), step
            say(console, f"resumed    at step {step}")
        recorder = None
        if writes():
            recorder = stack.enter_context(Recorder(folder, (step or -1) if resume else None))
            (folder / "config.txt").write_text(f"{config}\n", encoding="utf-8")
        _run(training, checkpoints, recorder, console)
        state, measures = job.devices.local(training.state), {}
        if training.ended:
            measures = evaluate(job.task, state, dataset)
            if recorder:
                recorder.show("final", measures, training.step)
            title = f"{config.title}: {config.optimizer}, {training.step} steps, {training.seconds:.1f} s"
            console.print(measures_table(measures, title=title))
            say(console, f"results    {folder}")
    return Outcome(state, training.step, training.seconds, not training.ended, measures)


def _run(training: Training, checkpoints: Checkpoints, recorder: Recorder | None, console: Console) -> None:
    """The steps up to the end or to an interruption."""
    config = training.config

    def save() -> None:
        checkpoints.save(training.step, training.job.devices.whole(training.state), training.seconds)

    def stop() -> bool:
        # Several processes agree on it, where they wait for each other anyway.
        if jax.process_count() == 1:
            return interruption.requested
        return training.step % config.log_every == 0 and any_process(interruption.requested)

    write = recorder.write if recorder else lambda row: None
    with Interruption() as interruption:
        try:
            training.run(config.optimizer, console, write, stop, save)
        except OSError:
            # A record, or a line on a terminal that is gone, could not be written: the state still may, unless other
            # processes would have to save it as well.
            if jax.process_count() == 1:
                save()
            raise
        if not training.ended:
            # Not in the loop: the signal may come after all of a step that could ask for it.
            training.stop_clock()
            save()
