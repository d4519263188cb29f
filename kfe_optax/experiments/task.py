"""What is trained and what is reported: a model, its loss, and its evaluation on a whole set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError
from ml_collections import ConfigDict

from kfe_optax import losses
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError, require
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
# Each with what the outputs predict, which is compared with the truth, and its words.
_LOSSES: dict[str, tuple[Callable, Callable, str]] = {
    "softmax_cross_entropy": (
        losses.softmax_cross_entropy_with_integer_labels,
        functools.partial(jnp.argmax, axis=-1),
        "cross-entropy",
    ),
    "sigmoid_binary_cross_entropy": (losses.sigmoid_binary_cross_entropy, jax.nn.sigmoid, "cross-entropy"),
    "squared_error": (losses.squared_error, jnp.asarray, "squared error"),
}


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
    measures: tuple[str, str]
    has_state: bool = False
    positions: int = 1
    layers: str = ""  # see `options.configured`

    def init(self, key: jax.Array, images: jax.typing.ArrayLike) -> tuple[Params, State]:
        """The initial parameters and state; ``images`` only give the shapes.

        Raises:
          ExperimentError: the numbers of config.model do not make a network.
        """
        try:
            variables = dict(self.model.init(key, images))
        except ExperimentError:
            raise
        except (TypeError, ValueError, AssertionError, FlaxError) as error:
            raise ExperimentError(f"config.model makes no network of these data: {error}.") from error
        return variables.pop("params"), variables

    @property
    def evaluation_batch(self) -> int:
        """How many images are evaluated at once."""
        return max(1, min(_EVALUATION_BATCH, _EVALUATION_POSITIONS // self.positions))

    def evaluate(
        self, params: Params, images: np.ndarray, labels: np.ndarray, state: State | None = None
    ) -> dict[str, float]:
        """The means of ``loss`` and of ``accuracy`` or ``squared_error``, an example's sum, over all of ``images``.

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
    model: Any = make_model(config.model, dataset)
    field, other, sums, over = "label", "squared_error", 1, "characters" if dataset.vocabulary else ""
    if isinstance(model, Autoencoder):
        field, sums, over = "image", dataset.pixels, "pixels"
        fitting = ["sigmoid_binary_cross_entropy", "squared_error"]
    elif isinstance(model, LinearNetwork):
        sums, over = dataset.outputs, "outputs"
        fitting = ["squared_error"]
    else:
        other, fitting = "accuracy", ["softmax_cross_entropy"]
        _check_labels(dataset, model)
    words = f"config.loss is '{config.loss}'; for config.model.kind '{config.model.kind}' choose one of"
    require(config.loss in fitting, f"{words} {', '.join(fitting)}.")
    loss_of, predict, name = _LOSSES[config.loss]
    has_state = getattr(model, "batch_norm", False)
    has_dropout = getattr(model, "dropout", 0.0) > 0.0
    # The other models make no difference between training and evaluation.
    training: dict[str, Any] = {"train": True} if has_state or has_dropout else {}

    def values(function: Callable, outputs: jax.Array, batch: Batch) -> jax.Array:
        found = function(outputs, batch[field])
        return found.sum(axis=-1) if over in ("pixels", "outputs") else found

    def other_of(outputs: jax.Array, truth: jax.Array) -> jax.Array:
        return predict(outputs) == truth if other == "accuracy" else jnp.square(predict(outputs) - truth)

    def loss_fn(params: Params, batch: Batch, state: State | None = None, key: Any = None) -> Any:
        if has_dropout and key is None:
            raise ValueError("The model has dropout: call loss_fn(params, batch, state, key).")
        rngs = {"dropout": jax.random.fold_in(key, _DROPOUT)} if has_dropout else None
        variables, mutable = {"params": params, **(state or {})}, list(state or {}) if has_state else False
        found: Any = model.apply(variables, batch["image"], rngs=rngs, mutable=mutable, **training)
        outputs, moved = found if has_state else (found, None)
        loss = values(loss_of, outputs, batch).mean()
        return (loss, moved) if has_state else loss

    @jax.jit
    def measure(params: Params, batch: Batch, weights: jax.Array, state: State) -> Measures:
        outputs = model.apply({"params": params, **state}, batch["image"])
        found = {"loss": values(loss_of, outputs, batch) / sums, other: values(other_of, outputs, batch)}
        # The mean over a text's characters.
        return {name: jnp.sum(weights * each.reshape(len(each), -1).mean(-1)) for name, each in found.items()}

    name += f", mean over {over}" * bool(over)
    positions = 1 if isinstance(model, Autoencoder | Classifier | LinearNetwork) else dataset.pixels
    layers, measures = config.get("layers", ""), ("loss", other)
    return Task(model, loss_fn, 1 / sums, name, measure, measures, has_state, positions, layers)


def _check_labels(dataset: Dataset, model: Any) -> None:
    """Refuses images without labels, and labels without a class."""
    highest = max(int(labels.max()) for _, labels in dataset.splits().values())
    words = f"The data ({dataset.source}) have no labels to classify by"
    require(highest > 0, f"{words}; set config.model.kind to 'autoencoder'.")
    classes = dataset.vocabulary or model.classes
    words = f"The labels go up to {highest} and config.model has {classes} classes"
    require(highest < classes, f"{words}; let 'classes', or the last of 'sizes', be at least {highest + 1}.")
