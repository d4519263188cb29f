"""Losses as they are trained and reported, evaluation, the statistics of batch norm, dropout, and texts."""

from __future__ import annotations

import csv
import functools
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from kfe_optax.experiments import models
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import make_job, make_layers
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.train import train

from . import normed

QUIET = Console(quiet=True)
ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 30


@pytest.fixture
def config(tiny_config, monkeypatch):
    """The tiny images for a model with batch norm."""
    return normed.use(tiny_config, monkeypatch)


@pytest.fixture
def text_config(tiny_config, tmp_path):
    """A recurrent model of a short text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    tiny_config.data_dir = str(path)
    tiny_config.data.length = 9
    tiny_config.model = ConfigDict({"kind": "recurrent", "width": 7, "embedding": 5})
    tiny_config.loss = "softmax_cross_entropy"
    return tiny_config


def loss_curve(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def statistics(state):
    return state.model_state["batch_stats"]["norm"]


# --- Losses ----------------------------------------------------------------------------------------


def example_losses(name, outputs, batch):
    """The losses of the examples by Optax, and their other measure."""
    if name == "softmax_cross_entropy":
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
        return losses, outputs.argmax(-1) == batch["label"]
    images = batch["image"]
    if name == "squared_error":
        return jnp.square(outputs - images), jnp.square(outputs - images).sum(-1)
    errors = jnp.square(jax.nn.sigmoid(outputs) - images).sum(-1)
    return optax.losses.sigmoid_binary_cross_entropy(outputs, images), errors


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "sigmoid_binary_cross_entropy", "squared_error"])
def test_losses_are_trained_as_sums_and_reported_as_means(tiny_config, loss, monkeypatch):
    """Over the 64 pixels of an autoencoder; of a classifier the two are one."""
    classes = loss == "softmax_cross_entropy"
    tiny_config.update(loss=loss)
    tiny_config.model.update(
        kind="classifier" if classes else "autoencoder", sizes=(64, 3 if classes else 64)
    )
    dataset = load(tiny_config)
    task = make_task(tiny_config, dataset)
    params, state = jax.jit(task.init)(jax.random.key(0), dataset.train_images[:1])
    assert not state
    images, labels = dataset.splits()["train"]
    batch = {"image": images, "label": labels}
    outputs = np.asarray(jax.jit(task.model.apply)({"params": params}, images))
    losses, others = map(np.asarray, example_losses(loss, outputs, batch))
    trained = jax.jit(task.loss_fn)(params, batch)
    np.testing.assert_allclose(trained, losses.sum() / 72, rtol=1e-6)
    # Every image counts once, whatever the size of the evaluation's batches.
    for batch_size in (1000, 50):
        monkeypatch.setattr("kfe_optax.experiments.task._EVALUATION_BATCH", batch_size)
        measures = task.evaluate(params, images, labels)
        np.testing.assert_allclose(measures["loss"], losses.mean(), rtol=1e-6)
        other = measures["accuracy" if classes else "squared_error"]
        np.testing.assert_allclose(other, others.mean(), rtol=1e-6)
    np.testing.assert_allclose(trained * task.loss_scale, losses.mean(), rtol=1e-6)


@pytest.fixture(scope="module")
def linear():
    """The deep linear network's config with fewer layers and examples, and its data."""
    config = load_config(str(ROOT / "configs" / "deep_linear.py"))
    config.model.depth = 5
    config.data.update(train_size=96, test_size=20)
    config.batch_size = 32
    return config, load(config)


