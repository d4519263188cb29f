"""Stacks of dense layers: the autoencoder and the classifier of flat images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.initializers import sparse

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "tanh": jax.numpy.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}

_INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "lecun_normal": nn.initializers.lecun_normal(),
    "he_normal": nn.initializers.he_normal(),
    "glorot_normal": nn.initializers.glorot_normal(),
    "glorot_uniform": nn.initializers.glorot_uniform(),
    "sparse": sparse(),
}


class Autoencoder(nn.Module):
    """Dense layers from ``sizes[0]`` pixels through a narrow code back to as many outputs.

    The outputs are linear: logits for a cross-entropy, values for a squared error. The code, the
    narrowest layer, is linear as well, as in the deep autoencoder of Hinton and Salakhutdinov,
    unless ``linear_code`` is off.

    Example::

        model = Autoencoder(sizes=(784, 250, 30, 250, 784))
        params = model.init(key, images)["params"]
    """

    sizes: Sequence[int]
    activation: str = "relu"
    linear_code: bool = True
    initializer: str = "lecun_normal"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        code = min(range(len(self.sizes)), key=lambda index: self.sizes[index])
        return _dense_stack(self, images, code if self.linear_code else None)


class Classifier(nn.Module):
    """Dense layers from ``sizes[0]`` pixels to ``sizes[-1]`` classes; the outputs are logits."""

    sizes: Sequence[int]
    activation: str = "relu"
    initializer: str = "lecun_normal"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return _dense_stack(self, images, None)


def _dense_stack(module: Autoencoder | Classifier, hidden: jax.Array, linear: int | None) -> jax.Array:
    """The layers of either model; layer ``linear`` and the last one have no activation."""
    last = len(module.sizes) - 1
    for index, size in enumerate(module.sizes[1:], start=1):
        kernel_init = _INITIALIZERS[module.initializer]
        hidden = nn.Dense(size, kernel_init=kernel_init, name=f"dense_{index}")(hidden)
        if index not in (linear, last):
            hidden = _ACTIVATIONS[module.activation](hidden)
    return hidden


def make_dense(settings: ConfigDict, pixels: int) -> Autoencoder | Classifier:
    """The dense model that ``config.model`` describes, checked against the images it will see."""
    sizes = tuple(settings.sizes)
    _check_choice("config.model.activation", settings.activation, _ACTIVATIONS)
    _check_choice("config.model.initializer", settings.initializer, _INITIALIZERS)
    if len(sizes) < 2 or sizes[0] != pixels:
        raise ExperimentError(
            f"The images have {pixels} pixels and config.model.sizes is {sizes}; let it start with {pixels}."
        )
    if settings.kind == "classifier":
        return Classifier(sizes, settings.activation, settings.initializer)
    if sizes[-1] != pixels:
        raise ExperimentError(
            f"The images have {pixels} pixels and config.model.sizes is {sizes}; an "
            f"autoencoder's sizes end with {pixels} too."
        )
    return Autoencoder(sizes, settings.activation, settings.linear_code, settings.initializer)


def _check_choice(name: str, value: str, choices: Mapping[str, object]) -> None:
    if value not in choices:
        raise ExperimentError(f"{name} is '{value}'; choose one of {', '.join(choices)}.")
