"""The training job on several devices: the run of one device, in every mode; checkpoints that fit any number of them."""

from __future__ import annotations

import csv
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from kfe_optax.experiments import settings
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.data import load
from kfe_optax.experiments.diagnose import diagnose
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import make_job
from kfe_optax.experiments.main import main
from kfe_optax.experiments.parallel import Share, join_processes
from kfe_optax.experiments.sweep import sweep
from kfe_optax.experiments.train import train

from ..methods import quick
from . import normed

SEVERAL = ("shard_map", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("sharded", "pmap")))
# Where one of them will do, the others are for when there is time.
MOSTLY_ONE = ("sharded", *(pytest.param(mode, marks=pytest.mark.nightly) for mode in ("pmap", "shard_map")))
QUIET = Console(quiet=True)


def run(config, optimizer, steps=3):
    """The losses of some steps, the placed state after them, and that state as one device has it."""
    job = make_job(config, optimizer, load(config), steps)
    state, losses = job.state, []
    for step in range(steps):
        state, loss = job.step(state, job.batches(step))
        losses.append(float(loss))
    return losses, state, jax.device_get(job.devices.local(state))


def on(config, mode, count=4):
    config.devices.update(mode=mode, count=count)
    return config


def loss_curve(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file) if row["step"] != "0"]


def assert_close(found, expected):
    for first, second in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(second).max(initial=1e-30)
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-4 * scale)


# --- The same run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_one_device():
    """The run of one device, once for all modes."""
    known: dict = {}

    def found(config, optimizer):
        if optimizer not in known:
            config.devices.mode = "one"
            known[optimizer] = run(config, optimizer)
        return known[optimizer]

    return found


@pytest.mark.parametrize("mode", SEVERAL)
@pytest.mark.parametrize("optimizer", quick("kfac", of=["sgd", "kfac", "ekfac"]))
def test_every_mode_makes_the_run_of_one_device(tiny_config, of_one_device, mode, optimizer):
    losses, _, expected = of_one_device(tiny_config, optimizer)
    found, placed, state = run(on(tiny_config, mode), optimizer)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_close(state.params, expected.params)
    assert state.step == 3
    for leaf in jax.tree.leaves(placed):
        assert len(leaf.sharding.device_set) == 4
    # Every device has taken the same step.
    for leaf in jax.tree.leaves(placed.params):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize(
    ("mode", "distribute"),
    [
        ("sharded", "inverses"),
        *(
            pytest.param(mode, distribute, marks=pytest.mark.nightly)
            for mode, distribute in (
                ("sharded", "inverses_and_apply"),
                ("pmap", "inverses"),
                ("shard_map", "inverses"),
            )
        ),
    ],
)
def test_divided_linear_algebra_makes_the_run_of_one_device(tiny_config, of_one_device, mode, distribute):
    losses, _, expected = of_one_device(tiny_config, "kfac")
    tiny_config.devices.distribute = distribute
    found, _, state = run(on(tiny_config, mode), "kfac")
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_close(state.params, expected.params)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", SEVERAL)
def test_an_optimizer_that_tunes_itself_makes_the_run_of_one_device(tiny_config, of_one_device, mode):
    losses, _, expected = of_one_device(tiny_config, "kfac_adaptive")
    found, _, state = run(on(tiny_config, mode, 2), "kfac_adaptive")
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    assert_close(state.params, expected.params)


@pytest.fixture
def with_norm(tiny_config, monkeypatch):
    return normed.use(tiny_config, monkeypatch, momentum=0.5)


@pytest.mark.parametrize("mode", MOSTLY_ONE)
@pytest.mark.parametrize("optimizer", ["adam", pytest.param("kfac", marks=pytest.mark.nightly)])
def test_running_statistics_are_the_mean_over_devices(with_norm, mode, optimizer):
    _, _, one = run(with_norm, optimizer, steps=1)
    _, _, state = run(on(with_norm, mode), optimizer, steps=1)
    found, expected = (s.model_state["batch_stats"]["norm"] for s in (state, one))
    # The mean over the devices' examples is that of the batch; the mean of the devices' variances is not.
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-5, atol=1e-6)
    if mode == "sharded":
        np.testing.assert_allclose(found["var"], expected["var"], rtol=1e-5)
    else:
        assert (found["var"] < expected["var"]).all()


