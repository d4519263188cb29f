"""The command line: commands, overrides, help, mistakes, Ctrl-C."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.slow
def test_train_with_overrides_and_resume(tiny_config_file, tmp_path, capsys):
    arguments = [
        "train",
        f"--config={tiny_config_file}",
        "--config.optimizer=kfac",
        "--config.kfac.damping.value=0.5",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert main([*arguments, "--config.steps=4"]) == 0
    text = capsys.readouterr().out
    assert "72 training and 25 test images of 64 pixels" in text
    assert "kfac  step 4/4  loss" in text
    assert "damping 0.5" in text
    assert "training set" in text
    assert "test set" in text
    assert main([*arguments, "--config.steps", "5", "--resume"]) == 0
    assert "resumed    at step 4" in capsys.readouterr().out
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert {float(row["damping"]) for row in rows[1:]} == {0.5}


@pytest.mark.nightly
def test_compare_prints_a_table_and_writes_a_figure(tiny_config_file, tmp_path, capsys):
    assert (
        main(
            [
                "compare",
                f"--config={tiny_config_file}",
                "--config.compare.optimizers=sgd,ekfac",
                "--config.compare.budget=3 steps",
                f"--workdir={tmp_path}",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "ms/step" in text
    assert "ekfac" in text
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert (tmp_path / "compare.csv").is_file()


def test_layers_prints_the_table(tiny_config_file, capsys):
    assert main(["layers", f"--config={tiny_config_file}"]) == 0
    text = capsys.readouterr().out
    assert "dense_1" in text
    assert "dense_2" in text


def test_results_go_to_runs_by_default(tiny_config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--config={tiny_config_file}", "--config.optimizer=sgd"]) == 0
    assert (tmp_path / "runs" / "tiny-sgd" / "metrics.csv").is_file()


def test_a_bare_name_means_a_file_in_configs(tiny_config_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    tiny_config_file.rename(tmp_path / "configs" / "tiny.py")
    monkeypatch.chdir(tmp_path)
    assert main(["layers", "--config=tiny"]) == 0
    assert main(["layers", "--config", "tiny"]) == 0


def test_help_shows_commands_and_with_a_config_its_fields(tiny_config_file, capsys):
    assert main(["--help"]) == 0
    general = capsys.readouterr().out
    for word in ("train", "compare", "layers", "--resume", "--workdir", "--config.FIELD=VALUE"):
        assert word in general
    assert main(["train", "--help", f"--config={tiny_config_file}"]) == 0
    assert "factor_update_period: 2" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train"], "Name a config"),
        (["fly", "--config={}"], "Name one command of train, compare, layers, sweep, diagnose (given: fly)"),
        (["--config={}"], "(given: none)"),
        (["train", "compare", "--config={}"], "(given: train compare)"),
        (["compare", "--config={}", "--resume"], "--resume belongs to 'train'"),
        (["train", "--config=absent.py"], "There is no config 'absent.py'"),
        (["train", "--config={}", "--config.speed=3"], "a field that the config does not have"),
        (["train", "--config={}", "--config.adam.learning_rate.valu=3"], "Did you mean"),
        (["train", "--config={}", "--config.steps=many"], "--config.steps=many"),
        (["train", "--config={}", "--verbose"], "Unknown command line flag 'verbose'"),
        (["train", "--config={}", "--config.data_dir=/absent"], "There is nothing at '/absent'"),
        (["train", "--config={}", "--config.optimizer=lbfgs"], "lbfgs"),
    ],
)
def test_mistakes_are_one_sentence_on_stderr(
    tiny_config_file, tmp_path, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(tiny_config_file) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kfe-optax: ")
    assert error.count("\n") == 1
    assert sentence in error


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("def get_config(:", "is not valid Python (line 1"),
        ("config = 3", "is not a config file"),
        ("def get_config():\n    return {}", "is not a config file"),
    ],
)
def test_files_that_are_no_configs_are_one_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "broken.py"
    path.write_text(content)
    assert main(["train", f"--config={path}"]) == 2
    assert sentence in capsys.readouterr().err


def test_missing_dependencies_name_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_collections", None)
    monkeypatch.delitem(sys.modules, "kfe_optax.experiments.command_line", raising=False)
    assert main(["--help"]) == 2
    assert "pip install '.[experiments]'" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_leaves_a_checkpoint_that_resumes(tiny_config_file, tmp_path):
    workdir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "kfe_optax.experiments.main",
        "train",
        f"--config={tiny_config_file}",
        "--config.optimizer=adam",
        "--config.steps=1000000",
        f"--workdir={workdir}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        metrics, deadline = workdir / "metrics.csv", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 4):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume continues" in out.replace("\n", " ")
    assert err == ""
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    with metrics.open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(step + 1))
    arguments = [*command[3:-2], f"--config.steps={step + 2}", f"--workdir={workdir}", "--resume"]
    # A schedule that spans the run depends on its length, which this resumption changes.
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "mnist_small" else pytest.mark.nightly)
        for path in CONFIGS
    ],
)
def test_every_config_describes_its_layers(path, tmp_path, capsys):
    config = load_config(str(path))
    data = stand_in(config, tmp_path)
    assert main(["layers", f"--config={path}", f"--config.data_dir={data}"]) == 0
    table = capsys.readouterr().out
    dense = [f"dense_{index}" for index in range(1, len(config.model.get("sizes", ())))]
    for name in dense or ["last" if config.model.kind == "linear" else "logits"]:
        assert f"\n{name} " in table
    for name in ("adam", "sgd", "kfac", "ekfac"):
        assert name in config


def stand_in(config, folder):
    """Data of the right size in the place of the real ones, which take seconds to load; "" where they do not."""
    if config.model.kind == "linear":
        return ""
    generator = np.random.default_rng(0)
    if config.model.kind in ("transformer", "recurrent"):
        text = folder / "text.txt"
        text.write_text("".join(map(chr, generator.integers(32, 127, 10_000))))
        return text
    count, sizes = config.batch_size, config.model.get("sizes")
    shape = (sizes[0],) if sizes else (32, 32, config.data.channels)
    images = generator.integers(0, 256, (count, *shape), np.uint8)
    labels = generator.integers(0, 10, count)
    archive = folder / "images.npz"
    np.savez(archive, x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    return archive
