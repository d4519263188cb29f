"""``diagnose``: its numbers against dense matrices, its claims, its files, its sentences."""

from __future__ import annotations

import csv
import functools
import io
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kfe_optax import diagnostics, find_layers, value_grad_and_taps
from kfe_optax.experiments import diagnose as diagnose_lib
from kfe_optax.experiments import diagnose_measure, settings
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.data import load
from kfe_optax.experiments.diagnose import diagnose
from kfe_optax.experiments.diagnose_measure import Window, make_measure
from kfe_optax.experiments.diagnose_plan import find_layer, make_plan
from kfe_optax.experiments.diagnose_plot import plot_errors
from kfe_optax.experiments.diagnose_records import DiagnoseRecorder, Series
from kfe_optax.experiments.diagnose_report import checks, means_table
from kfe_optax.experiments.diagnose_rows import GivenRows
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.main import main
from kfe_optax.experiments.task import make_task
from kfe_optax.factors import Term
from tests import dense_factors

QUIET = Console(quiet=True)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def config(tiny_config):
    """Seven measurements of the second layer, 7 x 16, whose F has 112 rows."""
    tiny_config.model.sizes = (64, 6, 16, 64)
    tiny_config.diagnose.update(steps=12, every=2, basis_update_period=4, window=7, coordinates=9)
    tiny_config.diagnose.spectrum_limit = 111
    return tiny_config


@pytest.fixture(scope="module")
def measured():
    """The measurements that the tests of one run share, by name."""
    return {}


def relative(f, approximation):
    return np.linalg.norm(f - approximation) / np.linalg.norm(f)


def spectral(f, approximation):
    exact, found = np.linalg.eigvalsh(f), np.linalg.eigvalsh(approximation)
    return np.linalg.norm(exact - found) / np.linalg.norm(exact)


def in_basis(basis, diagonal):
    u = np.kron(*(np.asarray(side, np.float64) for side in basis))
    return u @ np.diag(np.ravel(diagonal)) @ u.T


def best_diagonal(m, basis):
    inputs, outputs = map(np.asarray, basis)
    return np.mean(np.einsum("ia,nij,jb->nab", inputs, m, outputs) ** 2, 0)


