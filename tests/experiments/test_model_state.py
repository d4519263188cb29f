"""Models with more than parameters: the statistics of batch norm and dropout in every command; and texts."""

from __future__ import annotations

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from kfe_optax.experiments import models
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.data import load
from kfe_optax.experiments.diagnose import diagnose
from kfe_optax.experiments.job import make_job
from kfe_optax.experiments.sweep_program import make_program
from kfe_optax.experiments.sweep_space import make_space, with_values
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.train import evaluate, train

from . import normed

QUIET = Console(quiet=True)
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


# --- Batch norm ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.slow), "kfac"])
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
    params, state = task.init(jax.random.key(0), dataset.train_images[:1])
    state = jax.tree.map(lambda leaf: leaf + 0.3, state)
    images, labels = dataset.test_images, dataset.test_labels
    logits = task.model.apply({"params": params, **state}, images)
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
        ("kfac", 0.0),
        pytest.param("ekfac", 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_with_state_is_bit_exact(config, tmp_path, monkeypatch, optimizer, dropout):
    config.optimizer = optimizer
    config.model.dropout = dropout
    whole = train(config, tmp_path / "whole", console=QUIET)
    assert np.abs(statistics(whole.state)["mean"]).max() > 1e-3
    original = Batches.__call__

    def interrupted_at_three(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Batches, "__call__", interrupted_at_three)
    assert train(config, tmp_path / "parts", console=QUIET).interrupted
    monkeypatch.undo()
    monkeypatch.setitem(models.KINDS, "normed", models.Kind(normed.Normed))
    resumed = train(config, tmp_path / "parts", resume=True, console=QUIET)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert resumed.measures == whole.measures
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")


@pytest.mark.slow
def test_a_comparison_evaluates_with_the_state(config, tmp_path):
    config.compare.update(optimizers="adam", steps=4)
    (run,) = compare(config, tmp_path / "compare", QUIET)
    config.update(optimizer="adam", steps=4)
    outcome = train(config, tmp_path / "train", console=QUIET)
    assert run.measures == outcome.measures


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", pytest.param("ekfac", marks=pytest.mark.nightly)])
def test_a_trial_of_a_sweep_moves_the_state(config, optimizer):
    config.optimizer = optimizer
    config.model.dropout = 0.2
    config.sweep.update(learning_rate="x0.5,x2", damping="")
    space, dataset = make_space(config), load(config)
    found = make_program(config, space.fields, dataset, 3, chunk=2).run(space.trials)
    for trial, losses in zip(space.trials, found, strict=True):
        alone = config.copy_and_resolve_references()
        alone[optimizer] = with_values(config[optimizer], dict(zip(space.fields, trial.values, strict=True)))
        job = make_job(alone, optimizer, dataset, 3)
        state = job.state
        for step in range(3):
            state, _ = job.step(state, job.batches(step))
        expected = evaluate(job.task, state.params, dataset, state.model_state)
        np.testing.assert_allclose(losses.train_loss, expected["train_loss"], rtol=1e-5)
        np.testing.assert_allclose(losses.test_loss, expected["test_loss"], rtol=1e-5)


@pytest.mark.nightly
def test_a_layer_behind_batch_norm_is_diagnosed(config, tmp_path):
    config.model.dropout = 0.2
    config.diagnose.update(
        layer="last", steps=4, every=2, basis_update_period=4, running_examples=8, tolerance=1e-3
    )
    found = diagnose(config, tmp_path, console=QUIET)
    assert found.series.steps == [0, 2, 4]
    assert np.all(found.series.of("error", "kpsvd") <= found.series.of("error", "kfac") * (1 + 1e-6))
    assert np.all(found.series.of("error", "ekfac") < 1)


# --- Dropout ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "kfac"])
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


def test_the_loss_of_a_text_is_the_mean_over_its_characters(text_config):
    dataset = load(text_config)
    task = make_task(text_config, dataset)
    params, state = task.init(jax.random.key(0), dataset.train_images[:1])
    assert not state
    tokens, following = dataset.test_images, dataset.test_labels
    assert tokens.shape == following.shape == (len(tokens), 9)
    logits = task.model.apply({"params": params}, tokens)
    assert logits.shape == (*tokens.shape, dataset.vocabulary)
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, following).mean()
    np.testing.assert_allclose(
        task.loss_fn(params, {"image": tokens, "label": following}), expected, rtol=1e-6
    )
    measures = task.evaluate(params, tokens, following)
    np.testing.assert_allclose(measures["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(measures["accuracy"], np.mean(logits.argmax(-1) == following), rtol=1e-6)
    assert task.loss_name == "cross-entropy, mean over characters"


def test_long_texts_are_evaluated_in_smaller_batches(text_config, monkeypatch):
    dataset = load(text_config)
    task = make_task(text_config, dataset)
    assert task.evaluation_batch == 1000
    params, _ = task.init(jax.random.key(0), dataset.train_images[:1])
    whole = task.evaluate(params, dataset.train_images, dataset.train_labels)
    monkeypatch.setattr("kfe_optax.experiments.task._EVALUATION_POSITIONS", 70)
    assert task.evaluation_batch == 7
    parts = task.evaluate(params, dataset.train_images, dataset.train_labels)
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "kfac"])
def test_a_text_is_learned(text_config, tmp_path, optimizer):
    text_config.update(optimizer=optimizer, steps=30)
    outcome = train(text_config, tmp_path / "run", console=QUIET)
    curve = loss_curve(tmp_path / "run")
    # From log(vocabulary) nats to less than the text's own frequencies leave.
    assert float(curve[0][1]) == pytest.approx(np.log(load(text_config).vocabulary), rel=0.1)
    assert outcome.measures["test_loss"] < float(curve[0][1]) - 0.2


@pytest.mark.nightly
def test_a_layer_of_a_text_is_diagnosed(text_config, tmp_path):
    text_config.diagnose.update(
        layer="logits", steps=2, every=2, basis_update_period=2, running_examples=4, tolerance=1e-3
    )
    text_config.diagnose.examples = 8
    found = diagnose(text_config, tmp_path, console=QUIET)
    assert np.all(found.series.of("error", "kpsvd") <= found.series.of("error", "kfac") * (1 + 1e-6))
