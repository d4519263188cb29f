"""``diagnose``: its numbers against dense matrices, the theory, its files, its sentences."""

from __future__ import annotations

import csv
import io
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kfe_optax import value_grad_and_taps
from kfe_optax.experiments import diagnose as diagnose_lib
from kfe_optax.experiments import settings
from kfe_optax.experiments.data import load
from kfe_optax.experiments.diagnose import diagnose, make_measure
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import find_layers
from kfe_optax.experiments.main import main
from kfe_optax.experiments.task import make_task
from tests import dense_factors

QUIET = Console(quiet=True)
AT_MOST = (
    *(("deflation", "kpsvd"), ("lanczos", "kpsvd"), ("lanczos", "kfac_corrected"), ("kpsvd", "kfac")),
    *(("kpsvd", "tkfac"), ("kfac_corrected", "kfac"), ("ekfac", "kfac"), ("tekfac", "tkfac")),
)


@pytest.fixture
def config(tiny_config):
    """Four measurements of the second layer, 7 x 16, whose F has 112 rows."""
    tiny_config.model.sizes = (64, 6, 16, 64)
    tiny_config.diagnose.update(steps=6, every=2)
    return tiny_config


def relative(f, approximation):
    return np.linalg.norm(f - approximation) / np.linalg.norm(f)


def diagonal_in(basis, f):
    u = np.kron(*(np.asarray(side, np.float64) for side in basis))
    return u @ np.diag(np.diagonal(u.T @ f @ u)) @ u.T


def eigenvectors(terms):
    return [np.linalg.eigh(side)[1] for side in terms]


# --- The numbers -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["sampled", pytest.param("empirical", marks=pytest.mark.nightly)])
def test_every_number_is_that_of_the_dense_matrices(config, x64, fisher, monkeypatch):
    monkeypatch.setitem(diagnose_lib._LIMITS, "tolerance", 1e-13)
    monkeypatch.setitem(diagnose_lib._LIMITS, "max_iterations", 4000)
    dataset = load(config)
    task = make_task(config, dataset)
    batch = {"image": dataset.train_images[:16].astype(float), "label": dataset.train_labels[:16]}
    params, _ = jax.jit(task.init)(jax.random.key(0), batch["image"])
    params = jax.tree.map(lambda v: 2 * v.astype(jnp.float64), params)
    layers = find_layers(task, params, {}, batch)
    name = "dense_2"
    d_in, d_out = layers[name].sides
    measure = jax.jit(make_measure(task, layers, name, fisher=fisher))
    differentiate = value_grad_and_taps(task.loss_fn, layers, fisher=fisher)
    for step in range(2):
        params = jax.tree.map(lambda v, step=step: v * (1 + 0.2 * step), params)
        key = jax.random.fold_in(jax.random.key(3), step)
        values = measure(params, batch, {}, key)
        a, g = (np.asarray(v) for v in differentiate(params, batch, None, None, key=key)[2][name].rows())
        m = dense_factors.examples(a, g)
        f, kfac = dense_factors.fisher(m), dense_factors.kfac(a, g)
        sigma, phi, psi = dense_factors.tkfac(a, g)
        expected = {
            "kfac": np.kron(*kfac),
            "tkfac": sigma * np.kron(phi, psi),
            "kpsvd": dense_factors.matrix(dense_factors.kpsvd(f, d_in, d_out)),
            "deflation": dense_factors.matrix(dense_factors.deflation(f, d_in, d_out)),
            "lanczos": dense_factors.matrix(dense_factors.deflation(f, d_in, d_out)),
            "kfac_corrected": dense_factors.matrix(dense_factors.kfac_corrected(f, *kfac)),
            "ekfac": diagonal_in(eigenvectors(kfac), f),
            "tekfac": diagonal_in(eigenvectors((phi, psi)), f),
        }
        assert set(values["error"]) == set(values["spectrum_error"]) == set(expected)
        exact = np.linalg.eigvalsh(f)
        for method, matrix in expected.items():
            assert float(values["error"][method]) == pytest.approx(relative(f, matrix), rel=1e-7), method
            of_spectra = np.linalg.norm(exact - np.linalg.eigvalsh(matrix)) / np.linalg.norm(exact)
            assert float(values["spectrum_error"][method]) == pytest.approx(of_spectra, rel=1e-6), method


