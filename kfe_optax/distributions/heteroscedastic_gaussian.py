"""Means and variances, both predicted."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from kfe_optax.distributions.base import Distribution


@dataclasses.dataclass(frozen=True)
class HeteroscedasticGaussian(Distribution):
    """y ~ N(μ, σ²) with z (..., 2) = (μ, log σ²), targets (...). F_R = diag(1/σ², ½).

    ℓ = ½((y − μ)²/σ² + log 2πσ²), so that ∂ℓ = (−ε/σ, ½(1 − ε²)) with ε = (y − μ)/σ, and the covariance of the two is
    ½E[ε³ − ε]/σ = 0. ∂²ℓ depends on y, and is not positive for some: F_R is its mean. A variance in another form, such as a
    softplus, enters by its logarithm: J changes with the form, JᵀF_R J does not.
    """

    event_ndim: ClassVar[int] = 1

    def negative_log_likelihood(self, z: jax.Array, targets: jax.Array) -> jax.Array:
        mean, log_variance = z[..., 0], z[..., 1]
        squares = jnp.square(targets - mean) * jnp.exp(-log_variance)
        return (squares + log_variance + math.log(2 * math.pi)) / 2

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        return jnp.stack([jnp.exp(-z[..., 1] / 2) * u[..., 0], math.sqrt(0.5) * u[..., 1]], -1)
