"""``sweep``: what it varies, its trials, its study, and what it finds."""

from __future__ import annotations

import csv
import math
import signal

import numpy as np
import optuna
import pytest
from rich.console import Console

from kfe_optax.experiments import settings
from kfe_optax.experiments import sweep as sweep_lib
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import make_job
from kfe_optax.experiments.main import main
from kfe_optax.experiments.sweep import plot_sweep, sweep
from kfe_optax.experiments.sweep_space import read_space, with_values
from kfe_optax.experiments.train import evaluate

QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_config):
    """Four cheap trials of three steps."""
    tiny_config.optimizer, tiny_config.steps = "sgd", 3
    tiny_config.sweep.space = "sgd.learning_rate=1e-4,1e-3,1e-2,3e-2"
    return tiny_config


def rows(workdir):
    with (workdir / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def stopping_at(monkeypatch, call):
    """Ctrl-C in the middle of the ``call``-th trial."""
    measures, calls = sweep_lib._measures, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return measures(*given)

    monkeypatch.setattr(sweep_lib, "_measures", stopped)
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


def test_a_trial_is_the_mean_of_the_runs_of_its_setting(config, tmp_path):
    config.optimizer = "kfac"
    config.kfac = settings.kfac(settings.schedule(0.1, "linear", end=0.02), 1.0)
    config.sweep.update(space="kfac.learning_rate=0.02; kfac.damping=0.7,0.9", seeds=2)
    for trial in sweep(config, tmp_path, console=QUIET).trials:
        alone = [trial_alone(config, trial.params, seed) for seed in (0, 1)]
        for measure, value in trial.user_attrs.items():
            np.testing.assert_allclose(value, np.mean([run[measure] for run in alone]), rtol=1e-5)


def test_words_booleans_whole_numbers_and_batch_sizes_vary(config, tmp_path):
    config.sgd.momentum = 0.9
    config.sweep.space = "sgd.learning_rate=1e-3,1e-2; batch_size=8; sgd.nesterov=0,1; sgd.momentum=0,0.9"
    outcome = sweep(config, tmp_path, console=QUIET)
    assert len(outcome.trials) == 8
    best = outcome.trials[0]
    assert best.user_attrs == pytest.approx(trial_alone(config, best.params, 0), rel=1e-5)
    assert best.params["batch_size"] == 8
    assert isinstance(best.params["sgd.nesterov"], bool)
    assert is_png(tmp_path / "sweep.png")
    config.optimizer = "kfac"
    config.sweep.space = "kfac.fisher=sampled,empirical; kfac.max_dim=4,100; kfac.inverse_update_period=1:3:2"
    space = read_space(config)
    assert [found.choices for found in space.values()] == [("sampled", "empirical"), (4, 100), (1, 3)]


# --- The space -------------------------------------------------------------------------------------


def test_ranges_and_lists(config):
    config.optimizer = "kfac"
    config.sweep.space = "kfac.learning_rate=0.01:1:3; kfac.damping=1, 2; kfac.max_kl=0; kfac.decay=0.9"
    space = read_space(config)
    np.testing.assert_allclose(space.pop("kfac.learning_rate.value").choices, [0.01, 0.1, 1.0])
    assert {name: found.choices for name, found in space.items()} == {
        "kfac.damping.value": (1.0, 2.0),
        "kfac.max_kl": (0.0,),
        "kfac.decay": (0.9,),
    }
    config.sweep.update(search="random", space="kfac.learning_rate=0.01:1:5; kfac.inverse_update_period=2:20")
    space = read_space(config)
    float_range = optuna.distributions.FloatDistribution(0.01, 1.0, log=True)
    assert space["kfac.learning_rate.value"] == float_range
    int_range = optuna.distributions.IntDistribution(2, 20, log=True)
    assert space["kfac.inverse_update_period"] == int_range


def test_references_hold(tiny_config):
    tiny_config.optimizer = "two_level_kfac"
    tiny_config.two_level_kfac = settings.two_level_kfac(settings.schedule(0.4, "linear", end=0.1), 1.0)
    values = {"two_level_kfac.learning_rate.value": 0.2, "two_level_kfac.damping.value": 3.0, "batch_size": 8}
    found = with_values(tiny_config, values)
    own = found.two_level_kfac
    assert own.learning_rate == settings.schedule(0.2, "linear", end=0.1)
    assert own.damping == settings.schedule(3.0)
    assert own.coarse_damping.value == 3.0
    assert found.batch_size == 8
    assert tiny_config.two_level_kfac.learning_rate.value == 0.4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search": "bayes"}, "config.sweep.search is 'bayes'; choose one of grid, random, tpe"),
        ({"space": ""}, "names no field to vary"),
        ({"space": "kfac.learning_rate=0.1,fast"}, "write numbers with commas"),
        ({"space": "kfac.learning_rate=,"}, "write numbers with commas"),
        ({"space": "kfac.learning_rate=0.1:1"}, "a range LOW:HIGH:COUNT"),
        ({"space": "kfac.learning_rate=1:0.1:3"}, "0 < LOW <= HIGH"),
        ({"space": "kfac.learning_rate=0.1:1:0"}, "a range LOW:HIGH:COUNT"),
        ({"space": "kfac.learning_rate=0.1:inf:3"}, "a range LOW:HIGH:COUNT"),
        ({"space": "kfac.learning_rate=1:0.1", "search": "tpe"}, "a range LOW:HIGH with"),
        ({"trials": 0}, "config.sweep.trials is 0"),
        ({"seeds": 0}, "config.sweep.seeds is 0"),
        ({"space": "kfac.max_kl=-1"}, "config.kfac.max_kl is -1.0"),
        ({"space": "kfac.damping=0,1"}, "config.kfac.damping.value is 0.0"),
        ({"space": "batch_size=16,1000"}, "config.batch_size is 1000 and there are 72"),
        ({"space": "kfac.momentum"}, "write FIELD=VALUES"),
        ({"space": "kfac.max_kl=1; kfac.max_kl=1"}, "each field once"),
        ({"space": "kfac.speed=1"}, "the field 'kfac.speed', which the config does not have"),
        ({"space": "sgd.momentum=0.5"}, "A sweep of 'kfac' varies what is below config.kfac, config.model"),
        ({"space": "data.train_size=10"}, "and not 'data.train_size'"),
        ({"space": "kfac.momentum.end=1"}, "the field 'kfac.momentum.end'"),
        ({"space": "kfac.momentum=0.5,1"}, "config.kfac.momentum is 1.0"),
        ({"space": "kfac.inverse_update_period=0,5"}, "config.kfac.inverse_update_period is 0"),
        ({"space": "kfac.nesterov=maybe"}, "write 0 or 1 with commas"),
        ({"space": "kfac.fisher=foo"}, "config.kfac.fisher cannot be used"),
        ({"space": "kfac.max_dim=few"}, "write whole numbers with commas"),
        (
            {"objective": "speed"},
            "config.sweep.objective is 'speed'; choose one of train_loss, train_squared",
        ),
        ({"objective": "validation_loss"}, "config.sweep.objective is 'validation_loss'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(config, tmp_path, changes, sentence):
    config.optimizer = "kfac"
    config.sweep.space = "kfac.learning_rate=0.1"
    config.sweep.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        sweep(config, tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


# --- The study -------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["grid", "random", "tpe"])
def test_an_interrupted_sweep_resumes_to_the_same_trials(config, tmp_path, monkeypatch, search):
    monkeypatch.setattr(sweep_lib, "plot_sweep", lambda *given: None)
    if search != "grid":
        # More than the ten that TPE draws before it has learned anything.
        trials = {"random": 4, "tpe": 12}[search]
        space = "sgd.learning_rate=1e-4:1e-1; sgd.nesterov=0,1"
        config.sweep.update(search=search, space=space, trials=trials)
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
    found, expected = ((tmp_path / name / "sweep.csv").read_text() for name in ("parts", "whole"))
    assert found == expected
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
    refused("made with config.sweep.objective = 'train_loss'")
    config.sweep.objective = "train_loss"
    archive = dict(np.load(config.data_dir))
    np.savez(tmp_path / "other.npz", **(archive | {"x_train": archive["x_train"][::-1]}))
    own, config.data_dir = config.data_dir, str(tmp_path / "other.npz")
    refused("made with other training images")
    config.data_dir = own
    (tmp_path / "sweep.journal").write_text("{}\n")
    refused("is damaged; choose another")


def test_a_diverged_seed_is_infinitely_bad(config, tmp_path, capsys):
    config.sweep.update(space="sgd.learning_rate=1e30,1e-3", seeds=2)
    outcome = sweep(config, tmp_path, console=Console(width=200))
    assert [float(row["value"]) < math.inf for row in rows(tmp_path)] == [False, True]
    assert [trial.value for trial in outcome.trials][1] == math.inf
    text = capsys.readouterr().out
    assert "2 settings, 1 of them diverged" in text and "with --config.sgd.learning_rate.value=0.001" in text
    config.sweep.space = "sgd.learning_rate=1e30,1e31"
    sweep(config, tmp_path / "none", console=Console(width=200))
    assert "every setting diverged" in capsys.readouterr().out
    assert is_png(tmp_path / "none" / "sweep.png")


def test_by_accuracy_the_highest_is_best(tiny_classifier, tmp_path):
    tiny_classifier.optimizer = "adam"
    tiny_classifier.update(steps=20, evaluate_examples=30)
    tiny_classifier.sweep.update(space="adam.learning_rate=1e-6,1e-1", objective="accuracy")
    outcome = sweep(tiny_classifier, tmp_path, console=QUIET)
    best, other = outcome.trials
    assert best.value == best.user_attrs["test_accuracy"] >= other.value
    correct = 30 * best.user_attrs["train_accuracy"]  # of so many examples
    assert correct == pytest.approx(round(correct), abs=1e-4)


# --- The results -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_ends_with_a_table_a_picture_and_flags_that_train(
    tiny_config_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", f"--config={tiny_config_file}", "--config.optimizer=kfac", "--config.steps=3"]
    arguments += ["--config.sweep.space=kfac.learning_rate=0.03,0.3; kfac.damping=0.1:10:2"]
    with monkeypatch.context() as patch:
        stopping_at(patch, 3)
        assert main(arguments) == 130
    assert "Interrupted; the same command with --resume continues from" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    text, folder = " ".join(capsys.readouterr().out.split()), tmp_path / "runs" / "tiny-kfac-sweep"
    for words in ("2 of 4 trials are already recorded", "4 of 4 --config.kfac.learning_rate", "step 3/3"):
        assert words in text
    assert "4 settings, 0 of them diverged" in text
    assert is_png(folder / "sweep.png")
    best = min(rows(folder), key=lambda row: float(row["train_loss"]))
    assert f"best train_loss {float(best['train_loss']):.5f} with" in text
    flags = text.partition(" with ")[2].split()
    assert f"--config.kfac.learning_rate.value={best['kfac.learning_rate.value']}" in flags
    assert main(["train", *arguments[1:4], *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    assert f"{float(best['train_loss']):.5f}" in capsys.readouterr().out


def test_help_explains_the_sweep(capsys):
    assert main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("sweep.csv", "log-uniform", *settings.base_config("any").sweep):
        assert word in text


@pytest.mark.parametrize("finite", [0, 1, 3])
def test_the_picture(tmp_path, finite):
    study = optuna.create_study()
    for i in range(3):
        trial = optuna.trial.create_trial(
            params={"learning_rate": 0.1 * (i + 1), "damping": 1.0 + i, "fisher": "ab"[i % 2]},
            distributions={
                "learning_rate": optuna.distributions.FloatDistribution(0.01, 1),
                "damping": optuna.distributions.FloatDistribution(0.01, 10),
                "fisher": optuna.distributions.CategoricalDistribution(["a", "b"]),
            },
            value=0.1 * i if i < finite else math.inf,
        )
        study.add_trial(trial)
    plot_sweep(study, tmp_path / "a.png", "made up", "train_loss")
    assert is_png(tmp_path / "a.png")
