"""The ``train`` command: one optimizer, one config, with records and checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console

import kfe_optax as kfe
from kfe_optax.experiments.checkpoints import Checkpoints
from kfe_optax.experiments.data import load
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import Job, TrainState, make_job
from kfe_optax.experiments.processes import any_process, writes
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.records import NoRecorder, Record, Recorder, Records
from kfe_optax.experiments.task import Params, State, Task
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

    Raises:
      ExperimentError: the config or the data cannot be, or ``workdir`` is in use, another's, or without a
        whole checkpoint.
      OSError: a record cannot be written; where it still could, a checkpoint of the last step was.

    Example::

        outcome = train(config, "runs/first")
        print(outcome.measures["train_loss"])
    """
    console = console or Console()
    check_positive(config, "steps", "log_every", "checkpoint_every")
    dataset = load(config)
    console.print(f"data       {dataset.summary()}", highlight=False, soft_wrap=True)
    with (
        claimed(workdir, "train", ("metrics.csv", "config.txt", "checkpoints")) as workdir,
        Checkpoints(workdir, config, dataset.fingerprint()) as checkpoints,
    ):
        if not resume and checkpoints.latest_step() is not None:
            raise ExperimentError(
                f"'{workdir}' already holds a run; add --resume to continue it, or choose another --workdir."
            )
        job = make_job(config, config.optimizer, dataset, config.steps)
        console.print(
            f"optimizer  {config.optimizer}, compiled in {job.compile_seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
        state, step, seconds = job.state, 0, 0.0
        # A job that may be restarted at any time passes --resume always, its first start included.
        if resume and checkpoints.latest_step() is not None:
            restored = checkpoints.restore(job.devices.whole(job.state))
            state, step, seconds = job.devices.place(restored.state), restored.step, restored.seconds
            for words in restored.damaged:
                console.print(f"damaged    {words}", highlight=False, soft_wrap=True)
            console.print(f"resumed    at step {step}", highlight=False, soft_wrap=True)
        if writes():
            (workdir / "config.txt").write_text(f"{config}\n", encoding="utf-8")
        with _recorder(workdir, step if resume else None) as recorder:
            outcome = _run(config, job, state, step, seconds, checkpoints, recorder, console)
            if not outcome.interrupted:
                last = outcome.state
                measures = evaluate(job.task, last.evaluated, dataset, last.model_state)
                recorder.write_final(measures, outcome.step)
                outcome = outcome._replace(measures=measures)
    return outcome


def _recorder(workdir: Path, resume_at: int | None) -> Recorder | NoRecorder:
    return Recorder(workdir, resume_at) if writes() else NoRecorder()


def evaluate(
    task: Task, params: Params, dataset: Dataset, model_state: State | None = None
) -> dict[str, float]:
    """The task's measures over the whole training set and the whole test set."""
    measures = {}
    for part in ("train", "test"):
        images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
        for name, value in task.evaluate(params, images, labels, model_state).items():
            measures[f"{part}_{name}"] = value
    return measures


def check_positive(config: ConfigDict, *fields: str) -> None:
    """Refuses a config in which one of ``fields`` is not a positive count."""
    for field in fields:
        if config[field] < 1:
            raise ExperimentError(f"config.{field} is {config[field]}; set it to at least 1.")


def _run(
    config: ConfigDict,
    job: Job,
    state: TrainState,
    step: int,
    seconds: float,
    checkpoints: Checkpoints,
    recorder: Records,
    console: Console,
) -> Outcome:
    """The training loop, from ``step`` to ``config.steps`` or to an interruption."""
    interrupted, devices = False, job.devices

    def save() -> None:
        with interruption.deferred():
            checkpoints.save(step, devices.whole(state), seconds)

    clock = time.perf_counter()
    logged_step, logged_seconds = step, seconds
    with (
        Interruption() as interruption,
        ProgressDisplay(config.optimizer, config.steps, console, start=step) as display,
    ):
        try:
            while step < config.steps and not _asked_to_stop(interruption, step, config.log_every):
                state, loss = job.step(state, job.batches(step))
                step += 1
                # Only here does the host wait for the device. The step of an interruption is not
                # logged: the resumed run's file shall equal that of an uninterrupted one.
                if step % config.log_every == 0 or step == config.steps:
                    reported = float(loss)
                    seconds += time.perf_counter() - clock
                    speed = (step - logged_step) / max(seconds - logged_seconds, 1e-9)
                    logged_step, logged_seconds = step, seconds
                    epoch = job.batches.epoch(step - 1)
                    info = devices.local(kfe.info(state.opt_state))
                    record = _with_info(Record(step, epoch, reported, seconds, speed), info)
                    recorder.write(record)
                    display.show(step, reported, speed, record.damping)
                    clock = time.perf_counter()
                if step % config.checkpoint_every == 0 or step == config.steps:
                    jax.block_until_ready(state)
                    seconds += time.perf_counter() - clock
                    save()
                    clock = time.perf_counter()
            interrupted = step < config.steps
            if interrupted:
                # Not in the loop: the signal may come after all of a step that could ask for it.
                jax.block_until_ready(state)
                seconds += time.perf_counter() - clock
                save()
        except KeyboardInterrupt:
            # Raised between steps (by a batch source, or outside the main thread): the state is
            # whole. Within a step its buffers are already donated, and the last checkpoint stands; so it
            # does where other processes would have to save as well.
            interrupted = True
            if not _savable(state):
                whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
                last = devices.local(state) if whole else state
                return Outcome(last, checkpoints.latest_step() or 0, seconds, interrupted, {})
            step, seconds = int(devices.local(state.step)), seconds + time.perf_counter() - clock
            save()
        except OSError:
            # A record, or a line on a terminal that is gone, could not be written: the state still may.
            if _savable(state):
                step = int(devices.local(state.step))
                save()
            raise
    return Outcome(devices.local(state), step, seconds, interrupted, {})


def _savable(state: TrainState) -> bool:
    """Whether the state is whole, and of a process that need not wait for others to save it."""
    return jax.process_count() == 1 and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _asked_to_stop(interruption: Interruption, step: int, every: int) -> bool:
    """Whether a signal asks to stop here; several processes agree on it, where they wait for each other anyway."""
    if jax.process_count() == 1:
        return interruption.requested
    return step % every == 0 and any_process(interruption.requested)


def _with_info(record: Record, info: kfe.Info) -> Record:
    """The record with what the library's optimizers tell about themselves."""
    known = {name: getattr(info, name) for name in Record._fields if getattr(info, name, None) is not None}
    return record._replace(**{name: value.item() for name, value in known.items()})