def test_the_loss_of_a_regression_is_the_squared_error_of_the_targets(linear):
    config, dataset = linear
    task = make_task(config, dataset)
    params, state = jax.jit(task.init)(jax.random.key(0), dataset.train_images[:1])
    images, targets = dataset.splits()["test"]
    errors = np.square(np.asarray(jax.jit(task.model.apply)({"params": params, **state}, images)) - targets)
    measures = task.evaluate(params, images, targets, state)
    np.testing.assert_allclose(measures["loss"], errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(measures["squared_error"], errors.sum(-1).mean(), rtol=1e-5)
    loss, moved = jax.jit(task.loss_fn)(params, {"image": images, "label": targets}, state)
    apply = functools.partial(task.model.apply, train=True, mutable=["batch_stats"])
    trained = np.asarray(jax.jit(apply)({"params": params, **state}, images)[0])
    np.testing.assert_allclose(loss, np.square(trained - targets).sum(-1).mean(), rtol=1e-5)
    assert not np.allclose(moved["batch_stats"]["first"]["norm"]["mean"], 0)


@pytest.mark.parametrize(
    ("depth", "batch_norm", "initializer"),
    [(5, True, "normal"), pytest.param(2, False, "orthogonal", marks=pytest.mark.slow)],
)
def test_the_linear_network_is_linear_and_has_its_depth(linear, depth, batch_norm, initializer):
    config, dataset = linear
    config = config.copy_and_resolve_references()
    config.model.update(depth=depth, batch_norm=batch_norm, initializer=initializer)
    task = make_task(config, dataset)
    params, state = jax.jit(task.init)(jax.random.key(0), dataset.train_images[:1])
    layers = [layer for layer in make_layers(config, dataset).values() if layer.kind.name == "dense"]
    assert sum(int(np.prod(layer.stacked)) for layer in layers) == depth
    assert bool(state) == batch_norm
    # In evaluation a batch norm is an affine map of each example.
    outputs = task.model.apply({"params": params, **state}, dataset.train_images)
    x = np.c_[dataset.train_images, np.ones(96)]
    np.testing.assert_allclose(outputs, x @ np.linalg.lstsq(x, outputs, rcond=None)[0], atol=1e-4)
    kernel = params["first"]["dense"]["kernel"]
    assert np.allclose(kernel.T @ kernel, np.eye(10), atol=1e-4) == (initializer == "orthogonal")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": "squared_error"}, "kind 'classifier' choose one of softmax_cross_entropy"),
        (
            {"model.kind": "autoencoder", "model.sizes": (64, 2, 64)},
            "kind 'autoencoder' choose one of sigmoid_binary",
        ),
    ],
)
def test_losses_that_do_not_fit_are_one_sentence(tiny_classifier, linear, changes, sentence):
    dataset = load(tiny_classifier)
    zeros = {name: 0 * getattr(dataset, name) for name in ("train_labels", "test_labels")}
    with pytest.raises(ExperimentError, match="have no labels"):
        make_task(tiny_classifier, dataset._replace(**zeros))
    tiny_classifier.update_from_flattened_dict(changes)
    with pytest.raises(ExperimentError, match=sentence):
        make_task(tiny_classifier, dataset)
    config = linear[0].copy_and_resolve_references()
    config.loss = "sigmoid_binary_cross_entropy"
    with pytest.raises(ExperimentError, match="kind 'linear' choose one of squared_error"):
        make_task(config, linear[1])