@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=pytest.mark.nightly)])
def test_devices_drop_different_units(with_norm, mode):
    """Of examples that are all alike each device's loss would be the same, were its dropout: then two devices are one."""
    with_norm.model.update(batch_norm=False, dropout=0.5)
    data = load(with_norm)
    alike = data._replace(train_images=np.ones_like(data.train_images), train_labels=0 * data.train_labels)

    def loss(mode, count, batch_size):
        with_norm.batch_size = batch_size
        job = make_job(on(with_norm, mode, count), "sgd", alike, 1)
        return float(job.step(job.state, job.batches(0))[1])

    assert loss(mode, 1, 4) == pytest.approx(loss(mode, 1, 4))
    assert abs(loss(mode, 2, 8) - loss(mode, 1, 4)) > 1e-4


# --- Each process's part of the data ---------------------------------------------------------------


@pytest.mark.parametrize("augment", ["", "crop,flip"])
def test_the_shares_of_a_batch_make_the_batch(augment):
    generator = np.random.default_rng(0)
    images, labels = generator.uniform(1, 2, (48, 36)).astype(np.float32), np.arange(48, dtype=np.int32)
    options = {"batch_size": 12, "seed": 3, "augment": augment, "image_shape": (6, 6)}
    whole = Batches(images, labels, **options)
    # Of three devices the first process has one and the second two.
    shares = [Batches(images, labels, **options, share=share) for share in (Share(0, 1, 3), Share(1, 3, 3))]
    for step in (0, 5):
        parts = [part(step) for part in shares]
        assert [len(part["label"]) for part in parts] == [4, 8]
        for name, expected in whole(step).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), expected)


# --- Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MOSTLY_ONE)
def test_a_resumed_run_on_several_devices_equals_an_uninterrupted_one_bit_for_bit(
    tiny_config, tmp_path, mode
):
    config = on(tiny_config, mode)
    config.optimizer = "adam" if mode == "sharded" else "kfac"
    whole = train(config, tmp_path / "whole", console=QUIET)
    config.steps = 3
    train(config, tmp_path / "parts", console=QUIET)
    config.steps = 6
    resumed = train(config, tmp_path / "parts", resume=True, console=QUIET)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert resumed.measures == whole.measures
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")


@pytest.mark.nightly
def test_a_run_moves_from_devices_to_devices(tiny_config, tmp_path):
    """A checkpoint fits any mode and any number of devices."""
    tiny_config.optimizer = "kfac"
    whole = train(tiny_config, tmp_path / "whole", console=QUIET)
    places = (("sharded", 4), ("one", 0), ("pmap", 2), ("shard_map", 8), ("sharded", 2), ("one", 0))
    for steps, place in enumerate(places, 1):
        tiny_config.steps = steps
        outcome = train(on(tiny_config, *place), tmp_path / "moved", resume=True, console=QUIET)
    assert_close(outcome.state.params, jax.device_get(whole.state.params))
    assert outcome.measures["test_loss"] == pytest.approx(whole.measures["test_loss"], rel=1e-4)
    assert [step for step, _ in loss_curve(tmp_path / "moved")] == [str(step) for step in range(1, 7)]


