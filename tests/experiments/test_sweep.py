"""``sweep``: what it varies, its trials, its study, and what it finds."""

from __future__ import annotations

import csv
import math
import signal
import struct

import numpy as np
import optuna
import pytest
from rich.console import Console

from kfe_optax.experiments import settings, sweep_results, sweep_trainer
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import make_job
from kfe_optax.experiments.main import main
from kfe_optax.experiments.optimizers import METHODS
from kfe_optax.experiments.sweep import sweep
from kfe_optax.experiments.sweep_results import plot_sweep
from kfe_optax.experiments.sweep_space import read_space, with_values
from kfe_optax.experiments.sweep_trainer import Trainer
from kfe_optax.experiments.train import evaluate

from ..methods import quick

QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_config):
    """Four cheap trials of three steps."""
    tiny_config.optimizer, tiny_config.steps = "sgd", 3
    tiny_config.sweep.update(learning_rate="1e-4,1e-3,1e-2,3e-2", damping="")
    return tiny_config


def rows(workdir):
    with (workdir / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def is_png(path):
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24])[1] == 720


def stopping_at(monkeypatch, call):
    """Ctrl-C in the middle of the ``call``-th trial."""
    run, calls = Trainer.run, []

    def stopped(self, values, stop, show):
        calls.append(values)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return run(self, values, stop, show)

    monkeypatch.setattr(Trainer, "run", stopped)
    return calls


# --- The trials ------------------------------------------------------------------------------------


def trial_alone(config, values, seed):
    """The measures of a trial's setting by ``make_job``."""
    own, dataset = with_values(config, values), load(config)
    own.seed = seed
    job = make_job(own, own.optimizer, dataset, 3)
    state = job.state
    for step in range(3):
        state, _ = job.step(state, job.batches(step))
    return evaluate(job.task, state, dataset)


# One with curvature and one without in CI, the others of the table in the nightly tests.
@pytest.mark.slow
@pytest.mark.parametrize("name", quick("ekfac", slow=["adam"], of=METHODS))
def test_trials_are_the_runs_of_their_settings_and_share_a_program(tiny_config, name, monkeypatch):
    made, make_jobs = [], sweep_trainer.make_jobs
    monkeypatch.setattr(
        sweep_trainer, "make_jobs", lambda *given, **options: made.append(1) or make_jobs(*given, **options)
    )
    schedule, builder = settings.schedule, getattr(settings, name)
    tiny_config.optimizer, tiny_config.steps = name, 3
    if METHODS[name].self_tuning:
        tiny_config[name] = builder(factor_update_period=2)
        trials = [{"initial_damping": 20.0}, {"initial_damping": 500.0}]
    elif METHODS[name].curvature and "damping" in builder(0.1):
        tiny_config[name] = builder(schedule(0.1, "linear", end=0.02), schedule(1.0, "exponential", end=0.5))
        trials = [{"learning_rate": rate, "damping": 0.7} for rate in (0.003, 0.02)]
    else:
        tiny_config[name] = builder(schedule(1e-3, "linear", end=1e-4, warmup=2))
        trials = [{"learning_rate": 5e-4}, {"learning_rate": 5e-3}]
    trainer = Trainer(tiny_config, load(tiny_config), seeds=(3, 0))
    found = [trainer.run(values, lambda: False, lambda *shown: None) for values in trials]
    assert len(made) == 1
    # Not of the setting that was compiled.
    alone = [trial_alone(tiny_config, trials[1], seed) for seed in (3, 0)]
    for measure, value in found[1].items():
        np.testing.assert_allclose(value, np.mean([run[measure] for run in alone]), rtol=1e-5)
    assert abs(found[0]["train_loss"] - found[1]["train_loss"]) > 1e-6


