"""Means with noise of one known variance."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import ClassVar

import jax
import jax.numpy as jnp

from kfe_optax.distributions.base import Distribution


@dataclasses.dataclass(frozen=True)
class Gaussian(Distribution):
    """Linear outputs with additive noise: y ~ N(z, variance), elementwise. F_R = 1/variance.

    `variance=1` belongs to ½(y − z)², `variance=½` to (y − z)².
    """

    variance: float = 1.0
    event_ndim: ClassVar[int] = 0

    def __post_init__(self):
        if not isinstance(self.variance, numbers.Real):
            raise TypeError(
                f"Gaussian's variance is a Python number, not {self.variance!r}: one that is predicted belongs to "
                "kfe.HeteroscedasticGaussian, and a precision for each example into the loss's weights."
            )
        if not self.variance > 0:
            raise ValueError(f"Gaussian needs a positive variance, not {self.variance}.")

    def negative_log_likelihood(self, z: jax.Array, targets: jax.Array) -> jax.Array:
        return (jnp.square(targets - z) / self.variance + math.log(2 * math.pi * self.variance)) / 2

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.normal(key, z.shape, z.dtype) * self.variance**-0.5

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        del z
        return u * self.variance**-0.5
