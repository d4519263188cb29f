"""Counts."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kfe_optax.distributions.base import Distribution


@dataclasses.dataclass(frozen=True)
class Poisson(Distribution):
    """Counts y ~ Poisson(e^z): each element of z is the logarithm of a rate. F_R = e^z, elementwise.

    ℓ = e^z − yz + log y!, of which e^z is the Hessian, whatever y is.
    """

    event_ndim: ClassVar[int] = 0

    def negative_log_likelihood(self, z: jax.Array, targets: jax.Array) -> jax.Array:
        # In the dtype of z where counts are integers, which have none of their own for log y!.
        targets = jnp.asarray(targets, jnp.result_type(targets, z))
        return jnp.exp(z) - targets * z + jax.lax.lgamma(targets + 1)

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        return jnp.exp(z / 2) * u
