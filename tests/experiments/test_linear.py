"""The deep linear network and its benchmark."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.job import make_job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config():
    """The config's own network with fewer layers and examples."""
    config = load_config(str(ROOT / "configs" / "deep_linear.py"))
    config.model.depth = 5
    config.data.update(train_size=96, test_size=20)
    config.batch_size = 32
    config.steps = 7
    return config


@pytest.mark.slow
def test_weight_decay_is_an_l2_penaltys(config):
    """One step of SGD from the same start, with and without it."""
    config.sgd.momentum = None
    dataset, kernels = load(config), {}
    for decay in (0.0, 0.5):
        config.sgd.weight_decay = decay
        job = make_job(config, "sgd", dataset, 1)
        start = np.array(job.state.params["last"]["kernel"])
        state, _ = job.step(job.state, job.batches(0))
        kernels[decay] = np.array(state.params["last"]["kernel"])
    np.testing.assert_allclose(kernels[0.0] - kernels[0.5], 1e-3 * 0.5 * start, rtol=1e-3, atol=1e-7)


@pytest.mark.nightly
def test_the_benchmark_draws_and_tells(tmp_path, monkeypatch, capsys):
    script = ROOT / "benchmarks" / "two_level.py"
    arguments = ["--optimizers", "sgd", "adam", "--seeds=2", "--every=2"]
    arguments += ["--set", "steps=4", "model.initializer=orthogonal"]
    path = tmp_path / "small.py"
    path.write_text(
        "import runpy\n"
        "def get_config():\n"
        f"    config = runpy.run_path({str(ROOT / 'configs' / 'deep_linear.py')!r})['get_config']()\n"
        "    config.model.depth = 4\n"
        "    config.data.update(train_size=64, test_size=8)\n"
        "    config.batch_size = 16\n"
        "    return config\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, f"--config={path}", f"--out={tmp_path}"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "| sgd |" in printed
    assert "| adam |" in printed
    rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert {row["seed"] for row in rows if row["optimizer"] == "adam"} == {"0", "1"}
    assert (tmp_path / "two_level.png").stat().st_size > 10_000
