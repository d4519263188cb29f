"""A run that is killed at random moments, and continued each time, is bit for bit the run that was never killed."""

from __future__ import annotations

import os
import random
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

from .test_train import losses

ROOT = Path(__file__).parents[2]
KILLS, STEPS = 20, 12000
FLAGS = {
    "optimizer": "kfac",
    "steps": STEPS,
    "log_every": 7,
    "checkpoint_every": 40,
    "evaluate_every": "90 steps",
}


def size(path):
    return path.stat().st_size if path.exists() else 0


@pytest.mark.nightly
def test_kills_at_random_moments_change_nothing(tiny_config_file, tmp_path):
    """Half of them while it trains and writes, half at any time, mostly while it starts and compiles."""
    config = load_config(str(tiny_config_file))
    config.update(FLAGS)
    whole = train(config, tmp_path / "whole", console=Console(quiet=True))
    workdir, generator = tmp_path / "killed", random.Random(0)
    flags = [f"--config.{name}={value}" for name, value in FLAGS.items()]
    command = [
        sys.executable,
        "-m",
        "kfe_optax.experiments.main",
        "train",
        f"--config={tiny_config_file}",
        *flags,
    ]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **cache}
    metrics, killed = workdir / "metrics.csv", 0
    while killed < KILLS:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}", "--resume"], env=environment, stdout=subprocess.DEVNULL
        )
        # Every second one has first to come further than all before it.
        reached = size(metrics) + generator.uniform(0, 3000) if killed % 2 == 0 else float("inf")
        deadline = time.monotonic() + (120.0 if killed % 2 == 0 else generator.uniform(0.0, 8.0))
        while time.monotonic() < deadline and size(metrics) <= reached:
            time.sleep(0.002)
        assert process.poll() is None, f"after {killed} kills the run was at its end; give it more steps"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed += 1
    found = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert found and 0 < found[-1] < STEPS
    config = load_config(str(tiny_config_file))
    config.update(FLAGS)
    resumed = train(config, workdir, resume=True, console=Console(quiet=True))
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert resumed.measures == whole.measures
    assert losses(workdir) == losses(tmp_path / "whole")
