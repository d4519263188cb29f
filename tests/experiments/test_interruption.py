"""Signals: what they end, when, and what is left of a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from kfe_optax.experiments import train as train_lib
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.checkpoints import Checkpoints
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import make_job
from kfe_optax.experiments.main import main
from kfe_optax.experiments.train import train

from .test_train import loss_curve

ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def listening():
    """Also where the tests themselves run under `nohup`, which programs started here would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_does_what_it_did_before(number):
    def raises(number, frame):
        raise KeyboardInterrupt

    before = {each: signal.signal(each, raises) for each in SIGNALS}
    try:
        with Interruption() as interruption:
            assert not interruption.requested
            signal.raise_signal(number)
            assert interruption.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert all(signal.getsignal(each) is raises for each in SIGNALS)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_under_nohup_a_closed_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("within", [False, True])
def test_outside_of_an_interruption_a_signal_ends_the_program_with_a_sentence(tmp_path, number, within):
    """``within``: while an import swallows whatever is raised in it."""
    # In the place of the package, whose import takes seconds.
    folder = tmp_path / "kfe_optax"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"""
import time
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except {"BaseException" if within else "ZeroDivisionError"}:
        pass
""")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["kfe-optax"].split(":")
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    # The fake package stands in front of the real one, as the script's own folder does.
    command = [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, out, error) == (130, "", "kfe-optax: interrupted.\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_checkpoint_is_written_waits_for_its_end(tiny_config, tmp_path, monkeypatch, number):
    tiny_config.optimizer, tiny_config.checkpoint_every = "adam", 3
    original, raised = Checkpoints.save, []

    def signaled(self, step, state, seconds):
        if not raised:
            raised.append(signal.raise_signal(number))
        original(self, step, state, seconds)

    monkeypatch.setattr(Checkpoints, "save", signaled)
    outcome = train(tiny_config, tmp_path / "parts", console=Console(quiet=True))
    assert (outcome.interrupted, outcome.step) == (True, 3)
    monkeypatch.undo()
    resumed = train(tiny_config, tmp_path / "parts", resume=True, console=Console(quiet=True))
    assert resumed.step == 6
    assert [step for step, _ in loss_curve(tmp_path / "parts")] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("every", [500, 2])
def test_a_second_ctrl_c_within_a_step_loses_what_is_after_the_last_checkpoint(
    tiny_config_file, tmp_path, monkeypatch, capsys, every
):
    def make(*arguments):
        job = make_job(*arguments)

        def step(state, batch):
            found = job.step(state, batch)
            if int(found[0].step) == 4:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return found

        return job._replace(step=step)

    monkeypatch.setattr(train_lib, "make_job", make)
    arguments = [
        "train",
        f"--config={tiny_config_file}",
        "--config.optimizer=adam",
        f"--workdir={tmp_path}/run",
    ]
    arguments.append(f"--config.checkpoint_every={every}")
    assert main(arguments) == 130
    assert capsys.readouterr().err == "kfe-optax: interrupted.\n"
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
    assert [step for step, _ in loss_curve(tmp_path / "run")] == ["1", "2", "3", "4", "5", "6"]


def test_an_interruption_between_commands_is_one_sentence(tiny_config_file, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Batches, "__init__", interrupted)
    assert main(["train", f"--config={tiny_config_file}", f"--workdir={tmp_path}"]) == 130
    assert capsys.readouterr().err == "kfe-optax: interrupted.\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_program_starts_is_one_sentence(tmp_path, number):
    path = tmp_path / "signals.py"
    path.write_text(f"import os\n\ndef get_config():\n    os.kill(os.getpid(), {int(number)})\n")
    command = [sys.executable, "-m", "kfe_optax.experiments.main", "train", f"--config={path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (found.returncode, found.stderr) == (130, "kfe-optax: interrupted.\n")