def test_words_booleans_whole_numbers_and_batch_sizes_vary(config, tmp_path):
    config.sgd.momentum = 0.9
    config.sweep.update(learning_rate="1e-3,1e-2", batch_size="8", others="nesterov=0,1; momentum=0,x1")
    outcome = sweep(config, tmp_path, console=QUIET)
    assert len(outcome.trials) == 8
    best = outcome.trials[0]
    assert best.user_attrs == pytest.approx(trial_alone(config, best.params, 0), rel=1e-5)
    found = load_config(str(tmp_path / "best.py"))
    assert (found.batch_size, found.sgd.nesterov) == (8, best.params["nesterov"])
    assert isinstance(found.sgd.nesterov, bool)
    assert is_png(tmp_path / "sweep.png")
    config.optimizer = "kfac"
    config.sweep.update(
        learning_rate="",
        batch_size="",
        others="fisher=sampled,empirical; max_dim=4,100; inverse_update_period=1:3:2",
    )
    space = read_space(config)
    assert [found.choices for found in space.values()] == [("sampled", "empirical"), (4, 100), (1, 3)]


def test_where_numbers_cannot_be_traced_each_setting_is_compiled(config, monkeypatch):
    trainer, make = Trainer(config, load(config), seeds=(0,)), sweep_trainer.make_optimizer

    def choosy(name, own, *others):
        assert own.learning_rate.value > 0  # asks what is not known of a traced number
        return make(name, own, *others)

    monkeypatch.setattr(sweep_trainer, "make_optimizer", choosy)
    for rate in (1e-3, 1e-2):
        found = trainer.run({"learning_rate": rate}, lambda: False, lambda *shown: None)
        assert found == pytest.approx(trial_alone(config, {"learning_rate": rate}, 0), rel=1e-6)


# --- The space -------------------------------------------------------------------------------------


def test_ranges_lists_and_multiples(config):
    config.optimizer = "kfac"
    config.sweep.update(learning_rate="x0.1:x10:3", damping="1, 2", max_kl="0", others="decay=0.9")
    space = read_space(config)
    np.testing.assert_allclose(space.pop("learning_rate").choices, [0.01, 0.1, 1.0])
    assert {name: found.choices for name, found in space.items()} == {
        "damping": (1.0, 2.0),
        "max_kl": (0.0,),
        "decay": (0.9,),
    }
    config.sweep.update(search="random", learning_rate="0.01:1:5", others="inverse_update_period=2:20")
    space = read_space(config)
    assert space["learning_rate"] == optuna.distributions.FloatDistribution(0.01, 1.0, log=True)
    assert space["inverse_update_period"] == optuna.distributions.IntDistribution(2, 20, log=True)
    # What the optimizer lacks is left out.
    config.optimizer = "adam"
    config.sweep.others = ""
    assert list(read_space(config)) == ["learning_rate"]


