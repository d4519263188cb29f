"""The ``sweep`` command: one optimizer with many settings, chosen by Optuna; a table, a picture, and the best config."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optuna
from ml_collections import ConfigDict
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from kfe_optax.experiments.batches import make_batches
from kfe_optax.experiments.data import load
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import check_optimizers
from kfe_optax.experiments.optimizers import METHODS
from kfe_optax.experiments.parallel import refuse_processes
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.ranges import check_config, check_positive, check_settings
from kfe_optax.experiments.sweep_results import write_results
from kfe_optax.experiments.sweep_space import read_space, with_values
from kfe_optax.experiments.sweep_trainer import Trainer
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.workdirs import claimed

_FILES = ("sweep.csv", "sweep.journal", "sweep.png", "best.py")
_SAMPLERS = {"grid": RandomSampler, "random": RandomSampler, "tpe": TPESampler}  # a grid's values are given
# What a resumed sweep may change: where things lie and how they are written, and on which devices it runs.
_FREE_FIELDS = {"title", "log_every", "checkpoint_every", "compare", "diagnose", "data_dir"}
_FREE_FIELDS |= {"devices", "distributed", "cluster"}


class SweepOutcome(NamedTuple):
    """How a sweep ended: its trials, the best first, and whether more were to come."""

    trials: list[FrozenTrial]
    interrupted: bool


def sweep(
    config: ConfigDict, workdir: str | Path, *, resume: bool = False, console: Console | None = None
) -> SweepOutcome:
    """Runs the trials that ``config.sweep`` describes and writes everything to ``workdir``.

    A trial is a run of ``train`` without its records, for each of ``config.sweep.seeds``; its value is the mean of
    ``config.sweep.objective``, infinitely bad where a run diverged. The folder receives ``sweep.journal``, which is
    Optuna's study 'sweep', ``sweep.csv``, ``sweep.png`` and ``best.py``. Ctrl-C ends a sweep after the current step; with
    ``resume`` it goes on with the trial that was cut off, and ends with the same trials.

    Example::

        config.optimizer = "kfac"
        config.sweep.learning_rate = "0.03,0.1,0.3"
        outcome = sweep(config, "runs/sweep")
        print(outcome.trials[0].params, outcome.trials[0].value)
    """
    console = console or Console()
    seeds, space = _seeds(config), read_space(config)
    dataset = load(config)
    _say(console, "data", dataset.summary())
    objective = _objective(config, dataset)
    _check_values(config, space, dataset)
    grid, total = config.sweep.search == "grid", config.sweep.trials
    with claimed(workdir, "sweep", _FILES) as folder:
        study = _study(config, folder, dataset, objective, resume)
        if grid:
            settings = list(itertools.product(*(found.choices for found in space.values())))
            total = len(settings)
        done = len(_finished(study))
        if done:
            _say(console, "resumed", f"{done} of {total} trials are already recorded")
        trainer = Trainer(config, dataset, seeds)
        steps, words = trainer.steps * len(seeds), f"{total - done} trials of {trainer.steps} steps"
        _say(console, "sweep", f"{config.optimizer}, {words} over {', '.join(space)}")
        bar = ProgressDisplay(f"sweep {config.optimizer}", total * steps, console, start=done * steps)
        with Interruption() as interruption, bar:
            while done < total:
                # Of the seed and the number of trials alone, so that a resumed study draws what it would have drawn.
                study.sampler = _SAMPLERS[config.sweep.search](seed=config.seed + done)
                if grid and not study.get_trials(states=(TrialState.WAITING,)):
                    study.enqueue_trial(dict(zip(space, settings[done], strict=True)))
                trial = study.ask(space)
                found = trainer.run(
                    trial.params,
                    lambda: interruption.requested,
                    lambda step, loss, speed, done=done: bar.show(done * steps + step, loss, speed),
                )
                if found is None:
                    break
                for name, value in found.items():
                    trial.set_user_attr(name, value)
                study.tell(trial, found.get(objective, -math.inf if _is_maximized(objective) else math.inf))
                done += 1
        trials = sorted(_finished(study), key=lambda trial: trial.value, reverse=_is_maximized(objective))
        if trials:
            best = with_values(config, trials[0].params)
            best.update(name=f"{config.name}_best", seed=seeds[0], steps=trainer.steps)
            title = f"{config.title}: {config.optimizer}, {trainer.steps} steps"
            write_results(trials, best, objective, folder, title, console)
    return SweepOutcome(trials, done < total)


def _seeds(config: ConfigDict) -> tuple[int, ...]:
    """The seeds of every trial, after the refusal of what cannot be."""
    check_config(config)
    if "sweep" not in config:
        raise ExperimentError("The config has no 'sweep'; let its file start from settings.base_config(...).")
    refuse_processes(config, "sweep")
    check_positive(config, "batch_size", "log_every", "steps")
    if config.sweep.search not in _SAMPLERS:
        raise ExperimentError(
            f"config.sweep.search is '{config.sweep.search}'; choose one of {', '.join(_SAMPLERS)}."
        )
    for field, least in (("trials", 1), ("steps", 0), ("examples", 0)):
        if config.sweep[field] < least:
            raise ExperimentError(
                f"config.sweep.{field} is {config.sweep[field]}; set it to at least {least}."
            )
    parts = [part.strip() for part in config.sweep.seeds.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) < 2**31 for part in parts):
        raise ExperimentError(
            f"config.sweep.seeds is '{config.sweep.seeds}'; give whole numbers from 0 to 2147483647, as in '0,1,2'."
        )
    return tuple(dict.fromkeys(map(int, parts))) or (config.seed,)


def _objective(config: ConfigDict, dataset: Dataset) -> str:
    """``config.sweep.objective`` as SET_MEASURE."""
    task, splits = make_task(config, dataset), dataset.splits()
    batch = dict(zip(("image", "label"), (rows[:1] for rows in splits["train"]), strict=True))
    params, state = jax.eval_shape(task.init, jax.random.key(0), batch["image"])
    measures = jax.eval_shape(task.measure, params, batch, jnp.ones(1), state)
    wanted = config.sweep.objective
    if wanted in measures:
        wanted = f"{'validation' if 'validation' in splits else 'test'}_{wanted}"
    known = [f"{split}_{measure}" for split in splits for measure in measures]
    if wanted not in known:
        raise ExperimentError(f"config.sweep.objective is '{wanted}'; choose one of {', '.join(known)}.")
    return wanted


def _is_maximized(objective: str) -> bool:
    return objective.endswith("accuracy")


def _check_values(config: ConfigDict, space: dict[str, Any], dataset: Dataset) -> None:
    """Refuses values that cannot be before a run of any."""
    name, steps = config.optimizer, config.sweep.steps or config.steps
    for field, found in space.items():
        for value in getattr(found, "choices", None) or (found.low, found.high):
            own = with_values(config, {field: value})
            make_batches(own, dataset)
            check_settings(name, own[name])
            if not isinstance(value, float):
                check_optimizers(own, {name: steps}, dataset)


def _study(config: ConfigDict, folder: Path, dataset: Dataset, objective: str, resume: bool) -> optuna.Study:
    """The folder's study, new or continued."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path, identity = folder / "sweep.journal", _identity(config, dataset)
    if path.exists():
        if not resume:
            raise ExperimentError(
                f"'{folder}' already holds a sweep; add --resume to continue it, or choose another --workdir."
            )
        # What a kill leaves: a line without its end, and a lock, for which the claim of the folder stands.
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        for lock in folder.glob("sweep.journal.*"):
            lock.unlink()
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name="sweep",
            direction="maximize" if _is_maximized(objective) else "minimize",
            load_if_exists=True,
        )
    except (ValueError, KeyError) as error:
        raise ExperimentError(f"'{path}' is damaged; choose another --workdir.") from error
    saved = study.user_attrs.get("identity", identity)
    for name in sorted(saved.keys() | identity.keys()):
        if saved.get(name) != identity.get(name):
            raise ExperimentError(
                f"The sweep in '{folder}' was made with {name} = {saved.get(name)}, and it is {identity.get(name)} now; "
                "resume with the same settings and data, or start afresh in another --workdir."
            )
    study.set_user_attr("identity", identity)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # it was cut off, and the next one is drawn alike
    return study


def _identity(config: ConfigDict, dataset: Dataset) -> dict[str, str]:
    """All that fixes the trials and their results."""
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _FREE_FIELDS and (name == config.optimizer or name not in METHODS)
    }
    del fields["sweep"]["trials"]
    flat, _ = jax.tree_util.tree_flatten_with_path(fields, is_leaf=lambda value: not isinstance(value, dict))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): json.dumps(value) for path, value in flat
    }
    return {f"config.{name}": value for name, value in found.items()} | {"data": str(dataset.fingerprint())}


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def _say(console: Console, label: str, text: str) -> None:
    console.print(f"{label:<10} {text}", highlight=False, soft_wrap=True)
