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
from kfe_optax.experiments.progress import ProgressDisplay, say
from kfe_optax.experiments.ranges import check_positive
from kfe_optax.experiments.records import Recorder
from kfe_optax.experiments.runs import measures_table
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
    run. Ctrl-C, SIGTERM and SIGHUP end a run after the current step with a checkpoint, and a second one at once.
    A checkpoint that is damaged is put aside, and the one before it taken.

    ``config.devices`` may differ from one resumption to the next: a checkpoint fits any number of devices
    and of processes. Several processes call this together, each with its own part of the data;
    they stop together, after a logged step, and the first of them writes.

    Example::

        outcome = train(config, "runs/first")
        print(outcome.measures["train_loss"])
    """
    console = console or Console()
    check_positive(config, "steps", "log_every", "checkpoint_every", "evaluate_examples")
    dataset = load(config)
    say(console, f"data       {dataset.summary()}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(claimed(workdir, "train", ("metrics.csv", "config.txt", "checkpoints")))
        checkpoints = stack.enter_context(Checkpoints(folder, config, dataset.fingerprint()))
        # A job that may be restarted at any time passes --resume always, its first start included.
        continues = checkpoints.latest_step() is not None
        if continues and not resume:
            raise ExperimentError(
                f"'{folder}' already holds a run; add --resume to continue it, or choose another --workdir."
            )
        job = make_job(config, config.optimizer, dataset, config.steps)
        say(console, f"optimizer  {config.optimizer}, compiled in {job.compile_seconds:.1f} s")
        restored = checkpoints.restore(job.devices.whole(job.state)) if continues else None
        step = restored.step if restored else 0
        recorder = (
            stack.enter_context(Recorder(folder, (step or -1) if resume else None)) if writes() else None
        )
        training = Training(config, job, dataset, config.steps)
        if restored:
            training.state = job.devices.place(restored.state)
            training.step, training.seconds = step, restored.seconds
            for words in restored.damaged:
                say(console, f"damaged    {words}")
            say(console, f"resumed    at step {step}")
        if writes():
            (folder / "config.txt").write_text(f"{config}\n", encoding="utf-8")
        outcome = _run(training, checkpoints, recorder, console)
        if not outcome.interrupted:
            outcome = outcome._replace(measures=evaluate(job.task, outcome.state, dataset))
            if recorder:
                recorder.show("final", outcome.measures, outcome.step)
            title = f"{config.title}: {config.optimizer}, {outcome.step} steps, {outcome.seconds:.1f} s"
            console.print(measures_table(outcome.measures, title=title))
            say(console, f"results    {folder}")
    return outcome


def _run(
    training: Training, checkpoints: Checkpoints, recorder: Recorder | None, console: Console
) -> Outcome:
    """The steps up to the end or to an interruption."""
    config, devices, start = training.config, training.job.devices, training.step

    def save() -> None:
        with interruption.deferred():
            checkpoints.save(training.step, devices.whole(training.state), training.seconds)

    def stop() -> bool:
        # Several processes agree on it, where they wait for each other anyway.
        if jax.process_count() == 1:
            return interruption.requested
        return training.step % config.log_every == 0 and any_process(interruption.requested)

    with (
        Interruption() as interruption,
        ProgressDisplay(config.optimizer, config.steps, console, start=start) as display,
    ):
        try:
            training.run(recorder.write if recorder else lambda row: None, display, stop, save)
            interrupted = not training.ended
            if interrupted:
                # Not in the loop: the signal may come after all of a step that could ask for it.
                training.stop_clock()
                save()
        except KeyboardInterrupt:
            # Raised between steps (by a batch source, or outside the main thread): the state is
            # whole. Within a step its buffers are already donated, and the last checkpoint stands; so it
            # does where other processes would have to save as well.
            interrupted = True
            if not _savable(training.state):
                last = checkpoints.latest_step() or 0
                return Outcome(training.state, last, training.seconds, interrupted, {})
            training.step = int(devices.local(training.state.step))
            training.stop_clock()
            save()
        except OSError:
            # A record, or a line on a terminal that is gone, could not be written: the state still may.
            if _savable(training.state):
                save()
            raise
    return Outcome(devices.local(training.state), training.step, training.seconds, interrupted, {})


def _savable(state: TrainState) -> bool:
    """Whether the state is whole, and of a process that need not wait for others to save it."""
    return jax.process_count() == 1 and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
