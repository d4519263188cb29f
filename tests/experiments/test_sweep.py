"""``sweep``: the trials, one program for all of them, its records, and what it finds."""

from __future__ import annotations

import csv
import inspect
import io
import math
import signal
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kfe_optax.experiments import settings, sweep_program, sweep_records
from kfe_optax.experiments import sweep as sweep_lib
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import make_job
from kfe_optax.experiments.main import main
from kfe_optax.experiments.optimizers import METHODS
from kfe_optax.experiments.sweep import sweep
from kfe_optax.experiments.sweep_best import best_config, rank_settings, settings_table
from kfe_optax.experiments.sweep_plot import plot_sweep
from kfe_optax.experiments.sweep_program import Losses, make_program
from kfe_optax.experiments.sweep_records import Row
from kfe_optax.experiments.sweep_space import Trial, chunks, make_space, with_values
from kfe_optax.experiments.train import evaluate

from ..methods import quick

QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_config):
    """Four cheap trials of three steps."""
    tiny_config.optimizer = "sgd"
    tiny_config.steps = 3
    tiny_config.sweep.update(learning_rate="1e-4,1e-3,1e-2,3e-2", damping="", chunk=2)
    return tiny_config


def rows(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def png_size(path: Path) -> tuple[int, ...]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def made_up(losses: dict[tuple[float, ...], float], seeds: int = 1) -> list[Row]:
    trials = [(values, seed) for values in losses for seed in range(seeds)]
    return [
        Row(Trial(i, values, seed), Losses(0.7, losses[values] + 0.01 * seed, losses[values]))
        for i, (values, seed) in enumerate(trials)
    ]


# --- The program -----------------------------------------------------------------------------------


# One of every kind of optimizer in CI, the others of the table in the nightly tests.
TABLE = quick("ekfac", slow=("adam", "soap"), of=METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_trial_is_the_run_of_its_setting(tiny_config, name, monkeypatch):
    # So that the last evaluation batch is filled up.
    monkeypatch.setattr(sweep_program, "_EVALUATION_BATCH", 20)
    schedule, steps = settings.schedule, 3
    builder = getattr(settings, name)
    damped = "damping" in inspect.signature(METHODS[name].make).parameters
    if damped:
        tiny_config[name] = builder(
            schedule(0.1, "linear", end=0.02), schedule(1.0, "exponential", end=0.5), factor_update_period=2
        )
        tiny_config.sweep.update(learning_rate="x0.5,x2", damping="0.7", max_kl="0,1e-3")
    elif METHODS[name].self_tuning:
        tiny_config[name] = builder(factor_update_period=2)
        tiny_config.sweep.update(learning_rate="", damping="", others="initial_damping=x0.5,x5")
    else:
        tiny_config[name] = builder(schedule(1e-3, "linear", end=1e-4, warmup=2))
        tiny_config.sweep.update(learning_rate="x0.5,x5", damping="")
    tiny_config.optimizer = name
    tiny_config.sweep.update(seeds="3,0", examples=50)
    space, dataset = make_space(tiny_config), load(tiny_config)
    trials = space.trials
    program = make_program(tiny_config, space.fields, dataset, steps, chunk=len(trials) + 1)
    found = program.run(trials)
    assert len(found) == len(trials) == (8 if damped else 4)
    for trial, losses in ((trials[1], found[1]), (trials[-2], found[-2])):
        alone = tiny_config.copy_and_resolve_references()
        alone.seed = trial.seed
        alone[name] = with_values(alone[name], dict(zip(space.fields, trial.values, strict=True)))
        job = make_job(alone, name, dataset, steps)
        state = job.state
        fixed = dataset._replace(
            train_images=dataset.train_images[:50], train_labels=dataset.train_labels[:50]
        )
        np.testing.assert_allclose(
            losses.start_loss, evaluate(job.task, state.params, fixed)["train_loss"], rtol=1e-6
        )
        for step in range(steps):
            state, _ = job.step(state, job.batches(step))
        expected = evaluate(job.task, state.evaluated, fixed)
        np.testing.assert_allclose(losses.train_loss, expected["train_loss"], rtol=1e-5)
        np.testing.assert_allclose(losses.test_loss, expected["test_loss"], rtol=1e-5)
    # The comparison can fail: trials end differently, but where the KL clip takes the learning rate away.
    ends = np.sort([losses.train_loss for losses in found])
    assert np.sum(np.diff(ends) > 1e-4 * ends[-1]) >= (5 if damped else 3)


def test_one_compilation_serves_all_chunks_and_refreshes_stay_conditional(config, tmp_path, monkeypatch):
    lowered, built = [], []
    compile_lowered, make_optimizer = jax.stages.Lowered.compile, sweep_program.make_optimizer
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: lowered.append(self.as_text()) or compile_lowered(self)
    )
    monkeypatch.setattr(
        sweep_program, "make_optimizer", lambda *args: built.append(args) or make_optimizer(*args)
    )
    config.optimizer = "kfac"
    config.sweep.update(learning_rate="0.1:1:5", damping="1.0", max_kl="0", chunk=2)
    outcome = sweep(config, tmp_path, console=QUIET)
    assert outcome.recorded == 5
    assert len({setting.train_loss for setting in outcome.settings}) == 5
    assert len(lowered) == len(built) == 1
    assert "stablehlo.case" in lowered[0] or "stablehlo.if" in lowered[0]


def test_fields_that_fix_the_program_are_one_sentence(config, tmp_path):
    config.sweep.update(learning_rate="", others="learning_rate.warmup=1,2")
    with pytest.raises(ExperimentError, match="cannot vary within it; take it out"):
        sweep(config, tmp_path, console=QUIET)


def test_whole_numbers_and_other_fields_vary(config, tmp_path):
    config.optimizer = "kfac"
    config.sweep.update(learning_rate="", others="inverse_update_period=1:3:2; momentum=0.0,0.9")
    sweep(config, tmp_path, console=QUIET)
    found = rows(tmp_path)
    assert [row["inverse_update_period"] for row in found] == ["1.0", "1.0", "3.0", "3.0"]
    assert len({row["train_loss"] for row in found}) == 4
    best = load_config(str(tmp_path / "best.py"))
    assert isinstance(best.kfac.inverse_update_period, int)
    assert png_size(tmp_path / "sweep.png") == (1200, 900)


# --- The space -------------------------------------------------------------------------------------


def test_a_grid_is_a_product_of_values_and_seeds(config):
    config.optimizer = "kfac"
    config.sweep.update(learning_rate="x0.1:x10:3", damping="1, 2", max_kl="0", seeds="4,0,4")
    space = make_space(config)
    assert space.fields == ("learning_rate", "damping", "max_kl")
    assert [trial.index for trial in space.trials] == list(range(12))
    assert [trial.seed for trial in space.trials] == [4, 0] * 6
    np.testing.assert_allclose([trial.values[0] for trial in space.trials[::4]], [0.01, 0.1, 1.0])
    assert [trial.values[1:] for trial in space.trials[:4:2]] == [(1.0, 0.0), (2.0, 0.0)]
    assert [len(group) for group in chunks(space.trials, 5)] == [5, 5, 2]


def test_a_random_search_is_log_uniform_and_longer_ones_begin_alike(config):
    config.optimizer = "ekfac"
    config.sweep.update(
        search="random", trials=400, learning_rate="0.01:1:5", damping="x0.5,x2", others="decay=0.9:0.99"
    )
    values = np.array([trial.values for trial in make_space(config).trials])
    logs = np.log10(values[:, 0])
    assert -2 <= logs.min() < -1.95 and -0.05 < logs.max() <= 0
    assert abs(logs.mean() + 1) < 0.1
    assert set(values[:, 1]) == {0.5, 2.0}
    assert values[:, 2].min() >= 0.9 and values[:, 2].max() <= 0.99
    config.sweep.trials = 7
    np.testing.assert_array_equal([trial.values for trial in make_space(config).trials], values[:7])
    config.seed = 1
    assert make_space(config).trials[0].values[0] != values[0, 0]


def test_a_schedule_keeps_its_shape(tiny_config):
    own = settings.ekfac(settings.schedule(0.4, "exponential", end=0.1, warmup=2), 1.0)
    found = with_values(own, {"learning_rate": 0.2, "damping": 3.0, "max_kl": 0.0, "damping.end": 0.5})
    assert found.learning_rate == settings.schedule(0.2, "exponential", end=0.05, warmup=2)
    assert found.damping == settings.schedule(3.0, end=0.5)
    assert found.max_kl == 0.0
    assert own.learning_rate.value == 0.4
    traced = with_values(own, {"max_kl": jnp.array(0.0), "factor_update_period": jnp.array(2.0)})
    assert traced.max_kl == jnp.inf
    assert traced.factor_update_period.dtype == jnp.int32


def test_settings_that_an_optimizer_lacks_are_named_and_not_used(config, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    config.optimizer = "adam"
    config.sweep.update(learning_rate="x0.1:x10:2", damping="x0.1:x10:5", max_kl="1")
    sweep(config, tmp_path, console=console)
    text = console.file.getvalue()
    assert "adam has no damping; config.sweep.damping is not used" in text
    assert "adam has no max_kl" in text
    assert [float(row["learning_rate"]) for row in rows(tmp_path)] == pytest.approx([0.001, 0.1])
    assert png_size(tmp_path / "sweep.png") == (1200, 900)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search": "bayes"}, "config.sweep.search is 'bayes'; choose one of grid, random"),
        ({"learning_rate": ""}, "names no field to vary"),
        ({"learning_rate": "0.1,fast"}, "write numbers with commas"),
        ({"learning_rate": ","}, "write numbers with commas"),
        ({"learning_rate": "0.1:1"}, "a range LOW:HIGH:COUNT"),
        ({"learning_rate": "1:0.1:3"}, "0 < LOW <= HIGH"),
        ({"learning_rate": "0.1:1:0"}, "a range LOW:HIGH:COUNT"),
        ({"learning_rate": "0.1:inf:3"}, "a range LOW:HIGH:COUNT"),
        ({"learning_rate": "1:0.1", "search": "random"}, "a range LOW:HIGH with"),
        ({"learning_rate": "0.1:1", "search": "random", "trials": 0}, "config.sweep.trials is 0"),
        ({"learning_rate": "0,0.1"}, "goes down to 0; its values must be positive"),
        ({"max_kl": "-1"}, "values must not be negative"),
        ({"seeds": "0,one"}, "config.sweep.seeds is '0,one'"),
        ({"seeds": "-1"}, "config.sweep.seeds is '-1'"),
        ({"others": "momentum"}, "write FIELD=VALUES"),
        ({"others": "momentum=1; momentum=2"}, "set its values in one place"),
        ({"others": "max_kl=1"}, "set its values in config.sweep.max_kl"),
        ({"others": "speed=1"}, "the field 'speed', which the optimizer's settings do not have"),
        ({"others": "momentum.end=1"}, "the field 'momentum.end'"),
        ({"others": "max_dim=4,8"}, "'max_dim' fixes the shape of the program"),
        ({"others": "nesterov=0,1"}, "varies numbers, and 'nesterov' is False"),
        ({"others": "fisher=1"}, "'fisher' fixes the shape of the program"),
        ({"steps": -1}, "cannot be negative"),
        ({"examples": -1}, "cannot be negative"),
        ({"chunk": 0}, "config.sweep.chunk must be at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(config, tmp_path, changes, sentence):
    config.optimizer = "kfac"
    config.kfac.max_dim = 8
    config.sweep.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        sweep(config, tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_scaled_or_searched_is_one_sentence(config):
    config.sgd.learning_rate.kind = "exponential"
    with pytest.raises(ExperimentError, match="from 0.0001 to 0; both must be positive"):
        make_space(config)
    config.sgd.learning_rate.value = 0.0
    with pytest.raises(ExperimentError, match="starts at 0 and cannot be scaled"):
        make_space(config)
    del config["sweep"]
    with pytest.raises(ExperimentError, match="has no 'sweep'"):
        make_space(config)


# --- The records -----------------------------------------------------------------------------------


def test_an_interrupted_sweep_resumes_with_the_trials_that_are_missing(config, tmp_path, monkeypatch):
    sweep(config, tmp_path / "whole", console=QUIET)
    write = sweep_lib.SweepRecords.write

    def signaled(self, found):
        write(self, found)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sweep_lib.SweepRecords, "write", signaled)
    part = sweep(config, tmp_path / "parts", console=QUIET)
    assert part.interrupted
    assert part.recorded == 2 == len(rows(tmp_path / "parts"))
    assert not (tmp_path / "parts" / "best.py").exists()
    monkeypatch.undo()
    # As after a kill within a write: a row that reads well, but for its end.
    with (tmp_path / "parts" / "sweep.csv").open("a") as file:
        file.write("2,0.01,0,finished,0.7,0.5,0.")
    ran = []
    run_chunks = sweep_lib._run
    monkeypatch.setattr(
        sweep_lib, "_run", lambda *args: ran.extend(trial.index for trial in args[3]) or run_chunks(*args)
    )
    outcome = sweep(config, tmp_path / "parts", resume=True, console=QUIET)
    assert ran == [2, 3]
    assert not outcome.interrupted
    for name in ("sweep.csv", "best.py"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    # Nothing is left to run, and nothing changes.
    again = sweep(config, tmp_path / "parts", resume=True, console=QUIET)
    assert ran == [2, 3]
    assert again == outcome


def test_a_failure_in_a_chunk_leaves_the_chunks_before(config, tmp_path, monkeypatch):
    write = sweep_lib.SweepRecords.write

    def failing(self, found):
        if self.rows:
            raise KeyboardInterrupt
        write(self, found)

    monkeypatch.setattr(sweep_lib.SweepRecords, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, tmp_path, console=QUIET)
    assert [row["trial"] for row in rows(tmp_path)] == ["0", "1"]


def test_a_random_search_can_be_extended_in_other_chunks(config, tmp_path):
    config.sweep.update(search="random", learning_rate="1e-4:1e-1", trials=2)
    sweep(config, tmp_path, console=QUIET)
    before = rows(tmp_path)
    config.sweep.update(trials=3, chunk=1)
    assert sweep(config, tmp_path, resume=True, console=QUIET).recorded == 3
    assert rows(tmp_path)[:2] == before


def test_the_file_of_another_sweep_is_refused(config, tmp_path):
    sweep(config, tmp_path, console=QUIET)
    before = (tmp_path / "sweep.csv").read_bytes()

    def refused(sentence, resume=True):
        with pytest.raises(ExperimentError, match=sentence):
            sweep(config, tmp_path, resume=resume, console=QUIET)
        assert (tmp_path / "sweep.csv").read_bytes() == before

    refused("already holds a sweep; add --resume", resume=False)
    config.kfac.momentum = 0.3  # not this sweep's optimizer
    sweep(config, tmp_path, resume=True, console=QUIET)
    config.sgd.momentum = 0.3
    refused(r"made with config.sgd.momentum = 0.9, and it is 0.3 now")
    config.sgd.momentum = 0.9
    config.sweep.learning_rate = "1e-4"
    refused(r"made with config.sweep.learning_rate = '1e-4,1e-3,1e-2,3e-2', and")
    config.sweep.learning_rate = "1e-4,1e-3,1e-2,3e-2"
    archive = dict(np.load(config.data_dir))
    archive["x_train"] = archive["x_train"][::-1]
    np.savez(tmp_path / "other.npz", **archive)
    own, config.data_dir = config.data_dir, str(tmp_path / "other.npz")
    refused("made with other training images")
    config.data_dir = own
    (tmp_path / "sweep.json").write_text("{}")
    refused("is missing or damaged")


def test_a_diverged_trial_is_recorded_and_never_best(config, tmp_path):
    config.sweep.update(learning_rate="1e30,1e-3")
    outcome = sweep(config, tmp_path, console=QUIET)
    assert [row["outcome"] for row in rows(tmp_path)] == ["diverged", "finished"]
    assert [setting.diverged for setting in outcome.settings] == [False, True]
    assert load_config(str(tmp_path / "best.py")).sgd.learning_rate.value == 1e-3
    resumed = sweep(config, tmp_path, resume=True, console=QUIET)
    assert resumed.recorded == 2
    assert resumed.settings[0] == outcome.settings[0]


def test_a_sweep_that_only_diverges_has_no_best(config, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    config.sweep.update(learning_rate="1e30,1e31")
    sweep(config, tmp_path, console=console)
    assert "every setting diverged" in console.file.getvalue()
    assert not (tmp_path / "best.py").exists()
    assert png_size(tmp_path / "sweep.png") == (1200, 900)


# --- The results -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_ends_with_a_table_a_picture_and_a_config_that_trains(tiny_config_file, tmp_path, capsys):
    folder = tmp_path / "found"
    arguments = [
        "sweep",
        f"--config={tiny_config_file}",
        "--config.optimizer=kfac",
        "--config.sweep.learning_rate=0.03,0.3",
        "--config.sweep.damping=0.1:10:2",
        "--config.sweep.steps=3",
        f"--workdir={folder}",
    ]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4 trials of 3 steps over learning_rate, damping" in text
    assert "step 12/12" in text
    assert "4 settings, 0 of them diverged" in text
    assert png_size(folder / "sweep.png") == (1200, 900)
    best = min(rows(folder), key=lambda row: float(row["train_loss"]))
    assert f"{float(best['train_loss']):.5f}" in text
    found = load_config(str(folder / "best.py"))
    assert found.optimizer == "kfac"
    assert found.steps == 3
    assert found.model.sizes == (64, 6, 64)
    assert found.kfac.learning_rate.value == float(best["learning_rate"])
    assert main(["train", f"--config={folder / 'best.py'}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert f"{float(best['train_loss']):.5f}" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "4 of 4 trials are already recorded" in capsys.readouterr().out


def test_an_interrupted_command_says_how_to_go_on(tiny_config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write = sweep_records.SweepRecords.write
    monkeypatch.setattr(
        sweep_records.SweepRecords,
        "write",
        lambda self, found: (write(self, found), signal.raise_signal(signal.SIGINT)),
    )
    arguments = ["sweep", f"--config={tiny_config_file}", "--config.optimizer=sgd", "--config.sweep.chunk=2"]
    assert main(arguments) == 130
    assert "Interrupted after 2 trials; the same command with --resume" in capsys.readouterr().out
    assert len(rows(tmp_path / "runs" / "tiny-sgd-sweep")) == 2


def test_help_explains_the_sweep(capsys):
    assert main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "sweep.csv",
        "--config.sweep.others",
        "log-uniform",
        "best.py",
        *settings.base_config("any").sweep,
    ):
        assert word in text


def test_settings_are_ranked_by_their_mean_over_seeds(config):
    trials = made_up({(1.0, 0.1): 0.3, (2.0, 0.1): 0.2, (3.0, 0.1): math.nan}, seeds=3)
    ranked = rank_settings(trials)
    assert [setting.values[0] for setting in ranked] == [2.0, 1.0, 3.0]
    assert ranked[0].train_loss == pytest.approx(0.21)
    # One seed that diverges spoils its setting.
    spoiled = trials[3]._replace(losses=Losses(0.7, math.inf, 0.2))
    assert rank_settings([*trials[:3], spoiled, *trials[4:]])[0].values[0] == 1.0
    console = Console(width=80, file=io.StringIO())
    console.print(settings_table(ranked, ("learning_rate", "damping"), "made up", "cross-entropy"))
    text = " ".join(console.file.getvalue().split())
    assert "0.21000" in text and "Means over 3 seeds" in text and "1 of them diverged" in text
    best = best_config(config, ("learning_rate", "momentum"), ranked[0], steps=4)
    assert (best.sgd.learning_rate.value, best.sgd.momentum, best.steps) == (2.0, 0.1, 4)


@pytest.mark.parametrize("diverged", [False, True])
@pytest.mark.parametrize("grid", [False, True])
def test_the_picture_of_a_plane(tmp_path, grid, diverged):
    pairs = [(x, y) for x in (0.01, 0.1, 1.0) for y in (0.1, 1.0)] if grid else [(0.02, 3.0), (0.5, 0.1)]
    losses = {pair: math.nan if diverged and pair[0] < 0.1 else pair[0] + 5 * pair[1] for pair in pairs}
    fields = ("learning_rate", "damping")
    plot_sweep(rank_settings(made_up(losses)), fields, tmp_path / "a.png", "made up", "loss")
    assert png_size(tmp_path / "a.png") == (1200, 900)