# --- The numbers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_number_is_that_of_the_dense_matrices(config, x64):
    config.diagnose.update(
        layer="2", tolerance=1e-13, max_iterations=4000, running_examples=10, decay=0.6, spectrum_limit=112
    )
    dataset = load(config)
    task = make_task(config, dataset)
    batches = Batches(dataset.train_images, dataset.train_labels, config.batch_size, seed=0)
    batch = jax.tree.map(lambda v: v.astype(np.float64), batches(0))
    params = task.model.init(jax.random.key(0), batch["image"])["params"]
    params = jax.tree.map(lambda v: 2 * v.astype(jnp.float64), params)
    layers = find_layers(task.loss_fn, params, batch)
    plan = make_plan(config)._replace(layer=find_layer(layers, "2"))
    assert (plan.examples, plan.running_examples) == (16, 10)
    measure, state = make_measure(plan, task, layers, params, batch)
    measure = jax.jit(measure)
    differentiate = value_grad_and_taps(task.loss_fn, layers)
    d_in, d_out = layers[plan.layer].sides
    assert (d_in, d_out) == (7, 16)
    blocks, sums, running_f, factors = [], None, 0.0, None
    for step, refresh in enumerate((True, False, True, False)):
        batch = jax.tree.map(lambda v: v.astype(np.float64), batches(step))
        params = jax.tree.map(lambda v, step=step: v * (1 + 0.2 * step), params)
        key = jax.random.fold_in(jax.random.key(3), step)
        before = state.stale
        state, found = measure(state, params, batch, key, jnp.array(refresh))
        values = found.values

        a, g = (np.asarray(v) for v in differentiate(params, batch, key=key)[2][plan.layer].rows())
        m = dense_factors.examples(a, g)
        f = dense_factors.fisher(m)
        kfac = dense_factors.kfac(a, g)
        sigma, phi, psi = dense_factors.tkfac(a, g)
        expected = {
            "kfac": np.kron(*kfac),
            "tkfac": sigma * np.kron(phi, psi),
            "kpsvd": dense_factors.matrix(dense_factors.kpsvd(f, d_in, d_out)),
            "deflation": dense_factors.matrix(dense_factors.deflation(f, d_in, d_out)),
            "kfac_corrected": dense_factors.matrix(dense_factors.kfac_corrected(f, *kfac)),
        }
        expected["lanczos"] = expected["deflation"]
        for name, sides in (("ekfac", kfac), ("tekfac", (phi, psi))):
            u = np.kron(*(np.linalg.eigh(side)[1] for side in sides))
            expected[name] = u @ np.diag(np.diagonal(u.T @ f @ u)) @ u.T
        for name, approximation in expected.items():
            assert float(values["error"][name]) == pytest.approx(relative(f, approximation), rel=1e-7), name
            found_error = float(values["spectrum_error"][name])
            assert found_error == pytest.approx(spectral(f, approximation), rel=1e-6), name

        # Amortized: factors and basis of the last refresh, the scale of now or a running one.
        if refresh:
            factors = kfac
            for side, factor in zip(state.stale.basis, kfac, strict=True):
                u = np.asarray(side)
                values_of_side = np.diagonal(u.T @ factor @ u)
                np.testing.assert_allclose(u * values_of_side @ u.T, factor, atol=1e-10 * factor.max())
        else:
            assert jax.tree.all(jax.tree.map(jnp.array_equal, before.basis, state.stale.basis))
        basis = state.stale.basis
        current = best_diagonal(m, basis)
        r = [np.asarray(new).T @ np.asarray(old) for new, old in zip(basis, before.basis, strict=True)]
        past = (r[0] ** 2) @ np.asarray(before.scale) @ (r[1] ** 2).T if refresh else np.asarray(before.scale)
        rho = min(1 - 1 / (step + 1), 0.6**2)
        running = rho * past + (1 - rho) * current
        np.testing.assert_allclose(state.stale.scale, running, rtol=1e-9, atol=1e-12 * running.max())
        for name, approximation in (
            ("kfac", np.kron(*factors)),
            ("ekfac", in_basis(basis, current)),
            ("ekfac_running", in_basis(basis, running)),
        ):
            assert float(values["stale_error"][name]) == pytest.approx(relative(f, approximation), rel=1e-7)
            found_error = float(values["stale_spectrum_error"][name])
            assert found_error == pytest.approx(spectral(f, approximation), rel=1e-6)

        # Running averages, of the first ten examples.
        few = a[:10], g[:10]
        blocks.append(dense_factors.fisher_of_rows(*few))
        rho = min(1 - 1 / len(blocks), 0.6)
        running_f = rho * running_f + (1 - rho) * blocks[-1]
        new = (dense_factors.kfac(*few), dense_factors.kpsvd(blocks[-1], d_in, d_out)[0])
        sums = (
            new
            if sums is None
            else tuple(
                tuple(rho * x + (1 - rho) * y for x, y in zip(old, fresh, strict=True))
                for old, fresh in zip(sums, new, strict=True)
            )
        )
        expected = {"kfac": np.kron(*sums[0]), "kpsvd": np.kron(*sums[1])}
        for rank in (1, 2):
            stream = dense_factors.streaming(blocks, 0.6, rank, d_in, d_out)[-1]
            expected[f"streaming_rank_{rank}"] = dense_factors.matrix(stream)
            best = dense_factors.best_terms(running_f, d_in, d_out, rank)
            expected[f"best_rank_{rank}"] = dense_factors.matrix(best)
        for name, approximation in expected.items():
            found_error = float(values["running_error"][name])
            assert found_error == pytest.approx(relative(running_f, approximation), rel=1e-6), name

        # Correlations of the chosen coordinates; a dead unit has none.
        chosen = [i * d_out + j for i in (0, 3, 6) for j in (0, 8, 15)]
        covariance = f[np.ix_(chosen, chosen)]
        deviation = np.sqrt(np.diagonal(covariance))
        alive = np.outer(deviation, deviation) > 0
        correlation = np.where(alive, covariance / np.where(alive, np.outer(deviation, deviation), 1), 0)
        np.testing.assert_allclose(found.correlations["parameters"], correlation, atol=1e-10)
        count = np.sum(deviation > 0)
        assert count > 4
        mean = (np.abs(correlation).sum() - count) / (count * (count - 1))
        assert float(values["correlation"]["parameters"]) == pytest.approx(mean, rel=1e-9)