# --- Batch norm ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.nightly), "kfac"])
def test_a_step_moves_the_running_statistics_by_a_tenth_of_the_batchs(config, optimizer):
    dataset = load(config)
    job = make_job(config, optimizer, dataset, 5)
    params = jax.tree.map(np.asarray, job.state.params)
    before = jax.tree.map(np.asarray, statistics(job.state))
    batch = job.batches(0)
    state, loss = job.step(job.state, batch)
    x = batch["image"] @ params["first"]["kernel"] + params["first"]["bias"]
    np.testing.assert_allclose(
        statistics(state)["mean"], 0.9 * before["mean"] + 0.1 * x.mean(0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(statistics(state)["var"], 0.9 * before["var"] + 0.1 * x.var(0), rtol=1e-4)
    # The loss is that of the batch's own statistics, as it is trained.
    normal = np.maximum(0, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
    logits = normal @ params["last"]["kernel"] + params["last"]["bias"]
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_evaluation_takes_the_running_statistics(config):
    dataset = load(config)
    task = make_task(config, dataset)
    params, state = jax.jit(task.init)(jax.random.key(0), dataset.train_images[:1])
    state = jax.tree.map(lambda leaf: leaf + 0.3, state)
    images, labels = dataset.test_images, dataset.test_labels
    logits = jax.jit(task.model.apply)({"params": params, **state}, images)
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    measures = task.evaluate(params, images, labels, state)
    np.testing.assert_allclose(measures["loss"], expected, rtol=1e-6)
    # No example sees another: the measures of parts add up to those of the whole.
    parts = [task.evaluate(params, images[rows], labels[rows], state) for rows in (slice(5), slice(5, None))]
    whole = (5 * parts[0]["loss"] + (len(images) - 5) * parts[1]["loss"]) / len(images)
    np.testing.assert_allclose(measures["loss"], whole, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "dropout"),
    [
        pytest.param("adam", 0.2, marks=pytest.mark.nightly),
        pytest.param("kfac", 0.0, marks=pytest.mark.nightly),
        ("ekfac", 0.2),
    ],
)
def test_a_resumed_run_with_state_is_bit_exact(config, tmp_path, monkeypatch, optimizer, dropout):
    config.optimizer = optimizer
    config.model.dropout = dropout
    whole = train(config, tmp_path / "whole", console=QUIET)
    assert np.abs(statistics(whole.state)["mean"]).max() > 1e-3
    original = Batches.__call__

    def interrupted_at_three(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(Batches, "__call__", interrupted_at_three)
    assert train(config, tmp_path / "parts", console=QUIET).interrupted
    monkeypatch.undo()
    monkeypatch.setitem(models.KINDS, "normed", normed.Normed)
    resumed = train(config, tmp_path / "parts", resume=True, console=QUIET)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert resumed.measures == whole.measures
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")


# --- Dropout ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.nightly), "kfac"])
def test_the_key_of_a_step_draws_its_dropout(config, optimizer):
    config.model.update(dropout=0.5, batch_norm=False)
    dataset = load(config)
    job = make_job(config, optimizer, dataset, 5)
    assert not job.task.has_state
    params, batch = jax.tree.map(jnp.array, job.state.params), job.batches(0)
    key = jax.random.fold_in(jax.random.split(jax.random.key(config.seed))[1], 0)
    _, loss = job.step(job.state, batch)
    np.testing.assert_allclose(loss, job.task.loss_fn(params, batch, {}, key), rtol=1e-6)
    other = job.task.loss_fn(params, batch, {}, jax.random.key(7))
    assert abs(float(other) - float(loss)) > 1e-4
    with pytest.raises(ValueError, match="The model has dropout"):
        job.task.loss_fn(params, batch)


# --- Texts -----------------------------------------------------------------------------------------


def test_the_loss_of_a_text_is_the_mean_over_its_characters(text_config, monkeypatch):
    dataset = load(text_config)
    task = make_task(text_config, dataset)
    params, state = jax.jit(task.init)(jax.random.key(0), dataset.train_images[:1])
    assert not state
    tokens, following = dataset.test_images, dataset.test_labels
    assert tokens.shape == following.shape == (len(tokens), 9)
    logits = jax.jit(task.model.apply)({"params": params}, tokens)
    assert logits.shape == (*tokens.shape, dataset.vocabulary)
    expected = jax.jit(optax.losses.softmax_cross_entropy_with_integer_labels)(logits, following).mean()
    loss = jax.jit(task.loss_fn)(params, {"image": tokens, "label": following})
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    measures = task.evaluate(params, tokens, following)
    np.testing.assert_allclose(measures["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(measures["accuracy"], np.mean(logits.argmax(-1) == following), rtol=1e-6)
    assert task.loss_name == "cross-entropy, mean over characters"
    # A long text has an activation a character.
    assert task.evaluation_batch == 1000
    monkeypatch.setattr("kfe_optax.experiments.task._EVALUATION_POSITIONS", 18)
    assert task.evaluation_batch == 2
    parts = task.evaluate(params, tokens, following)
    np.testing.assert_allclose(parts["loss"], measures["loss"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.nightly), "kfac"])
def test_a_text_is_learned(text_config, tmp_path, optimizer):
    text_config.update(optimizer=optimizer, steps=30)
    outcome = train(text_config, tmp_path / "run", console=QUIET)
    curve = loss_curve(tmp_path / "run")
    # From log(vocabulary) nats to less than the text's own frequencies leave.
    assert float(curve[1][1]) == pytest.approx(np.log(load(text_config).vocabulary), rel=0.1)
    assert outcome.measures["test_loss"] < float(curve[1][1]) - 0.2