def test_a_schedule_keeps_its_shape_and_references_hold(tiny_config):
    tiny_config.optimizer = "two_level_kfac"
    tiny_config.two_level_kfac = settings.two_level_kfac(
        settings.schedule(0.4, "exponential", end=0.1, warmup=2), 1.0
    )
    found = with_values(tiny_config, {"learning_rate": 0.2, "damping": 3.0, "batch_size": 8})
    own = found.two_level_kfac
    assert own.learning_rate == settings.schedule(0.2, "exponential", end=0.05, warmup=2)
    assert own.damping == settings.schedule(3.0)
    assert own.coarse_damping.value == 3.0
    assert found.batch_size == 8
    assert tiny_config.two_level_kfac.learning_rate.value == 0.4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search": "bayes"}, "config.sweep.search is 'bayes'; choose one of grid, random, tpe"),
        ({"learning_rate": ""}, "names no field to vary"),
        ({"learning_rate": "0.1,fast"}, "write numbers with commas"),
        ({"learning_rate": ","}, "write numbers with commas"),
        ({"learning_rate": "0.1:1"}, "a range LOW:HIGH:COUNT"),
        ({"learning_rate": "1:0.1:3"}, "0 < LOW <= HIGH"),
        ({"learning_rate": "0.1:1:0"}, "a range LOW:HIGH:COUNT"),
        ({"learning_rate": "0.1:inf:3"}, "a range LOW:HIGH:COUNT"),
        ({"learning_rate": "1:0.1", "search": "tpe"}, "a range LOW:HIGH with"),
        ({"trials": 0}, "config.sweep.trials is 0"),
        ({"steps": -1}, "config.sweep.steps is -1"),
        ({"examples": -1}, "config.sweep.examples is -1"),
        ({"max_kl": "-1"}, "config.kfac.max_kl is -1.0"),
        ({"damping": "0,1"}, "config.kfac.damping.value is 0.0"),
        ({"seeds": "0,one"}, "config.sweep.seeds is '0,one'"),
        ({"batch_size": "16,1000"}, "config.batch_size is 1000 and there are 72"),
        ({"others": "momentum"}, "write FIELD=VALUES"),
        ({"others": "max_kl=1", "max_kl": "1"}, "each field once"),
        ({"others": "speed=1"}, "the field 'speed', which the optimizer's settings do not have"),
        ({"others": "momentum.end=1"}, "the field 'momentum.end'"),
        ({"others": "momentum=0.5,1"}, "config.kfac.momentum is 1.0"),
        ({"others": "inverse_update_period=0,5"}, "config.kfac.inverse_update_period is 0"),
        ({"others": "nesterov=maybe"}, "write 0 or 1 with commas"),
        ({"others": "fisher=foo"}, "config.kfac.fisher cannot be used"),
        ({"others": "max_dim=x2"}, "write whole numbers with commas"),
        (
            {"objective": "speed"},
            "config.sweep.objective is 'speed'; choose one of train_loss, train_squared",
        ),
        ({"objective": "validation_loss"}, "config.sweep.objective is 'validation_loss'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(config, tmp_path, changes, sentence):
    config.optimizer = "kfac"
    config.sweep.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        sweep(config, tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


# --- The study -------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["grid", "random", "tpe"])
def test_an_interrupted_sweep_resumes_to_the_same_trials(config, tmp_path, monkeypatch, search):
    monkeypatch.setattr(sweep_results, "plot_sweep", lambda *given: None)
    if search != "grid":
        # More than the ten that TPE draws before it has learned anything.
        trials = {"random": 4, "tpe": 12}[search]
        config.sweep.update(search=search, learning_rate="1e-4:1e-1", others="nesterov=0,1", trials=trials)
        config.steps = 1
    whole = sweep(config, tmp_path / "whole", console=QUIET)
    with monkeypatch.context() as patch:
        stopping_at(patch, 3)
        part = sweep(config, tmp_path / "parts", console=QUIET)
    assert part.interrupted and not whole.interrupted
    assert len(part.trials) == 2 == len(rows(tmp_path / "parts"))
    # As after a kill within a write.
    with (tmp_path / "parts" / "sweep.journal").open("a") as file:
        file.write('{"op_code": 4, "wor')
    (tmp_path / "parts" / "sweep.journal.lock").symlink_to("nowhere")
    with monkeypatch.context() as patch:
        calls = stopping_at(patch, 0)
        resumed = sweep(config, tmp_path / "parts", resume=True, console=QUIET)
    assert len(calls) == len(whole.trials) - 2
    assert not resumed.interrupted
    for name in ("sweep.csv", "best.py"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    # Nothing is left to run, and nothing changes; another program opens the study.
    again = sweep(config, tmp_path / "parts", resume=True, console=QUIET)
    assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "parts" / "sweep.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == whole.trials[0].value


def test_the_study_of_another_sweep_is_refused(config, tmp_path):
    sweep(config, tmp_path, console=QUIET)

    def refused(sentence, resume=True):
        with pytest.raises(ExperimentError, match=sentence):
            sweep(config, tmp_path, resume=resume, console=QUIET)
        assert len(rows(tmp_path)) == 4

    refused("already holds a sweep; add --resume", resume=False)
    config.kfac.momentum = 0.3  # not this sweep's optimizer
    sweep(config, tmp_path, resume=True, console=QUIET)
    config.sgd.momentum = 0.3
    refused(r"made with config.sgd.momentum = 0.9, and it is 0.3 now")
    config.sgd.momentum = 0.9
    config.sweep.objective = "squared_error"
    refused(r'made with config.sweep.objective = "train_loss"')
    config.sweep.objective = "train_loss"
    archive = dict(np.load(config.data_dir))
    np.savez(tmp_path / "other.npz", **(archive | {"x_train": archive["x_train"][::-1]}))
    own, config.data_dir = config.data_dir, str(tmp_path / "other.npz")
    refused("made with data = ")
    config.data_dir = own
    (tmp_path / "sweep.journal").write_text("{}\n")
    refused("is damaged; choose another")


def test_a_diverged_seed_is_infinitely_bad(config, tmp_path, capsys):
    config.sweep.update(learning_rate="1e30,1e-3", seeds="0,1")
    outcome = sweep(config, tmp_path, console=Console(width=200))
    assert [row["outcome"] for row in rows(tmp_path)] == ["diverged", "finished"]
    assert [trial.value for trial in outcome.trials][1] == math.inf
    assert load_config(str(tmp_path / "best.py")).sgd.learning_rate.value == 1e-3
    assert "2 settings, 1 of them diverged" in capsys.readouterr().out
    config.sweep.learning_rate = "1e30,1e31"
    sweep(config, tmp_path / "none", console=Console(width=200))
    assert "every setting diverged" in capsys.readouterr().out
    assert not (tmp_path / "none" / "best.py").exists()
    assert is_png(tmp_path / "none" / "sweep.png")


def test_by_accuracy_the_highest_is_best(tiny_classifier, tmp_path):
    tiny_classifier.optimizer = "adam"
    tiny_classifier.sweep.update(learning_rate="1e-6,1e-1", objective="accuracy", steps=20, examples=30)
    outcome = sweep(tiny_classifier, tmp_path, console=QUIET)
    best, other = outcome.trials
    assert best.value == best.user_attrs["test_accuracy"] >= other.value
    correct = 30 * best.user_attrs["train_accuracy"]  # of so many examples
    assert correct == pytest.approx(round(correct), abs=1e-4)


# --- The results -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_ends_with_a_table_a_picture_and_a_config_that_trains(
    tiny_config_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", f"--config={tiny_config_file}", "--config.optimizer=kfac", "--config.sweep.steps=3"]
    arguments += ["--config.sweep.learning_rate=0.03,0.3", "--config.sweep.damping=0.1:10:2"]
    with monkeypatch.context() as patch:
        stopping_at(patch, 3)
        assert main(arguments) == 130
    assert "Interrupted; the same command with --resume continues from" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    text, folder = " ".join(capsys.readouterr().out.split()), tmp_path / "runs" / "tiny-kfac-sweep"
    for words in ("2 of 4 trials are already recorded", "step 12/12", "4 settings, 0 of them diverged"):
        assert words in text
    assert is_png(folder / "sweep.png")
    best = min(rows(folder), key=lambda row: float(row["train_loss"]))
    assert f"{float(best['train_loss']):.5f}" in text
    found = load_config(str(folder / "best.py"))
    assert (found.optimizer, found.steps, found.model.sizes) == ("kfac", 3, (64, 6, 64))
    assert found.kfac.learning_rate.value == float(best["learning_rate"])
    assert main(["train", f"--config={folder / 'best.py'}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert f"{float(best['train_loss']):.5f}" in capsys.readouterr().out


def test_help_explains_the_sweep(capsys):
    assert main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("sweep.csv", "log-uniform", "best.py", *settings.base_config("any").sweep):
        assert word in text


@pytest.mark.parametrize("finite", [0, 1, 3])
def test_the_picture(tmp_path, finite):
    found = [
        optuna.trial.create_trial(
            params={"learning_rate": 0.1 * (i + 1), "damping": 1.0 + i, "fisher": "ab"[i % 2]},
            distributions={
                "learning_rate": optuna.distributions.FloatDistribution(0.01, 1),
                "damping": optuna.distributions.FloatDistribution(0.01, 10),
                "fisher": optuna.distributions.CategoricalDistribution(["a", "b"]),
            },
            value=0.1 * i if i < finite else math.inf,
            user_attrs={"train_loss": 0.1 * i} if i < finite else {},
        )
        for i in range(3)
    ]
    plot_sweep(found, tmp_path / "a.png", "made up", "train_loss")
    assert is_png(tmp_path / "a.png")