def test_the_window_forgets_its_oldest_batch():
    window = Window(jnp.zeros((2, 1, 1, 3)), jnp.zeros((2, 1, 1, 2)), jnp.zeros(2))
    for step in range(4):
        a, g = jnp.full((1, 1, 3), step + 1.0), jnp.ones((1, 1, 2))
        window = diagnose_measure._extended(window, a, g, jnp.minimum(1 - 1 / (step + 1), 0.5))
    order = np.argsort(window.weights)
    np.testing.assert_allclose(window.weights[order], [0.25, 0.5])
    np.testing.assert_allclose(window.a[order, 0, 0, 0], [3, 4])
    a, g = diagnose_measure._rows_of(window)
    f = dense_factors.fisher_of_rows(a, g)
    np.testing.assert_allclose(f, (1 / 3 * 9 + 2 / 3 * 16) * np.ones((6, 6)), rtol=1e-6)


def test_the_running_scale_forgets_by_steps(config):
    """Between measurements that are `every` steps apart, the past keeps the weight that so many steps leave it."""
    plan = make_plan(config)._replace(every=3, decay=0.5)
    keys = jax.random.split(jax.random.key(0))
    a, g = jax.random.normal(keys[0], (5, 1, 3)), jax.random.normal(keys[1], (5, 1, 2))
    tap = GivenRows(3, 2).tap(a, g)
    terms = (Term(jnp.eye(3), jnp.eye(2)),)
    basis = diagnose_measure._basis(terms)
    old = diagnose_measure.Stale(terms, basis, jnp.full((3, 2), 7.0))
    seen = diagnose_measure._Seen(tap, jnp.ones(()), diagnostics.fisher_spectrum(tap), plan)
    state = diagnose_measure.MeasureState({}, {}, None, old, None, jnp.array(100))
    new, _ = diagnose_measure._between_refreshes(seen, state, jnp.array(False), terms, basis)
    current = diagnose_measure._scale(tap, basis)
    np.testing.assert_allclose(new.scale, 7 / 8 + 7 * current / 8, rtol=1e-5)


def test_given_rows_are_the_rows_of_the_tap():
    given = GivenRows(3, 2)
    keys = jax.random.split(jax.random.key(0))
    a, g = jax.random.normal(keys[0], (5, 2, 3)), jax.random.normal(keys[1], (5, 2, 2))
    rows = given.tap(a, g).rows()
    np.testing.assert_allclose(rows[0], a)
    np.testing.assert_allclose(rows[1], g, rtol=1e-6)
    block = diagnostics.fisher_block(given.tap(a, g))
    np.testing.assert_allclose(block, dense_factors.fisher_of_rows(a, g), rtol=1e-4, atol=1e-6)


# --- The command -------------------------------------------------------------------------------------


@pytest.fixture
def found(config, measured, tmp_path_factory):
    """One run, with everything it writes and prints, for all tests that only look at it."""
    if not measured:
        folder = tmp_path_factory.mktemp("diagnose")
        console = Console(width=100, file=io.StringIO())
        measured["diagnosis"] = diagnose(config, folder, console=console)
        measured["folder"] = folder
        measured["text"] = " ".join(console.file.getvalue().split())
    return measured


@pytest.mark.slow
def test_the_theorems_hold_while_a_network_trains(found):
    theorems = [check for check in found["diagnosis"].checks if check.theorem]
    assert len(theorems) == 8
    for check in theorems:
        assert (check.holds, check.of) == (7, 7), check
    series = found["diagnosis"].series
    for rank in (1, 2):
        best = series.of("running_error", f"best_rank_{rank}")
        others = ("kpsvd", "streaming_rank_1") if rank == 1 else ("lanczos", "streaming_rank_2")
        for name in others:
            assert (best <= series.of("running_error", name) + 1e-5).all()
    # At a refresh nothing is old.
    at_refresh = np.array(series.steps) % 4 == 0
    for name in ("kfac", "ekfac"):
        np.testing.assert_allclose(
            series.of("stale_error", name)[at_refresh], series.of("error", name)[at_refresh], rtol=1e-4
        )
        between = series.of("stale_error", name)[~at_refresh] - series.of("error", name)[~at_refresh]
        assert (between > 1e-3).all()
    assert series.of("loss", "adam")[-1] < series.of("loss", "adam")[0]


