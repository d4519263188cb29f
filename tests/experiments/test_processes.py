"""Real processes of two devices each: the run of one process, what a kill loses, checkpoints that fit any number of them."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.train import train
from tests.experiments.conftest import TINY_CONFIG

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
STEPS, SAVED = 24, 5
FLAGS = ("--config.optimizer=kfac", f"--config.checkpoint_every={SAVED}")


def command(config, workdir, *flags):
    script = (sys.executable, str(ROOT / "benchmarks" / "processes.py"), "--processes", "2", "--devices", "2")
    return [*script, "--config", str(config), "--workdir", str(workdir), *FLAGS, *flags]


def environment():
    """Of the processes, which choose their own number of devices."""
    return os.environ | {"OPENBLAS_NUM_THREADS": "1"}


def in_two_processes(config, workdir, *flags):
    found = subprocess.run(
        command(config, workdir, *flags), capture_output=True, text=True, timeout=300, env=environment()
    )
    return found.returncode, found.stdout, found.stderr


def in_one_process(config_file, workdir, steps, mode, count, resume=False):
    config = load_config(str(config_file))
    config.update(optimizer="kfac", checkpoint_every=SAVED, steps=steps)
    config.devices.update(mode=mode, count=count)
    return train(config, workdir, resume=resume, console=QUIET)


def rows(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"] != "0"]


def losses(workdir):
    """As text: equal text is equal bits."""
    return [row["loss"] for row in rows(workdir)]


def assert_same_run(first, second):
    """The runs of two programs, whose sums are rounded in another order."""
    found, expected = (np.array(losses(run), float) for run in (first, second))
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def module_config(tiny_npz, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY_CONFIG.format(data_dir=str(tiny_npz)))
    return path


@pytest.fixture(scope="module")
def whole(module_config, tmp_path_factory):
    """An uninterrupted run in two processes: its folder, and what the first process said."""
    folder = tmp_path_factory.mktemp("whole")
    status, said, errors = in_two_processes(module_config, folder, f"--config.steps={STEPS}")
    assert status == 0, errors
    return folder, said


@pytest.fixture(scope="module")
def killed(module_config, tmp_path_factory):
    """What a run leaves of which one process was killed after 12 steps."""
    folder = tmp_path_factory.mktemp("killed")
    flags = (f"--config.steps={STEPS}", "--kill-after", "12")
    status, _, errors = in_two_processes(module_config, folder, *flags)
    assert status == 1
    assert "process 1 died with status -9; all are ended." in errors
    return folder


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(module_config, whole, tmp_path):
    folder, said = whole
    outcome = in_one_process(module_config, tmp_path / "one", STEPS, "one", 0)
    assert_same_run(folder, tmp_path / "one")
    in_one_process(module_config, tmp_path / "four", STEPS, "sharded", 4)
    assert_same_run(folder, tmp_path / "four")
    # The first process alone talks and writes.
    assert said.count("results ") == said.count(f"kfac  step {STEPS}/{STEPS}") == 1
    assert f"{outcome.measures['test_loss']:.3f}" in said
    assert [int(row["step"]) for row in rows(folder)] == list(range(1, STEPS + 1))
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert checkpoints(folder) == [20, STEPS]


@pytest.mark.slow
def test_a_killed_run_loses_nothing_up_to_its_last_checkpoint(module_config, whole, killed, tmp_path):
    folder = tmp_path / "restarted"
    shutil.copytree(killed, folder)
    before, saved = losses(folder), max(checkpoints(folder))
    assert SAVED <= saved < STEPS
    assert len(before) >= 12
    status, said, errors = in_two_processes(module_config, folder, f"--config.steps={STEPS}", "--resume")
    assert status == 0, errors
    assert f"resumed    at step {saved}" in said
    after = losses(folder)
    assert after[: len(before)] == before
    assert after == losses(whole[0])


@pytest.mark.nightly
@pytest.mark.parametrize(("mode", "count"), [("one", 0), ("shard_map", 8)])
def test_two_processes_go_on_as_one(module_config, whole, killed, tmp_path, mode, count):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    outcome = in_one_process(module_config, folder, STEPS, mode, count, resume=True)
    assert_same_run(folder, whole[0])
    assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(outcome.state))


@pytest.mark.nightly
def test_one_process_goes_on_as_two(module_config, whole, tmp_path):
    in_one_process(module_config, tmp_path, 7, "sharded", 4)
    status, said, errors = in_two_processes(
        module_config, tmp_path, f"--config.steps={STEPS}", "--config.devices.mode=shard_map", "--resume"
    )
    assert status == 0, errors
    assert "resumed    at step 7" in said
    assert_same_run(tmp_path, whole[0])


@pytest.mark.nightly
def test_a_signal_ends_both_after_the_same_step(module_config, tmp_path):
    """With a checkpoint that resumes, although the signal finds them at different steps."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(module_config, workdir, "--config.steps=1000000", "--config.log_every=3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        deadline = time.monotonic() + 240
        while not ((workdir / "metrics.csv").exists() and len(rows(workdir)) > 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
    finally:
        process.terminate()
    assert process.returncode == 130, errors
    assert "--resume continues" in said.replace("\n", " ")
    step = int(rows(workdir)[-1]["step"])
    assert step % 3 == 0
    assert max(checkpoints(workdir)) == step


@pytest.mark.nightly
def test_a_mistake_in_all_processes_ends_them_with_its_sentence(module_config, tmp_path):
    status, said, errors = in_two_processes(module_config, tmp_path, "--config.batch_size=18")
    assert status == 1
    assert "A batch has 18 examples, which 4 devices cannot share evenly" in errors
    assert not said.count("step")


@pytest.mark.slow
def test_without_a_cluster_one_sentence_asks_for_it(module_config, tmp_path):
    flags = ("--config.distributed=True", "--config.devices.mode=sharded", f"--workdir={tmp_path}")
    found = subprocess.run(
        [sys.executable, "-m", "kfe_optax.experiments.main", "train", f"--config={module_config}", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "set config.cluster.coordinator" in found.stderr
