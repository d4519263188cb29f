"""Stacks of dense layers, autoencoders, classifiers and deep linear networks, and what all models have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from kfe_optax.experiments.errors import chosen
from kfe_optax.initializers import sparse


def scaled_normal(numerator: float) -> nn.initializers.Initializer:
    """N(0, numerator/n), n the fan-in (George et al. 2018, appendix B).

    The numerator is 2 for a layer after a ReLU and 1 for another one; without batch norm it is 0.2 for
    the last convolution of a residual branch, so that a block starts near the identity.
    """
    return nn.initializers.variance_scaling(numerator, "fan_in", "normal")


def normalized(x: jax.Array, name: str, *, batch_norm: bool, train: bool) -> jax.Array:
    """Batch norm, of this batch's statistics in training and of the running ones otherwise; or x itself."""
    if not batch_norm:
        return x
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)(x)


ACTIVATIONS = {name: getattr(jax.nn, name) for name in ("relu", "tanh", "sigmoid", "gelu", "silu")}
_NAMES = ("lecun_normal", "he_normal", "glorot_normal", "glorot_uniform", "orthogonal")
INITIALIZERS = {name: getattr(nn.initializers, name)() for name in _NAMES}
INITIALIZERS |= {"sparse": sparse(), "normal": scaled_normal(1.0)}


class Classifier(nn.Module):
    """Dense layers from ``sizes[0]`` pixels to ``sizes[-1]`` classes; the outputs are logits."""

    sizes: Sequence[int]
    activation: str = "relu"
    linear_code: bool = True  # of an autoencoder alone
    initializer: str = "lecun_normal"

    @property
    def classes(self) -> int:
        """The number of classes, as other models have it."""
        return self.sizes[-1]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x, kernel_init = images, chosen("config.model.initializer", self.initializer, INITIALIZERS)
        linear = {len(self.sizes) - 1}
        if isinstance(self, Autoencoder) and self.linear_code:
            linear.add(self.sizes.index(min(self.sizes)))
        for index, size in enumerate(self.sizes[1:], start=1):
            x = nn.Dense(size, kernel_init=kernel_init, name=f"dense_{index}")(x)
            if index not in linear:
                x = chosen("config.model.activation", self.activation, ACTIVATIONS)(x)
        return x


class Autoencoder(Classifier):
    """Dense layers from ``sizes[0]`` pixels through a narrow code back to as many outputs.

    The outputs are linear: logits for a cross-entropy, values for a squared error. The code, the
    narrowest layer, is linear as well, as in the deep autoencoder of Hinton and Salakhutdinov,
    unless ``linear_code`` is off.
    """


class Hidden(nn.Module):
    """A dense layer and its batch norm, without an activation; it returns a pair, as the body of a loop does."""

    width: int
    batch_norm: bool
    initializer: str
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        kernel_init = chosen("config.model.initializer", self.initializer, INITIALIZERS)
        # A norm takes a bias away again.
        x = nn.Dense(self.width, use_bias=not self.batch_norm, kernel_init=kernel_init, name="dense")(x)
        return normalized(x, "norm", batch_norm=self.batch_norm, train=self.train), None


class LinearNetwork(nn.Module):
    """``depth`` dense layers without activations, each but the last before a batch norm.

    What it computes is an affine map of its inputs (in training: of inputs whose batch the norms have
    whitened in part), so that only the optimization is hard. The layers from ``width`` to ``width`` are
    a loop with stacked parameters: a program that does not grow with the depth.
    """

    outputs: int
    width: int = 10
    depth: int = 64
    batch_norm: bool = True
    initializer: str = "normal"

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        hidden = (self.width, self.batch_norm, self.initializer, train)
        x, _ = Hidden(*hidden, name="first")(inputs)
        if self.depth > 2:
            axes: Any = {"params": 0, "batch_stats": 0}
            rngs: Any = {"params": True}
            loop = nn.scan(Hidden, variable_axes=axes, split_rngs=rngs, length=self.depth - 2)
            x, _ = loop(*hidden, name="hidden")(x, None)
        return nn.Dense(self.outputs, kernel_init=INITIALIZERS[self.initializer], name="last")(x)
