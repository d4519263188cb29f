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
from kfe_optax.experiments.models import Autoencoder, Classifier, LinearNetwork, make_model

Params = Any
State = Any
Batch = Mapping[str, jax.typing.ArrayLike]
Measures = dict[str, jax.Array]

_EVALUATION_BATCH = 1000
# Images under convolutions and texts have an activation a position, so that fewer of them fit in memory.
_EVALUATION_POSITIONS = 2**17
# Sets a step's dropout apart from its sampled targets, which take the step's key itself.
_DROPOUT = 0x64726F70


class Task(NamedTuple):
    """A model with its loss.

    ``loss_fn`` is what an optimizer differentiates, and ``loss_scale`` times it is what people
    read: an autoencoder is trained on the sum over pixels, because that is the negative
    log-likelihood of an image and gives damping and step sizes their usual meaning, and is
    reported as the mean over pixels, which compares across image sizes. So is a regression, for its
    outputs.

    What moves in a model besides its parameters, the running statistics of batch norm, is its
    ``state``, ``{}`` for most models. ``loss_fn(params, batch, state, key)`` returns the loss, or
    ``(loss, state)`` where ``has_state`` is set; the key draws its dropout. Evaluation takes the
    state as it is and drops nothing.
    """

    model: nn.Module
    loss_fn: Callable[..., Any]
    loss_scale: float
    loss_name: str
    measure: Callable[..., Measures]
    has_state: bool = False
    positions: int = 1
    layers: str = ""  # see `layer_options`

    def init(self, key: jax.Array, images: jax.typing.ArrayLike) -> tuple[Params, State]:
        """The initial parameters and state; ``images`` only give the shapes."""
        variables = dict(self.model.init(key, images))
        return variables.pop("params"), variables

    @property
    def evaluation_batch(self) -> int:
        """How many images are evaluated at once."""
        return max(1, min(_EVALUATION_BATCH, _EVALUATION_POSITIONS // self.positions))

    def evaluate(
        self, params: Params, images: np.ndarray, labels: np.ndarray, state: State | None = None
    ) -> dict[str, float]:
        """The means of ``loss`` and the task's other measures over all of ``images``.

        Every image counts once: the last batch is padded to the common shape, so that one
        compilation serves all, and the padding has weight zero.
        """
        sums: dict[str, float] = {}
        batch_size = min(self.evaluation_batch, len(images))
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, start + batch_size)
            weights = (rows < len(images)).astype(np.float32)
            rows = np.minimum(rows, len(images) - 1)
            batch = {"image": images[rows], "label": labels[rows]}
            for name, value in self.measure(params, batch, weights, state or {}).items():
                # Python floats: 50,000 images summed in float32 would lose the fifth digit.
                sums[name] = sums.get(name, 0.0) + float(value)
        return {name: value / len(images) for name, value in sums.items()}


def make_task(config: ConfigDict, dataset: Dataset) -> Task:
    """The task that ``config.model`` and ``config.loss`` describe.

    Example::

        task = make_task(config, dataset)
        params, _ = task.init(key, batch["image"])
        loss, grads = jax.value_and_grad(task.loss_fn)(params, batch)
    """
    return _of_config(config, dataset)._replace(layers=config.get("layers", ""))


def _of_config(config: ConfigDict, dataset: Dataset) -> Task:
    model = make_model(config.model, dataset)
    if isinstance(model, Autoencoder):
        return _regression(model, config.loss, _Targets("an autoencoder", "image", dataset.pixels, "pixels"))
    if isinstance(model, LinearNetwork):
        return _regression(
            model, config.loss, _Targets("planted targets", "label", dataset.outputs, "outputs")
        )
    if dataset.vocabulary:
        return _classification(model, config.loss, "cross-entropy, mean over characters", dataset.pixels)
    _check_labels(config, dataset, model)
    positions = 1 if isinstance(model, Classifier) else dataset.pixels
    return _classification(model, config.loss, "cross-entropy", positions)


class _Targets(NamedTuple):
    """What a model predicts number by number."""

    name: str
    field: str  # of the batch
    count: int
    plural: str  # of one number


def _regression(model: nn.Module, loss: str, targets: _Targets) -> Task:
    """Numbers (n, count): the pixels of an autoencoder's own images, or targets."""
    choices = [name for name in _VALUE_LOSSES if targets.field == "image" or name not in _OF_PROBABILITIES]
    if loss not in choices:
        raise ExperimentError(
            f"config.loss is '{loss}'; for {targets.name} choose one of {', '.join(choices)}."
        )
    value_loss, mean_of_outputs, words = _VALUE_LOSSES[loss]

    def example_losses(outputs: jax.Array, batch: Batch) -> jax.Array:
        return value_loss(outputs, batch[targets.field]).sum(axis=-1)

    def measures(outputs: jax.Array, batch: Batch, weights: jax.Array) -> Measures:
        errors = jnp.square(mean_of_outputs(outputs) - batch[targets.field]).sum(axis=-1)
        return {
            "loss": jnp.sum(weights * example_losses(outputs, batch)) / targets.count,
            "squared_error": jnp.sum(weights * errors),
        }

    scale, name = 1.0 / targets.count, f"{words}, mean over {targets.plural}"
    return _task(model, example_losses, measures, scale, name)


def _classification(model: nn.Module, loss: str, loss_name: str, positions: int) -> Task:
    """Classes of images, logits (n, classes), or the next characters of texts, (n, length, vocabulary)."""
    if loss != "softmax_cross_entropy":
        raise ExperimentError(f"config.loss is '{loss}'; for a classifier set it to 'softmax_cross_entropy'.")

    def label_losses(logits: jax.Array, batch: Batch) -> jax.Array:
        return losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def of_example(values: jax.Array) -> jax.Array:
        # The mean over a text's characters.
        return values.reshape(len(values), -1).mean(axis=-1)

    def measures(logits: jax.Array, batch: Batch, weights: jax.Array) -> Measures:
        correct = logits.argmax(axis=-1) == batch["label"]
        return {
            "loss": jnp.sum(weights * of_example(label_losses(logits, batch))),
            "accuracy": jnp.sum(weights * of_example(correct)),
        }

    return _task(model, label_losses, measures, 1.0, loss_name, positions)


def _check_labels(config: ConfigDict, dataset: Dataset, model: nn.Module) -> None:
    """Refuses images without labels, and labels without a class."""
    if dataset.outputs:
        raise ExperimentError(
            f"The data ({dataset.source}) have targets, not classes; set config.model.kind to 'linear'."
        )
    highest = int(max(dataset.train_labels.max(), dataset.test_labels.max()))
    if highest == 0:
        raise ExperimentError(
            f"The data ({dataset.source}) have no labels to classify by; set config.model.kind to 'autoencoder'."
        )
    if isinstance(model, Classifier):
        classes, setting = model.sizes[-1], f"config.model.sizes ends with {model.sizes[-1]}; let it end with"
    else:
        classes = cast(Any, model).classes
        setting = f"config.model.classes is {classes}; set it to"
    if highest >= classes:
        raise ExperimentError(f"The labels go up to {highest} and {setting} at least {highest + 1}.")


def _task(
    model: nn.Module,
    losses_of: Callable[[jax.Array, Batch], jax.Array],
    measures: Callable[[jax.Array, Batch, jax.Array], Measures],
    loss_scale: float,
    loss_name: str,
    positions: int = 1,
) -> Task:
    """The task whose training loss is the mean of ``losses_of(outputs, batch)``."""
    has_state = getattr(model, "batch_norm", False)
    has_dropout = getattr(model, "dropout", 0.0) > 0.0
    # The other models make no difference between training and evaluation.
    training: dict[str, Any] = {"train": True} if has_state or has_dropout else {}

    def loss_fn(
        params: Params, batch: Batch, state: State | None = None, key: jax.Array | None = None
    ) -> Any:
        variables = {"params": params, **(state or {})}
        rngs = {"dropout": jax.random.fold_in(_given(key), _DROPOUT)} if has_dropout else None
        if not has_state:
            outputs = model.apply(variables, batch["image"], rngs=rngs, **training)
            return losses_of(cast(jax.Array, outputs), batch).mean()
        outputs, moved = model.apply(
            variables, batch["image"], rngs=rngs, mutable=list(state or {}), **training
        )
        return losses_of(cast(jax.Array, outputs), batch).mean(), moved

    @jax.jit
    def measure(params: Params, batch: Batch, weights: jax.Array, state: State) -> Measures:
        outputs = cast(jax.Array, model.apply({"params": params, **state}, batch["image"]))
        return measures(outputs, batch, weights)

    return Task(model, loss_fn, loss_scale, loss_name, measure, has_state, positions)


def _given(key: jax.Array | None) -> jax.Array:
    if key is None:
        raise ValueError("The model has dropout: call loss_fn(params, batch, state, key).")
    return key


# For each loss of numbers: the function, the mean of its predictive distribution, and its name.
_VALUE_LOSSES: dict[str, tuple[Callable, Callable[[jax.Array], jax.Array], str]] = {
    "sigmoid_binary_cross_entropy": (
        losses.sigmoid_binary_cross_entropy,
        jax.nn.sigmoid,
        "cross-entropy",
    ),
    "squared_error": (losses.squared_error, lambda outputs: outputs, "squared error"),
}
_OF_PROBABILITIES = ("sigmoid_binary_cross_entropy",)  # targets between 0 and 1, as pixels are