def test_ctrl_c_leaves_a_checkpoint_of_several_devices(tiny_config, tmp_path, monkeypatch):
    tiny_config.optimizer = "adam"
    original = Batches.__call__

    def interrupted_at_two(self, step):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    train(tiny_config, tmp_path / "whole", console=QUIET)
    monkeypatch.setattr(Batches, "__call__", interrupted_at_two)
    part = train(on(tiny_config, "pmap"), tmp_path / "parts", console=QUIET)
    assert part.interrupted and part.step == 2
    monkeypatch.undo()
    on(tiny_config, "one", 0)
    train(tiny_config, tmp_path / "parts", resume=True, console=QUIET)
    found, expected = (
        [float(loss) for _, loss in loss_curve(tmp_path / name)] for name in ("parts", "whole")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- Other commands --------------------------------------------------------------------------------


@pytest.mark.nightly
def test_compare_runs_on_several_devices(tiny_config, tmp_path):
    tiny_config.compare.optimizers = "adam,kfac"
    one = compare(tiny_config, tmp_path, QUIET)
    several = compare(on(tiny_config, "pmap"), tmp_path, QUIET)
    for first, second in zip(one, several, strict=True):
        assert second.measures["train_loss"] == pytest.approx(first.measures["train_loss"], rel=1e-4)
        assert second.rows[0]["train_loss"] == pytest.approx(first.rows[0]["train_loss"], rel=1e-6)


# --- What cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "tpu"}, "choose one of one, sharded, pmap, shard_map"),
        ({"mode": "one", "count": 2}, "config.devices.count is 2 and config.devices.mode is 'one'"),
        ({"mode": "pmap", "count": 9}, "config.devices.count is 9 and there are 8 devices"),
        ({"mode": "pmap", "count": -1}, "config.devices.count is -1"),
        ({"mode": "sharded", "count": 5}, "A batch has 16 examples, which 5 devices cannot share evenly"),
        ({"mode": "sharded", "distribute": "all"}, "choose one of none, inverses, inverses_and_apply"),
    ],
)
def test_devices_that_cannot_be_are_one_sentence(tiny_config, changes, sentence):
    tiny_config.devices.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        make_job(tiny_config, "adam", load(tiny_config), 2)


@pytest.mark.parametrize("command", [compare, sweep, diagnose])
def test_commands_of_one_process_refuse_several(tiny_config, tmp_path, command):
    tiny_config.distributed = True
    with pytest.raises(ExperimentError, match=f"'{command.__name__}' runs in one process"):
        command(tiny_config, tmp_path, console=QUIET)


def test_a_sweep_runs_on_several_devices(tiny_config, tmp_path):
    tiny_config.update(optimizer="sgd", steps=2)
    tiny_config.sweep.space = f"{tiny_config.optimizer}.learning_rate=1e-3,1e-2"
    alone = sweep(tiny_config, tmp_path / "one", console=QUIET)
    several = sweep(on(tiny_config, "pmap"), tmp_path / "several", console=QUIET)
    for one, other in zip(alone.trials, several.trials, strict=True):
        assert one.user_attrs == pytest.approx(other.user_attrs, rel=1e-5)


def test_processes_that_cannot_be_joined_are_one_sentence(tiny_config):
    tiny_config.distributed = True
    with pytest.raises(ExperimentError, match="config.devices.mode is 'one'; set the mode to 'sharded'"):
        join_processes(tiny_config)
    on(tiny_config, "sharded", 0)
    tiny_config.cluster.update(coordinator="127.0.0.1:1", process_id=2, num_processes=2)
    with pytest.raises(ExperimentError, match="process_id is 2 of config.cluster.num_processes 2"):
        join_processes(tiny_config)


def test_devices_are_set_on_the_command_line(tiny_config_file, tmp_path, capsys):
    arguments = ["train", f"--config={tiny_config_file}", "--config.optimizer=sgd", "--config.steps=2"]
    flags = ["--config.devices.mode=shard_map", "--config.devices.count=2", f"--workdir={tmp_path / 'run'}"]
    assert main([*arguments, *flags]) == 0
    assert "sgd  step 2/2" in capsys.readouterr().out
    assert "mode: shard_map" in (tmp_path / "run" / "config.txt").read_text()


def test_settings_of_several_devices_are_in_every_config():
    config = settings.base_config("any")
    assert config.devices.to_dict() == {"mode": "one", "count": 0, "distribute": "none"}
    assert not config.distributed
