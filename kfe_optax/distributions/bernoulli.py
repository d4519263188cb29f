"""Independent bits by a logistic function."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from kfe_optax.distributions.base import Distribution


@dataclasses.dataclass(frozen=True)
class Bernoulli(Distribution):
    """Logistic outputs: each element of z is the logit of one bit. F_R = p(1 − p), elementwise.

    ∂²ℓ does not depend on the target, so that F_R is exact for soft targets in [0, 1] as well, such as pixels.
    """

    event_ndim: ClassVar[int] = 0

    def negative_log_likelihood(self, z: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.losses.sigmoid_binary_cross_entropy(z, targets)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(z)
        return p - (jax.random.uniform(key, z.shape, p.dtype) < p)

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        return jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)) * u
