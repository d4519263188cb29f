"""One of C classes by a softmax."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from kfe_optax.distributions.base import Distribution


@dataclasses.dataclass(frozen=True)
class Categorical(Distribution):
    """Softmax outputs: z (..., C) are logits of one of C classes, targets (...) whole. F_R = diag(p) − p pᵀ.

    ∂²ℓ does not depend on the target, so that F_R is exact for soft targets as well: q with Σq = 1, such as smoothed labels,
    have ℓ = −Σ q log p with the same Hessian (`kfe.losses.softmax_cross_entropy`).
    """

    event_ndim: ClassVar[int] = 1

    def negative_log_likelihood(self, z: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(z, targets)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        cumulative = jnp.cumsum(p, -1)
        # One uniform per event and the inverse distribution function; the last sum stands in for 1.
        u = jax.random.uniform(key, z.shape[:-1], p.dtype)[..., None] * cumulative[..., -1:]
        label = jnp.sum(cumulative <= u, -1)
        return p - jax.nn.one_hot(label, z.shape[-1], dtype=p.dtype)

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        root = jnp.sqrt(p)
        return root * u - p * jnp.sum(root * u, -1, keepdims=True)
