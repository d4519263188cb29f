"""The ``sweep`` command: one optimizer with many settings, chosen by Optuna."""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from matplotlib import pyplot
from ml_collections import ConfigDict
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from kfe_optax.experiments.batches import make_batches
from kfe_optax.experiments.checkpoints import identity, refuse_changes
from kfe_optax.experiments.data import load
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError, chosen, require
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import check_optimizers, make_jobs
from kfe_optax.experiments.optimizers import optimizer_settings
from kfe_optax.experiments.parallel import refuse_processes
from kfe_optax.experiments.progress import say
from kfe_optax.experiments.ranges import check_config, check_settings
from kfe_optax.experiments.records import Row
from kfe_optax.experiments.sweep_space import read_space, with_values
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.training import Training
from kfe_optax.experiments.workdirs import claimed

_SAMPLERS = {"grid": RandomSampler, "random": RandomSampler, "tpe": TPESampler}  # a grid's values are given


class SweepOutcome(NamedTuple):
    """How a sweep ended: its trials, the best first, and whether more were to come."""

    trials: list[FrozenTrial]
    interrupted: bool


def sweep(
    config: ConfigDict, workdir: str | Path, *, resume: bool = False, console: Console | None = None
) -> SweepOutcome:
    """Trains ``config.optimizer`` with many settings, which Optuna chooses, and writes everything to ``workdir``.

    The folder receives ``sweep.csv`` (a row a trial), ``sweep.png`` and ``sweep.journal`` (Optuna's study 'sweep', which its
    dashboard opens), and the flags of the best setting are printed. A trial is a run of ``train`` without its files; its
    value is infinitely bad where it diverged. Ctrl-C ends a sweep after the current step; with ``resume`` it goes on with
    the trial that was cut off, and ends with the same trials. The fields of ``config.sweep``:

      search: "grid", "random" or "tpe".
      space: any fields of the optimizer and of the model, ``batch_size``, ``steps``, ``averaging`` and ``layers``, as in
          "kfac.damping=0.1:1:3; kfac.fisher=sampled,empirical; model.activation=relu,tanh; batch_size=64,128".
          0.01,0.1,1      these values
          0.01:1:5        grid: 5 values from 0.01 to 1, evenly spaced in the logarithm
          0.01:1          random, tpe: log-uniform between 0.01 and 1 (a count is ignored)
        Of a schedule it is the 'value'.
      objective: train_loss, validation_loss, test_accuracy, ...; accuracy alone is that of the validation set, or of
          the test set where there is none.
      trials: how many settings, for random and tpe.
      seeds: how many, from config.seed on; a setting is judged by their mean.

    Example::

        config.optimizer, config.sweep.space = "kfac", "kfac.learning_rate=0.03,0.1,0.3"
        outcome = sweep(config, "runs/sweep")
        print(outcome.trials[0].params, outcome.trials[0].value)

        # kfe-optax sweep --config=mnist_small --config.sweep.search=tpe --config.sweep.space="ekfac.damping=0.1:10"
    """
    console = console or Console()
    check_config(config)
    words = "The config has no 'sweep'; let its file start from settings.base_config(...)."
    require("sweep" in config, words)
    refuse_processes(config, "sweep")
    sampler = chosen("config.sweep.search", config.sweep.search, _SAMPLERS)
    seeds, space = range(config.seed, config.seed + config.sweep.seeds), read_space(config)
    dataset = load(config)
    say(console, f"data       {dataset.summary()}")
    objective = _objective(config, dataset)
    config = copy.deepcopy(config)
    config.evaluate_every = "end"
    _check_values(config, space, dataset)
    settings = list(itertools.product(*(getattr(found, "choices", ()) for found in space.values())))
    grid, maximized = config.sweep.search == "grid", objective.endswith("accuracy")
    total = len(settings) if grid else config.sweep.trials
    with claimed(workdir, "sweep") as folder, Interruption() as interruption:
        study = _study(config, folder, dataset, maximized, resume)
        done = len(_finished(study))
        if done:
            say(console, f"resumed    {done} of {total} trials are already recorded")
        while done < total:
            # Of the seed and the number of trials alone, so that a resumed study draws what it would have drawn.
            study.sampler = sampler(seed=config.seed + done)
            if grid and not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial(dict(zip(space, settings[done], strict=True)))
            trial = study.ask(space)
            say(console, f"{f'{done + 1} of {total}':<10} {_flags(trial)}")
            found = _measures(with_values(config, trial.params), seeds, dataset, interruption, console)
            if found is None:
                break
            for name, value in found.items():
                trial.set_user_attr(name, value)
            value = found.get(objective, -math.inf if maximized else math.inf)
            say(console, f"           {objective} {value:.5f}" if found else "           diverged")
            study.tell(trial, value)
            done += 1
        trials = sorted(_finished(study), key=lambda trial: trial.value, reverse=maximized)
        if trials:
            table = study.trials_dataframe(("state", "value", "params", "user_attrs"))
            table.columns = [re.sub(r"^(params|user_attrs)_", "", name) for name in table.columns]
            table = table[table.pop("state") == "COMPLETE"]
            table.to_csv(folder / "sweep.csv", index=False)
            plot_sweep(study, folder / "sweep.png", f"{config.title}: {config.optimizer}", objective)
            diverged = int(np.isinf(table["value"]).sum())
            say(
                console,
                f"trials     {folder / 'sweep.csv'}, {len(trials)} settings, {diverged} of them diverged",
            )
            say(console, f"figure     {folder / 'sweep.png'}")
            best = f"{objective} {trials[0].value:.5f} with {_flags(trials[0])}"
            say(console, f"best       {best if trials[0].user_attrs else 'none: every setting diverged'}")
    return SweepOutcome(trials, done < total)


