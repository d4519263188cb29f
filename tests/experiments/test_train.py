"""``train``: records, checkpoints, bit-exact resumption, and what an interruption leaves."""

from __future__ import annotations

import csv
import signal
import struct

import jax
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

import kfe_optax as kfe
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.records import FIELDS, Recorder
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.train import train

from .conftest import config_of


@pytest.fixture
def console():
    return Console(quiet=True)


def rows(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(workdir):
    """All that a run has measured but times, as text: equal text is equal bits."""
    names = [name for name in FIELDS if "second" not in name]
    return [[row[name] for name in names] for row in rows(workdir)]


def loss_curve(workdir):
    """Steps and losses as text, from the first step on."""
    return [(row["step"], row["loss"]) for row in rows(workdir) if row["step"] != "0"]


def assert_same_state(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def kfac_run(tiny_npz, tmp_path_factory):
    """Nine steps of K-FAC, two epochs and a bit, with an evaluation after each epoch."""
    config, folder = config_of(tiny_npz), tmp_path_factory.mktemp("kfac")
    config.update(optimizer="kfac", steps=9)
    return train(config, folder, console=Console(quiet=True)), folder


def test_a_run_leaves_records_checkpoints_and_measures(kfac_run):
    outcome, folder = kfac_run
    found = rows(folder)
    assert [row["step"] for row in found] == [str(step) for step in range(10)]
    assert [float(row["epoch"]) for row in found] == [step / 4 for step in range(10)]
    losses = [float(row["loss"]) for row in found[1:]]
    assert losses[-1] < losses[0]
    # At the start, after each epoch of four steps, and at the end.
    for measure in ("train_loss", "train_squared_error", "test_loss", "test_squared_error"):
        assert [row["step"] for row in found if row[measure]] == ["0", "4", "8", "9"]
    assert float(found[-1]["train_loss"]) < float(found[0]["train_loss"])
    assert not any(row["validation_loss"] or row["train_accuracy"] for row in found)
    assert float(found[-1]["test_loss"]) == outcome.measures["test_loss"]
    assert outcome.measures["train_loss"] < losses[0]
    assert set(outcome.measures) == {f"{s}_{m}" for s in ("train", "test") for m in ("loss", "squared_error")}
    last = found[-1]
    assert float(last["damping"]) > 0.0
    assert 0.0 < float(last["kl_factor"]) <= 1.0
    assert int(last["last_refresh"]) == 8
    assert int(last["failures"]) == int(last["nonfinite"]) == 0
    assert (folder / "checkpoints" / "9").is_dir()
    (board,) = (folder / "tensorboard").glob("events*")
    assert b"run/test_loss" in board.read_bytes() and b"final/test_loss" in board.read_bytes()
    assert "optimizer: kfac" in (folder / "config.txt").read_text()


@pytest.mark.parametrize(
    ("every", "evaluated"), [("end", ["6"]), ("3 steps", ["0", "3", "6"]), ("2 epochs", ["0", "5", "6"])]
)
def test_when_is_evaluated(tiny_config, tmp_path, console, every, evaluated):
    """With rows of their own, whatever is logged."""
    tiny_config.update(optimizer="sgd", log_every=5, evaluate_every=every)
    tiny_config.sgd.batch_size = 25  # two steps an epoch, of which the second one is not full
    if every == "2 epochs":
        tiny_config.sgd.batch_size, evaluated = 36, ["0", "4", "6"]
    train(tiny_config, tmp_path / "run", console=console)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if row["test_loss"]] == evaluated
    assert [row["step"] for row in found] == sorted({*evaluated, "5", "6"})


@pytest.mark.parametrize("every", ["", "epochs", "0 steps", "-1 steps", "1.5 epochs", "3 seconds", "often"])
def test_when_cannot_be_evaluated(tiny_config, tmp_path, console, every):
    tiny_config.update(optimizer="sgd", evaluate_every=every)
    with pytest.raises(ExperimentError, match=rf"config.evaluate_every is '{every}'; give a number above 0"):
        train(tiny_config, tmp_path / "run", console=console)


def test_tensorboard_hides_what_followed_the_checkpoint_and_not_its_own_step(tmp_path):
    with Recorder(tmp_path, resume_at=7):
        pass
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [event.step for event in events if event.HasField("session_log")] == [8]


def test_averaged_parameters_are_evaluated_where_there_are_any(tiny_config, tmp_path, console):
    tiny_config.update(optimizer="adam", averaging=0.9)
    tiny_config.compare.optimizers = "adam"
    outcome = train(tiny_config, tmp_path / "run", console=console)
    state, dataset = outcome.state, load(tiny_config)
    task = make_task(tiny_config, dataset)
    average = kfe.averaged_parameters(state.opt_state, state.params)
    images, labels = dataset.splits()["test"]
    assert outcome.measures["test_loss"] == task.evaluate(average, images, labels)["loss"]
    assert outcome.measures["test_loss"] != task.evaluate(state.params, images, labels)["loss"]
    run = compare(tiny_config, tmp_path, console)[0]
    assert run.measures == outcome.measures


@pytest.mark.parametrize(
    "optimizer",
    [
        "kfac",
        pytest.param("kfac_adaptive", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("adam", "ekfac")),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tiny_config, tmp_path, console, monkeypatch, optimizer, kfac_run
):
    tiny_config.update(optimizer=optimizer, steps=9)  # the resumption falls between two refreshes
    whole, folder = kfac_run
    if optimizer != "kfac":
        whole, folder = train(tiny_config, tmp_path / "whole", console=console), tmp_path / "whole"
    original = Batches.__call__

    def interrupted_at_five(self, step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(Batches, "__call__", interrupted_at_five)
    part = train(tiny_config, tmp_path / "parts", console=console)
    assert part.interrupted
    assert part.step == 5
    assert not part.measures
    monkeypatch.undo()
    resumed = train(tiny_config, tmp_path / "parts", resume=True, console=console)

    assert not resumed.interrupted
    assert_same_state(resumed.state, whole.state)
    assert resumed.measures == whole.measures
    assert losses(tmp_path / "parts") == losses(folder)


def test_a_signal_between_two_steps_leaves_a_checkpoint(tiny_config, tmp_path, console, monkeypatch):
    """Also one that comes when the end of a step has been asked for signals for the last time."""
    answers = iter([False] * 2)
    monkeypatch.setattr(Interruption, "__init__", lambda self: setattr(self, "_previous", {}))
    monkeypatch.setattr(Interruption, "requested", property(lambda self: next(answers, True)), raising=False)
    tiny_config.optimizer = "adam"
    outcome = train(tiny_config, tmp_path / "run", console=console)
    assert outcome.interrupted
    assert (tmp_path / "run" / "checkpoints" / str(outcome.step)).is_dir()


def test_a_signal_ends_the_run_after_the_current_step(tiny_config, tmp_path, console, monkeypatch):
    tiny_config.optimizer = "adam"
    tiny_config.log_every = 2
    train(tiny_config, tmp_path / "whole", console=console)
    original = Batches.__call__
    previous = signal.getsignal(signal.SIGINT)
    for number, at in ((signal.SIGINT, 2), (signal.SIGTERM, 4)):

        def signaled(self, step, number=number, at=at):
            if step == at:
                signal.raise_signal(number)
            return original(self, step)

        monkeypatch.setattr(Batches, "__call__", signaled)
        outcome = train(tiny_config, tmp_path / "parts", resume=True, console=console)
        assert outcome.interrupted
        assert outcome.step == at + 1
        assert signal.getsignal(signal.SIGINT) == previous
    monkeypatch.undo()
    train(tiny_config, tmp_path / "parts", resume=True, console=console)
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")


def test_rows_after_the_checkpoint_are_written_once(tiny_config, tmp_path, console):
    tiny_config.optimizer = "adam"
    tiny_config.checkpoint_every = 4
    train(tiny_config, tmp_path / "run", console=console)
    # As after a kill between a checkpoint and the end, with a row cut short.
    (tmp_path / "run" / "checkpoints" / "6").rename(tmp_path / "lost")
    before = loss_curve(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("7,1,0.")
    train(tiny_config, tmp_path / "run", resume=True, console=console)
    assert loss_curve(tmp_path / "run") == before


def test_a_finished_run_can_be_extended(tiny_config, tmp_path, console):
    tiny_config.optimizer = "sgd"
    train(tiny_config, tmp_path / "run", console=console)
    again = train(tiny_config, tmp_path / "run", resume=True, console=console)
    assert again.step == 6
    assert again.measures
    tiny_config.steps = 8
    longer = train(tiny_config, tmp_path / "run", resume=True, console=console)
    assert longer.step == 8
    assert [step for step, _ in loss_curve(tmp_path / "run")] == [str(step) for step in range(1, 9)]


def test_resume_without_a_checkpoint_starts_the_run(tiny_config, tmp_path, console):
    tiny_config.optimizer = "sgd"
    assert train(tiny_config, tmp_path / "run", resume=True, console=console).step == 6


def test_a_run_is_not_overwritten_and_its_settings_hold(tiny_config, tmp_path, console):
    tiny_config.optimizer = "adam"
    train(tiny_config, tmp_path / "run", console=console)
    with pytest.raises(ExperimentError, match="already holds a run; add --resume"):
        train(tiny_config, tmp_path / "run", console=console)
    tiny_config.ekfac.momentum = 0.5  # not this run's optimizer
    train(tiny_config, tmp_path / "run", resume=True, console=console)
    tiny_config.adam.learning_rate.value = 0.5
    with pytest.raises(ExperimentError, match=r"config.adam.learning_rate.value = 0.01, and"):
        train(tiny_config, tmp_path / "run", resume=True, console=console)
    tiny_config.adam.learning_rate.value = 1e-2
    tiny_config.seed = 1
    with pytest.raises(ExperimentError, match=r"config.seed = 0, and it is 1 now"):
        train(tiny_config, tmp_path / "run", resume=True, console=console)


def test_a_resumed_run_needs_the_same_data(tiny_config, tmp_path, console):
    tiny_config.optimizer = "sgd"
    train(tiny_config, tmp_path / "run", console=console)
    archive = dict(np.load(tiny_config.data_dir))
    archive["x_train"] = archive["x_train"][::-1]
    np.savez(tmp_path / "other.npz", **archive)
    tiny_config.data_dir = str(tmp_path / "other.npz")
    with pytest.raises(ExperimentError, match="made with other training images"):
        train(tiny_config, tmp_path / "run", resume=True, console=console)


def test_seeds_differ_and_repeat(tiny_config, tmp_path, console):
    tiny_config.optimizer = "adam"
    curves = []
    for index, seed in enumerate((0, 0, 1)):
        tiny_config.seed = seed
        train(tiny_config, tmp_path / str(index), console=console)
        curves.append(loss_curve(tmp_path / str(index)))
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("field", ["steps", "log_every", "checkpoint_every", "evaluate_examples"])
def test_counts_are_positive(tiny_config, tmp_path, console, field):
    tiny_config[field] = 0
    with pytest.raises(ExperimentError, match=f"config.{field} is 0; give a whole number of at least 1"):
        train(tiny_config, tmp_path / "run", console=console)


def test_a_folder_that_cannot_be_made_is_one_sentence(tiny_config, tmp_path, console):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="Cannot write to --workdir"):
        train(tiny_config, tmp_path / "file" / "run", console=console)
