"""Predictive distributions p(y|z) of a model's outputs z: what the Fisher matrix averages over.

Each gives the rows of the Fisher factor at the outputs: a draw of ∂(−log p(ỹ|z))/∂z with ỹ ~ p(·|z), and the columns of a matrix
B with BᵀB = F_R = E[∂ log p ∂ log pᵀ], the exact Fisher (Martens & Grosse 2015, section 2; George et al. 2018). A
distribution is frozen and hashable; the last `event_ndim` axes of z are one event.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Distribution(Protocol):
    @property
    def event_ndim(self) -> int:
        """How many of the last axes of z make one event."""
        ...

    def __hash__(self) -> int: ...

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        """∂(−log p(ỹ|z))/∂z for one ỹ ~ p(·|z), of the shape of z."""

    def column(self, z: jax.Array, index: jax.Array) -> jax.Array:
        """Column `index` (of the event's size) of a square root of F_R, of the shape of z."""

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        """Bᵀu for a B with BᵀB = F_R; u and the result have the shape of z."""


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Softmax outputs: z (..., C) are logits of one of C classes. F_R = diag(p) − p pᵀ."""

    event_ndim: int = dataclasses.field(default=1, init=False, repr=False)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        cumulative = jnp.cumsum(p, -1)
        # One uniform per event and the inverse distribution function; the last sum stands in for 1.
        u = jax.random.uniform(key, z.shape[:-1], p.dtype)[..., None] * cumulative[..., -1:]
        label = jnp.sum(cumulative <= u, -1)
        return p - jax.nn.one_hot(label, z.shape[-1], dtype=p.dtype)

    def column(self, z: jax.Array, index: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        chosen = jnp.expand_dims(jax.nn.one_hot(index, z.shape[-1], dtype=p.dtype), range(z.ndim - 1))
        return jnp.sqrt(jnp.sum(p * chosen, -1, keepdims=True)) * (p - chosen)

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        root = jnp.sqrt(p)
        return root * u - p * jnp.sum(root * u, -1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Logistic outputs: each element of z is the logit of one bit. F_R = p(1 − p), elementwise."""

    event_ndim: int = dataclasses.field(default=0, init=False, repr=False)

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(z)
        return p - (jax.random.uniform(key, z.shape, p.dtype) < p)

    def column(self, z: jax.Array, index: jax.Array) -> jax.Array:
        del index
        return jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        return self.column(z, jnp.zeros((), jnp.int32)) * u


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Linear outputs with additive noise: y ~ N(z, variance), elementwise. F_R = 1/variance.

    `variance=1` belongs to ½(y − z)², `variance=½` to (y − z)².
    """

    variance: float = 1.0
    event_ndim: int = dataclasses.field(default=0, init=False, repr=False)

    def __post_init__(self):
        if not self.variance > 0:
            raise ValueError(f"Gaussian needs a positive variance, not {self.variance}.")

    def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.normal(key, z.shape, z.dtype) * self.variance**-0.5

    def column(self, z: jax.Array, index: jax.Array) -> jax.Array:
        del index
        return jnp.full_like(z, self.variance**-0.5)

    def root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        del z
        return u * self.variance**-0.5