@pytest.mark.slow
def test_files_and_tables(found):
    folder, series = found["folder"], found["diagnosis"].series
    with (folder / "diagnose.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "method", "quantity", "value"]
    assert sorted({int(row["step"]) for row in rows}) == series.steps == [0, 2, 4, 6, 8, 10, 12]
    table = {(int(row["step"]), row["quantity"], row["method"]): row["value"] for row in rows}
    assert len(table) == len(rows)
    for index, step in enumerate(series.steps):
        for name in series.methods("error"):
            assert float(table[step, "error", name]) == pytest.approx(series.of("error", name)[index])
    for name in ("diagnose.png", "correlation.png"):
        content = (folder / name).read_bytes()
        assert content[:8] == PNG and 20_000 < len(content) < 300_000
    # The spectrum of a sum of two terms is left out above the limit.
    spectra = {row["method"]: row["value"] for row in rows if row["quantity"] == "spectrum_error"}
    assert {name for name, value in spectra.items() if value == ""} == {
        "deflation",
        "lanczos",
        "kfac_corrected",
    }
    assert {name for name, value in spectra.items() if value} == {"kfac", "tkfac", "kpsvd", "ekfac", "tekfac"}
    text = found["text"]
    for words in (
        "dense_2, 7 x 16, F has 112 rows",
        "KPSVD <= K-FAC 7 of 7 steps",
        "streaming_rank_2",
        "in the KFE",
        f"{series.of('error', 'kpsvd').mean():.4f}",
    ):
        assert words in text


def test_training_is_that_of_the_config(config, found):
    from kfe_optax.experiments.job import make_job

    dataset = load(config)
    job = make_job(config, "adam", dataset, 12)
    state = job.state
    for step in range(3):
        state, loss = job.step(state, job.batches(step))
    # The loss of the batch of step 2 before that step.
    assert found["diagnosis"].series.of("loss", "adam")[1] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_from_the_command_line_with_an_interruption(config, tiny_config_file, tmp_path, monkeypatch, capsys):
    write = DiagnoseRecorder.write
    monkeypatch.setattr(
        DiagnoseRecorder,
        "write",
        lambda self, step, values: (
            write(self, step, values),
            step == 2 and signal.raise_signal(signal.SIGINT),
        ),
    )
    monkeypatch.chdir(tmp_path)
    arguments = [
        "diagnose",
        f"--config={tiny_config_file}",
        "--config.model.sizes=(64,6,16,64)",
        "--config.diagnose.steps=12",
        "--config.diagnose.every=2",
        "--config.diagnose.basis_update_period=4",
        "--config.diagnose.coordinates=9",
        "--config.diagnose.window=7",
        "--config.diagnose.spectrum_limit=111",
    ]
    assert main(arguments) == 130
    assert "Interrupted after step 2" in capsys.readouterr().out
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
    for word in ("diagnose.csv", "correlation.png", *settings.base_config("any").diagnose):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "config.diagnose.steps is 0"),
        ({"every": 3}, "make the period a multiple of 'every'"),
        ({"layer": "9"}, "give a number from 1 to 3, or one of dense_1, dense_2, dense_3"),
        ({"layer": "code"}, "config.diagnose.layer is 'code'"),
        ({"optimizer": "lbfgs"}, "lbfgs"),
        ({"examples": 17}, "config.batch_size 16"),
        ({"running_examples": -1}, "at least 1, or 0 for all"),
        ({"decay": 1.0}, "config.diagnose.decay is 1.0"),
        ({"tolerance": -1.0}, "config.diagnose.tolerance"),
        ({"coordinates": 1}, "need at least 2"),
    ],
)
def test_mistakes_are_one_sentence(config, tmp_path, changes, sentence):
    config.diagnose.update(changes)
    with pytest.raises(ExperimentError, match=".") as error:
        diagnose(config, tmp_path, console=QUIET)
    assert sentence in str(error.value)


