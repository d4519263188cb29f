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
from kfe_optax.experiments import diagnose_measure, settings
from kfe_optax.experiments.data import load
from kfe_optax.experiments.diagnose import diagnose, find_layer
from kfe_optax.experiments.diagnose_measure import make_measure
from kfe_optax.experiments.diagnose_report import means_table, theory
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import find_layers, make_job
from kfe_optax.experiments.main import main
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.task import make_task
from kfe_optax.factors import Term
from tests import dense_factors

QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_config):
    """Four measurements of the second layer, 7 x 16, whose F has 112 rows."""
    tiny_config.model.sizes = (64, 6, 16, 64)
    tiny_config.diagnose.update(steps=6, every=2, basis_update_period=4)
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
    monkeypatch.setitem(diagnose_measure._LIMITS, "tolerance", 1e-13)
    monkeypatch.setitem(diagnose_measure._LIMITS, "max_iterations", 4000)
    monkeypatch.setattr(diagnose_measure, "_COORDINATES", 9)
    dataset = load(config)
    task = make_task(config, dataset)
    batch = {"image": dataset.train_images[:16].astype(float), "label": dataset.train_labels[:16]}
    params, _ = jax.jit(task.init)(jax.random.key(0), batch["image"])
    params = jax.tree.map(lambda v: 2 * v.astype(jnp.float64), params)
    layers = find_layers(task, params, {}, batch)
    name = find_layer(layers, "2")
    d_in, d_out = layers[name].sides
    measure = jax.jit(make_measure(task, layers, name, fisher=fisher))
    differentiate = value_grad_and_taps(task.loss_fn, layers, fisher=fisher)
    old, kept = (Term(jnp.eye(d_in), jnp.eye(d_out)),), None
    for step, refresh in enumerate((True, False)):
        params = jax.tree.map(lambda v, step=step: v * (1 + 0.2 * step), params)
        key = jax.random.fold_in(jax.random.key(3), step)
        values, correlations, old = measure(params, batch, {}, key, old, jnp.array(refresh))
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
        # Amortized: factors and basis of the last refresh, the scale of now.
        kept = kfac if refresh else kept
        for method, matrix in (("kfac", np.kron(*kept)), ("ekfac", diagonal_in(eigenvectors(kept), f))):
            assert float(values["stale_error"][method]) == pytest.approx(relative(f, matrix), rel=1e-7)
        # Correlations of the chosen coordinates; a dead unit has none.
        chosen = np.linspace(0, 111, 9).astype(int)
        rows = m.reshape(len(m), -1)[:, chosen]
        covariance = np.cov(rows.T, bias=True) if fisher == "empirical" else f[np.ix_(chosen, chosen)]
        deviation = np.sqrt(np.diagonal(covariance))
        alive = np.outer(deviation, deviation) > 1e-14
        correlation = np.where(alive, covariance / np.where(alive, np.outer(deviation, deviation), 1), 0)
        np.testing.assert_allclose(correlations["parameters"], correlation, atol=1e-8)


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
def test_the_theory_holds_while_a_network_trains(run, config):
    diagnosis, text = run["diagnosis"], run["text"]
    assert list(theory(diagnosis.values["error"])) == ["8 of 8 inequalities hold at all 4 steps"]
    for words in ("dense_2, 7 x 16, F has 112 rows", "8 of 8 inequalities", "in the KFE"):
        assert words in text
    assert f"{diagnosis.values['error']['kpsvd'].mean():.4f}" in text
    # At a refresh nothing is old.
    error, stale = diagnosis.values["error"], diagnosis.values["stale_error"]
    for method in ("kfac", "ekfac"):
        np.testing.assert_allclose(stale[method][::2], error[method][::2], rtol=1e-6)
        assert (stale[method][1::2] > error[method][1::2] + 1e-3).all()
    # The loss of the batch of step 2 before that step.
    job = make_job(config, "adam", load(config), 6)
    state = job.state
    for step in range(3):
        state, loss = job.step(state, job.batches(step))
    assert diagnosis.values["loss"]["loss"][1] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_files(run):
    diagnosis = run["diagnosis"]
    with (run["folder"] / "diagnose.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted({int(row["step"]) for row in rows}) == diagnosis.steps == [0, 2, 4, 6]
    table = {(int(row["step"]), row["quantity"], row["method"]): float(row["value"]) for row in rows}
    for (step, quantity, method), value in table.items():
        own = diagnosis.values[quantity][method][diagnosis.steps.index(step)]
        assert value == pytest.approx(own, rel=1e-8)
    assert (run["folder"] / "diagnose.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_from_the_command_line_with_an_interruption(tiny_config_file, tmp_path, monkeypatch, capsys):
    show = ProgressDisplay.show
    monkeypatch.setattr(
        ProgressDisplay,
        "show",
        lambda self, step, *numbers: (
            show(self, step, *numbers),
            step == 2 and signal.raise_signal(signal.SIGINT),
        ),
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["diagnose", f"--config={tiny_config_file}", "--config.model.sizes=(64,6,16,64)"]
    arguments += ["--config.diagnose.every=2", "--config.diagnose.basis_update_period=4"]
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


def test_the_layer_by_number_by_name_or_by_default():
    names = {f"dense_{i}": None for i in range(1, 13)}
    assert find_layer(names, "") == "dense_5"
    assert find_layer(names, "12") == find_layer(names, "dense_12") == "dense_12"
    shorter = [find_layer(dict.fromkeys(list(names)[:count]), "") for count in (1, 2, 4, 8)]
    assert shorter == ["dense_1", "dense_2", "dense_3", "dense_5"]
    with pytest.raises(ExperimentError, match="give a number from 1 to 12, or one of dense_1, dense_2"):
        find_layer(names, "code")


def test_an_inequality_that_fails_is_told():
    methods = ("kfac", "tkfac", "kpsvd", "kfac_corrected", "deflation", "lanczos", "ekfac", "tekfac")
    error = {method: np.full(3, 0.5) for method in methods}
    error["tekfac"] = np.array([0.5, 0.6, 0.5])
    first, last = theory(error)
    assert first.startswith("tekfac <= tkfac fails at 1 of 3 steps, by 1.0e-01")
    assert last.startswith("7 of 8")
    values = {"error": error, "spectrum_error": {}, "stale_error": {"kfac": np.array([0.5, 0.9, 0.5])}}
    console = Console(width=100, file=io.StringIO())
    console.print(means_table(values, np.array([False, True, False]), "made up"))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["kfac", "0.5000", "0.9000"] in lines