# --- The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    """One run's outcome, folder and text, for all tests that only look at it; filled by ``run``."""
    return {}


@pytest.fixture
def run(config, found, tmp_path_factory):
    if not found:
        found["folder"] = tmp_path_factory.mktemp("diagnose")
        console = Console(width=100, file=io.StringIO())
        found["diagnosis"] = diagnose(config, found["folder"], console=console)
        found["text"] = " ".join(console.file.getvalue().split())
    return found


@pytest.mark.slow
def test_the_theory_holds_while_a_network_trains(run):
    diagnosis, text = run["diagnosis"], run["text"]
    assert "dense_2, 7 x 16, F has 112 rows" in text
    assert f"{diagnosis.values['error']['kpsvd'].mean():.4f}" in text
    # What optimality on one batch implies, to the last digits that float64 knows of an error.
    for low, high in AT_MOST:
        assert (diagnosis.values["error"][low] <= diagnosis.values["error"][high] + 1e-7).all(), (low, high)


@pytest.mark.slow
def test_files(run):
    diagnosis = run["diagnosis"]
    with (run["folder"] / "diagnose.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted({int(row["step"]) for row in rows}) == diagnosis.steps == [0, 2, 4, 6]
    for row in rows:
        for quantity in ("error", "spectrum_error"):
            own = diagnosis.values[quantity][row["method"]][diagnosis.steps.index(int(row["step"]))]
            assert float(row[quantity]) == pytest.approx(own, rel=1e-8)
    assert (run["folder"] / "diagnose.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_from_the_command_line_with_an_interruption(tiny_config_file, tmp_path, monkeypatch, capsys):
    say = diagnose_lib.say
    monkeypatch.setattr(
        diagnose_lib,
        "say",
        lambda console, text: (
            say(console, text),
            text.startswith("step 2 ") and signal.raise_signal(signal.SIGINT),
        ),
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["diagnose", f"--config={tiny_config_file}", "--config.model.sizes=(64,6,16,64)"]
    arguments += ["--config.diagnose.every=2"]
    assert main(arguments) == 130
    assert "Interrupted; what was measured is in" in capsys.readouterr().out
    folder = tmp_path / "runs" / "tiny-diagnose"
    assert (folder / "diagnose.png").is_file()
    with (folder / "diagnose.csv").open(newline="") as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"0", "2"}


@pytest.mark.slow
def test_divergence_is_one_sentence(config, tmp_path):
    config.adam = settings.adam(1e20)
    with pytest.raises(ExperimentError, match=r"diverged before step \d+; lower config.adam.learning_rate"):
        diagnose(config, tmp_path, console=QUIET)


def test_help_explains_every_setting(capsys):
    assert main(["diagnose", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("diagnose.csv", "diagnose.png", *settings.base_config("any").diagnose):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "config.diagnose.steps is 0"),
        ({"optimizer": "lbfgs"}, "lbfgs"),
    ],
)
def test_mistakes_are_one_sentence(config, tmp_path, changes, sentence):
    config.diagnose.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        diagnose(config, tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_what_is_not_in_the_config_is_one_sentence(config, tmp_path):
    config.kfac.fisher = "foo"
    with pytest.raises(ExperimentError, match="fisher"):
        diagnose(config, tmp_path, console=QUIET)
    del config.diagnose
    with pytest.raises(ExperimentError, match="has no 'diagnose'"):
        diagnose(config, tmp_path, console=QUIET)


def test_a_layer_that_is_not_there_is_one_sentence(config, tmp_path):
    config.diagnose.layer = "code"
    with pytest.raises(ExperimentError, match="is 'code'; give one of dense_1, dense_2, dense_3"):
        diagnose(config, tmp_path, console=QUIET)