def test_an_old_config_is_one_sentence(config):
    del config.diagnose
    with pytest.raises(ExperimentError, match="has no 'diagnose'"):
        make_plan(config)


def test_the_layer_by_number_by_name_or_by_default(config):
    names = {f"dense_{i}": None for i in range(1, 13)}
    assert find_layer(names, "") == "dense_5"
    assert find_layer(names, "12") == find_layer(names, "dense_12") == "dense_12"
    shorter = [find_layer(dict.fromkeys(list(names)[:count]), "") for count in (1, 2, 4, 8)]
    assert shorter == ["dense_1", "dense_2", "dense_3", "dense_5"]


# --- Tables and pictures -----------------------------------------------------------------------------


def made_up(**changes):
    """A series in which every claim holds, but for the changed errors of the second step."""
    error = {
        "kfac": 0.5, "tkfac": 0.45, "kpsvd": 0.4, "deflation": 0.2, "lanczos": 0.2, "kfac_corrected": 0.3,
        "ekfac": 0.35, "tekfac": 0.3,
    }  # fmt: skip
    stale = {"kfac": 0.8, "ekfac": 0.4, "ekfac_running": 0.5}
    running = {
        "kfac": 0.5, "tkfac": 0.5, "kpsvd": 0.4, "lanczos": 0.4, "streaming_rank_1": 0.3, "streaming_rank_2": 0.2,
        "best_rank_1": 0.3, "best_rank_2": 0.1,
    }  # fmt: skip
    series = Series()
    for step, own in ((0, {}), (1, changes), (2, {})):
        values = {
            "error": error | own,
            "spectrum_error": error
            | {"lanczos": math.nan, "deflation": math.nan, "kfac_corrected": math.nan},
            "stale_error": stale,
            "stale_spectrum_error": stale,
            "running_error": running,
            "correlation": {"parameters": 0.3, "kfe": 0.1},
        }
        series.append(step, values)
    return series


def test_a_claim_that_fails_is_counted():
    assert all(check.holds == check.of for check in checks(made_up(), 2))
    failing = {check.claim: check for check in checks(made_up(kpsvd=0.6), 2) if check.holds < check.of}
    assert set(failing) == {"KPSVD <= K-FAC", "KPSVD <= TKFAC"}
    check = failing["KPSVD <= K-FAC"]
    assert (check.holds, check.of) == (2, 3)
    assert check.worst == pytest.approx(0.1)
    found = {check.claim: (check.holds, check.of) for check in checks(made_up(lanczos=0.1989), 2)}
    assert found["|deflation − Lanczos| <= 0.001"] == (2, 3)
    # Only step 1 lies between refreshes.
    assert found["between refreshes: EKFAC <= amortized K-FAC"] == (1, 1)
    assert checks(made_up(), 1)[-3].of == 0


@pytest.mark.slow
def test_the_table_of_means_leaves_out_what_is_not_known(tmp_path):
    console = Console(width=100, file=io.StringIO())
    console.print(means_table(made_up(kfac=0.8), 2, "made up"))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["kfac", "0.6000", "0.5000", "0.8000", "0.8000", "0.5000"] in lines
    assert ["lanczos", "0.2000", "0.4000"] in lines
    plot_errors(made_up(), tmp_path / "errors.png", "made up", 2)
    assert (tmp_path / "errors.png").read_bytes()[:8] == PNG


@pytest.mark.slow
def test_one_compilation_serves_all_measurements(config, tmp_path, monkeypatch):
    traced = []
    original = diagnose_lib.make_measure

    def counted(*arguments):
        measure, state = original(*arguments)
        return functools.wraps(measure)(lambda *inputs: traced.append(1) or measure(*inputs)), state

    monkeypatch.setattr(diagnose_lib, "make_measure", counted)
    assert len(diagnose(config, tmp_path, console=QUIET).series.steps) == 7
    assert len(traced) == 1
