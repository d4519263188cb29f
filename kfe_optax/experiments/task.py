"""What is trained and what is reported: a model, its loss, and its evaluation on a whole set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from kfe_optax import losses
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.models import make_model

Params = Any
Batch = Mapping[str, jax.typing.ArrayLike]
Measures = dict[str, jax.Array]

_EVALUATION_BATCH = 1000


class Task(NamedTuple):
    """A model with its loss.

    ``loss_fn`` is what an optimizer differentiates, and ``loss_scale`` times it is what people
    read: an autoencoder is trained on the sum over pixels, because that is the negative
    log-likelihood of an image and gives damping and step sizes their usual meaning, and is
    reported as the mean over pixels, which compares across image sizes.
    """

    model: nn.Module
    loss_fn: Callable[[Params, Batch], jax.Array]
    loss_scale: float
    loss_name: str
    measure: Callable[[Params, Batch, jax.typing.ArrayLike], Measures]

    def evaluate(self, params: Params, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The means of ``loss`` and the task's other measures over all of ``images``.

        Every image counts once: the last batch is padded to the common shape, so that one
        compilation serves all, and the padding has weight zero.
        """
        sums: dict[str, float] = {}
        batch_size = min(_EVALUATION_BATCH, len(images))
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, start + batch_size)
            weights = (rows < len(images)).astype(np.float32)
            rows = np.minimum(rows, len(images) - 1)
            batch = {"image": images[rows], "label": labels[rows]}
            for name, value in self.measure(params, batch, weights).items():
                # Python floats: 50,000 images summed in float32 would lose the fifth digit.
                sums[name] = sums.get(name, 0.0) + float(value)
        return {name: value / len(images) for name, value in sums.items()}


def make_task(config: ConfigDict, dataset: Dataset) -> Task:
    """The task that ``config.model`` and ``config.loss`` describe.

    Example::

        task = make_task(config, dataset)
        loss, grads = jax.value_and_grad(task.loss_fn)(params, batch)
    """
    model = make_model(config.model, dataset.pixels)
    if config.model.kind == "classifier":
        return _classification(model, config.loss, dataset, tuple(config.model.sizes)[-1])
    return _autoencoding(model, config.loss, dataset.pixels)


def _autoencoding(model: nn.Module, loss: str, pixels: int) -> Task:
    if loss not in _PIXEL_LOSSES:
        raise ExperimentError(
            f"config.loss is '{loss}'; for an autoencoder choose one of {', '.join(_PIXEL_LOSSES)}."
        )
    pixel_loss, mean_of_outputs, words = _PIXEL_LOSSES[loss]

    def image_losses(outputs: jax.Array, batch: Batch) -> jax.Array:
        return pixel_loss(outputs, batch["image"]).sum(axis=-1)

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        return image_losses(_outputs(model, params, batch), batch).mean()

    @jax.jit
    def measure(params: Params, batch: Batch, weights: jax.Array) -> Measures:
        outputs = _outputs(model, params, batch)
        errors = jnp.square(mean_of_outputs(outputs) - batch["image"]).sum(axis=-1)
        return {
            "loss": jnp.sum(weights * image_losses(outputs, batch)) / pixels,
            "squared_error": jnp.sum(weights * errors),
        }

    return Task(model, loss_fn, 1.0 / pixels, f"{words}, mean over pixels", measure)


def _classification(model: nn.Module, loss: str, dataset: Dataset, classes: int) -> Task:
    if loss != "softmax_cross_entropy":
        raise ExperimentError(f"config.loss is '{loss}'; for a classifier set it to 'softmax_cross_entropy'.")
    highest = int(max(dataset.train_labels.max(), dataset.test_labels.max()))
    if highest == 0:
        raise ExperimentError(
            f"The data ({dataset.source}) have no labels to classify by; set config.model.kind to 'autoencoder'."
        )
    if highest >= classes:
        raise ExperimentError(
            f"The labels go up to {highest} and config.model.sizes ends with {classes}; let it "
            f"end with at least {highest + 1}."
        )

    def image_losses(logits: jax.Array, batch: Batch) -> jax.Array:
        return losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        return image_losses(_outputs(model, params, batch), batch).mean()

    @jax.jit
    def measure(params: Params, batch: Batch, weights: jax.Array) -> Measures:
        logits = _outputs(model, params, batch)
        correct = logits.argmax(axis=-1) == batch["label"]
        return {
            "loss": jnp.sum(weights * image_losses(logits, batch)),
            "accuracy": jnp.sum(weights * correct),
        }

    return Task(model, loss_fn, 1.0, "cross-entropy", measure)


def _outputs(model: nn.Module, params: Params, batch: Batch) -> jax.Array:
    # Flax types a call as one that may also return changed variables; these models have none.
    return cast(jax.Array, model.apply({"params": params}, batch["image"]))


# For each loss of pixels: the function, the mean of its predictive distribution, and its name.
_PIXEL_LOSSES: dict[str, tuple[Callable, Callable[[jax.Array], jax.Array], str]] = {
    "sigmoid_binary_cross_entropy": (
        losses.sigmoid_binary_cross_entropy,
        jax.nn.sigmoid,
        "cross-entropy",
    ),
    "squared_error": (losses.squared_error, lambda outputs: outputs, "squared error"),
}
