"""Planted targets, the deep linear network, and the comparison over seeds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import make_job, make_layers
from kfe_optax.experiments.planted import planted_targets
from kfe_optax.experiments.repeats import band, repeat
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.train import evaluate

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


def test_planted_targets_are_a_linear_map_of_the_inputs():
    dataset = planted_targets(4000, 1000, inputs=10, outputs=3, noise=0.0)
    x, y = dataset.train_images.astype(float), dataset.train_labels.astype(float)
    assert x.shape == (4000, 10)
    assert y.shape == (4000, 3)
    assert dataset.outputs == 3
    assert "4,000 training and 1,000 test inputs of 10 numbers, 3 targets each" in dataset.summary()
    planted = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(x @ planted, y, atol=1e-5)
    np.testing.assert_allclose(dataset.test_images @ planted, dataset.test_labels, atol=1e-5)
    np.testing.assert_allclose(np.cov(x.T), np.eye(10), atol=0.1)
    assert not set(x[:, 0]) & set(dataset.test_images[:, 0].astype(float))
    noisy = planted_targets(4000, 1000, inputs=10, outputs=3, noise=0.5)
    residual = noisy.train_labels - noisy.train_images @ planted
    assert residual.std() == pytest.approx(0.5, rel=0.05)
    # More of one set changes neither the map nor the first examples.
    fewer = planted_targets(10, 7, inputs=10, outputs=3, noise=0.5)
    np.testing.assert_array_equal(fewer.train_labels, noisy.train_labels[:10])
    np.testing.assert_array_equal(fewer.test_labels, noisy.test_labels[:7])
    other = planted_targets(10, 7, inputs=10, outputs=3, noise=0.5, seed=1)
    assert not np.allclose(other.train_images, fewer.train_images)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("depth", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_the_network_is_linear_and_has_its_depth(config, batch_norm, depth):
    config.model.update(batch_norm=batch_norm, depth=depth)
    dataset = load(config)
    task = make_task(config, dataset)
    params, state = task.init(jax.random.key(0), dataset.train_images[:1])
    layers = make_layers(config, dataset)
    dense = [layer for layer in layers.values() if layer.kind.name == "dense"]
    assert sum(int(np.prod(layer.stacked)) for layer in dense) == depth
    assert bool(state) == batch_norm
    # In evaluation a batch norm is an affine map of each example.
    outputs = task.model.apply({"params": params, **state}, dataset.train_images)
    x = np.c_[dataset.train_images, np.ones(96)]
    fit = x @ np.linalg.lstsq(x, outputs, rcond=None)[0]
    np.testing.assert_allclose(outputs, fit, atol=1e-4)


@pytest.mark.slow
def test_initial_kernels_keep_the_size(config):
    config.model.update(width=40, depth=12)
    dataset = load(config)
    for initializer in ("normal", "orthogonal"):
        config.model.initializer = initializer
        params, _ = make_task(config, dataset).init(jax.random.key(0), dataset.train_images[:1])
        kernels = params["hidden"]["dense"]["kernel"]
        assert kernels.shape == (10, 40, 40)
        assert float(40 * kernels.var()) == pytest.approx(1.0, rel=0.1)
        gram = jnp.einsum("sij,sik->sjk", kernels, kernels)
        assert np.allclose(gram, np.eye(40), atol=1e-4) == (initializer == "orthogonal")


def test_the_loss_is_the_squared_error_of_the_targets(config):
    dataset = load(config)
    task = make_task(config, dataset)
    params, state = task.init(jax.random.key(0), dataset.train_images[:1])
    outputs = task.model.apply({"params": params, **state}, dataset.test_images)
    errors = np.square(outputs - dataset.test_labels)
    measures = evaluate(task, params, dataset, state)
    np.testing.assert_allclose(measures["test_loss"], errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(measures["test_squared_error"], errors.sum(-1).mean(), rtol=1e-5)
    batch = {"image": dataset.test_images, "label": dataset.test_labels}
    loss, moved = task.loss_fn(params, batch, state)
    train_mode, _ = task.model.apply(
        {"params": params, **state}, dataset.test_images, train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(loss, np.square(train_mode - dataset.test_labels).sum(-1).mean(), rtol=1e-5)
    assert not np.allclose(moved["batch_stats"]["first"]["norm"]["mean"], 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.depth": 1}, "at least 2 layers"),
        ({"model.initializer": "uniform"}, "choose one of normal, orthogonal"),
        ({"loss": "sigmoid_binary_cross_entropy"}, "for planted targets choose one of squared_error"),
        ({"data.name": "curves", "data.train_size": 3}, "predicts targets, and the data .* have labels"),
        (
            {"model": ConfigDict({"kind": "vision_transformer"}), "loss": "softmax_cross_entropy"},
            "without height and width",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(config, changes, sentence):
    config.update_from_flattened_dict({k: v for k, v in changes.items() if k != "model"})
    config.model = changes.get("model", config.model)
    with pytest.raises(ExperimentError, match=sentence):
        make_task(config, load(config))


def test_classes_are_not_targets(tiny_classifier, config):
    tiny_classifier.model.sizes = (10, 3)
    with pytest.raises(ExperimentError, match="have targets, not classes"):
        make_task(tiny_classifier, load(config))


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


# --- Over seeds ------------------------------------------------------------------------------------


def test_a_band_is_students_of_the_logarithms():
    band_of_two = band(np.array([[0.1, 1.0], [0.4, 1.0]]))
    np.testing.assert_allclose(band_of_two.mean, [0.2, 1.0])
    # t of one degree of freedom at 97.5 % is 12.706; the deviation of (−1, 1)·ln 2 is √2 ln 2.
    np.testing.assert_allclose(band_of_two.high, [0.2 * 2**12.7062, 1.0], rtol=1e-4)
    np.testing.assert_allclose(band_of_two.low * band_of_two.high, np.square(band_of_two.mean))
    alone = band(np.array([[0.3]]))
    np.testing.assert_allclose([alone.mean[0], alone.low[0], alone.high[0]], 0.3)


@pytest.mark.nightly
def test_repeats_are_the_jobs_of_their_seeds(config):
    dataset = load(config)
    curves = repeat(config, ("sgd", "kfac"), dataset, seeds=(4, 5), every=3)
    for runs in curves:
        np.testing.assert_array_equal(runs.steps, [3, 6, 7])
        assert np.all(np.diff(runs.seconds, axis=1) > 0)
        config.seed = 5
        job = make_job(config, runs.name, dataset, config.steps)
        state, losses = job.state, []
        for step in range(7):
            state, loss = job.step(state, job.batches(step))
            losses.append(float(loss))
        expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
        np.testing.assert_allclose(runs.losses[1], expected, rtol=1e-5)
        assert not np.allclose(runs.losses[0], expected)
    # The same start and batches for all.
    np.testing.assert_allclose(*(runs.losses[:, 0] for runs in curves), rtol=0.2)


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
    record = json.loads((tmp_path / "two_level.json").read_text())
    assert np.shape(record["optimizers"]["adam"]["losses"]) == (2, 2)
    assert record["seeds"] == [0, 1]
    assert record["config"].endswith("small.py steps=4 model.initializer=orthogonal")
    assert (tmp_path / "two_level.png").stat().st_size > 10_000
