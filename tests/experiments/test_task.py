"""Losses as they are trained and as they are reported, and evaluation over whole sets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.task import make_task


def initial(task, dataset):
    return task.model.init(jax.random.key(0), dataset.train_images[:1])["params"]


def test_an_autoencoder_is_trained_on_the_sum_and_reported_as_the_mean(tiny_config):
    dataset = load(tiny_config)
    task = make_task(tiny_config, dataset)
    params = initial(task, dataset)
    images = dataset.train_images
    logits = task.model.apply({"params": params}, images)
    pixel_losses = optax.losses.sigmoid_binary_cross_entropy(logits, images)
    batch = {"image": images, "label": dataset.train_labels}
    np.testing.assert_allclose(task.loss_fn(params, batch), pixel_losses.sum(-1).mean(), rtol=1e-6)
    measures = task.evaluate(params, images, dataset.train_labels)
    np.testing.assert_allclose(measures["loss"], pixel_losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(task.loss_fn(params, batch) * task.loss_scale, measures["loss"], rtol=1e-6)
    errors = jnp.square(jax.nn.sigmoid(logits) - images).sum(-1)
    np.testing.assert_allclose(measures["squared_error"], errors.mean(), rtol=1e-6)


def test_a_squared_error_has_linear_outputs(tiny_config):
    tiny_config.loss = "squared_error"
    dataset = load(tiny_config)
    task = make_task(tiny_config, dataset)
    params = initial(task, dataset)
    outputs = task.model.apply({"params": params}, dataset.test_images)
    expected = np.square(outputs - dataset.test_images).mean()
    measures = task.evaluate(params, dataset.test_images, dataset.test_labels)
    np.testing.assert_allclose(measures["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(measures["squared_error"], 64 * expected, rtol=1e-6)


def test_a_classifier_reports_loss_and_accuracy(tiny_classifier):
    dataset = load(tiny_classifier)
    task = make_task(tiny_classifier, dataset)
    params = initial(task, dataset)
    logits = task.model.apply({"params": params}, dataset.test_images)
    measures = task.evaluate(params, dataset.test_images, dataset.test_labels)
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, dataset.test_labels)
    np.testing.assert_allclose(measures["loss"], expected.mean(), rtol=1e-6)
    assert measures["accuracy"] == np.mean(logits.argmax(-1) == dataset.test_labels)


def test_every_image_counts_once_whatever_the_evaluation_batch(tiny_config, monkeypatch):
    dataset = load(tiny_config)
    task = make_task(tiny_config, dataset)
    params = initial(task, dataset)
    arguments = (params, dataset.train_images, dataset.train_labels)
    whole = task.evaluate(*arguments)
    for batch_size in (72, 50, 7, 1):
        monkeypatch.setattr("kfe_optax.experiments.task._EVALUATION_BATCH", batch_size)
        np.testing.assert_allclose(task.evaluate(*arguments)["loss"], whole["loss"], rtol=1e-6)


def test_losses_that_do_not_fit_are_one_sentence(tiny_classifier):
    dataset = load(tiny_classifier)
    tiny_classifier.loss = "squared_error"
    with pytest.raises(ExperimentError, match="for a classifier set it to"):
        make_task(tiny_classifier, dataset)
    tiny_classifier.loss = "softmax_cross_entropy"
    unlabeled = dataset._replace(
        train_labels=np.zeros_like(dataset.train_labels), test_labels=np.zeros_like(dataset.test_labels)
    )
    with pytest.raises(ExperimentError, match="have no labels"):
        make_task(tiny_classifier, unlabeled)
    tiny_classifier.model.sizes = (64, 2)
    with pytest.raises(ExperimentError, match="at least 3"):
        make_task(tiny_classifier, dataset)
    tiny_classifier.model.update(kind="autoencoder", sizes=(64, 2, 64))
    with pytest.raises(ExperimentError, match="for an autoencoder choose one of"):
        make_task(tiny_classifier, dataset)