def _measures(
    config: ConfigDict, seeds: range, dataset: Dataset, interruption: Interruption, console: Console
) -> dict[str, float] | None:
    """The mean final measures over seeds; none of them where one diverged, None after an interruption."""
    jobs, found = make_jobs(config, config.optimizer, dataset, config.steps), []
    for seed in seeds:
        rows: list[Row] = [{"loss": 0.0}]
        training = Training(config, jobs(seed), dataset, config.steps)
        training.run(
            config.optimizer,
            console,
            rows.append,
            lambda rows=rows: interruption.requested or not math.isfinite(rows[-1]["loss"]),
        )
        if not all(map(math.isfinite, rows[-1].values())):
            return {}
        if not training.ended:
            return None
        splits = tuple(f"{split}_" for split in dataset.splits())
        found.append({name: value for name, value in rows[-1].items() if name.startswith(splits)})
    return {name: float(np.mean([own[name] for own in found])) for name in found[0]}


def _objective(config: ConfigDict, dataset: Dataset) -> str:
    """``config.sweep.objective`` as SET_MEASURE."""
    measures, splits, wanted = make_task(config, dataset).measures, dataset.splits(), config.sweep.objective
    if wanted in measures:
        wanted = f"{'validation' if 'validation' in splits else 'test'}_{wanted}"
    known = [f"{split}_{measure}" for split in splits for measure in measures]
    return chosen("config.sweep.objective", wanted, known)


def _check_values(config: ConfigDict, space: dict[str, Any], dataset: Dataset) -> None:
    """Refuses values that cannot be before a run of any."""
    name = config.optimizer
    for field, found in space.items():
        for value in getattr(found, "choices", None) or (found.low, found.high):
            own = with_values(config, {field: value})
            make_batches(own, dataset)
            check_settings(name, optimizer_settings(own, name))
            if not isinstance(value, float):
                check_optimizers(own, {name: config.steps}, dataset)


def _study(config: ConfigDict, folder: Path, dataset: Dataset, maximized: bool, resume: bool) -> optuna.Study:
    """The folder's study, new or continued."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path, own = folder / "sweep.journal", identity(config, dataset.fingerprint())
    varied = {name: value for name, value in config.sweep.items() if name != "trials"}
    own["config"] |= {"steps": config.steps, "evaluate_examples": config.evaluate_examples, "sweep": varied}
    if path.exists():
        words = f"'{folder}' already holds a sweep; add --resume to continue it, or choose another --workdir."
        require(resume, words)
        # What a kill leaves: a line without its end, and a lock, for which the claim of the folder stands.
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        for lock in folder.glob("sweep.journal.*"):
            lock.unlink()
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name="sweep",
            direction="maximize" if maximized else "minimize",
            load_if_exists=True,
        )
    except (ValueError, KeyError) as error:
        raise ExperimentError(f"'{path}' is damaged; choose another --workdir.") from error
    refuse_changes("sweep", study.user_attrs.get("identity", own), own)
    study.set_user_attr("identity", own)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # it was cut off, and the next one is drawn alike
    return study


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def _flags(trial: Any) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in trial.params.items())


def plot_sweep(study: optuna.Study, path: Path, title: str, objective: str) -> None:
    """Draws the trials over each field that varies, by Optuna; those that diverged are left out.

    Example::

        plot_sweep(study, Path("sweep.png"), "K-FAC", "train_loss")
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its plots may change, and about axes with a single value
        axes: Any = optuna.visualization.matplotlib.plot_slice(study, target_name=objective)
    figure = np.ravel(axes)[0].figure
    figure.suptitle(title)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
