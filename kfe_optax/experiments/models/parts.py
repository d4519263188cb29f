"""What the convolutional networks have in common: initial kernels, convolutions, batch norm."""

from __future__ import annotations

import jax
from flax import linen as nn


def scaled_normal(numerator: float) -> nn.initializers.Initializer:
    """N(0, numerator/n), n the fan-in (George et al. 2018, appendix B).

    The numerator is 2 for a layer after a ReLU and 1 for another one; without batch norm it is 0.2 for
    the last convolution of a residual branch, so that a block starts near the identity.
    """
    return nn.initializers.variance_scaling(numerator, "fan_in", "normal")


def convolution(
    features: int,
    name: str,
    *,
    numerator: float = 2.0,
    batch_norm: bool = False,
    size: int = 3,
    stride: int = 1,
) -> nn.Conv:
    """A square convolution that keeps the image's size, but for the stride; a bias where no norm follows."""
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        use_bias=not batch_norm,
        kernel_init=scaled_normal(numerator),
        name=name,
    )


def normalized(x: jax.Array, name: str, *, batch_norm: bool, train: bool) -> jax.Array:
    """Batch norm, of this batch's statistics in training and of the running ones otherwise; or x itself."""
    if not batch_norm:
        return x
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)(x)


def scaled(width: float, channels: int) -> int:
    """``channels`` times ``width``, at least one."""
    return max(1, round(width * channels))
