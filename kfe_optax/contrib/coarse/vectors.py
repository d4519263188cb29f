"""Coarse vectors of one layer: v matrices in the shape of its W̄, and what is asked of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._layers.layer import Layer
from kfe_optax._statistics.statistics import Statistics


class RankOne(NamedTuple):
    """v matrices that are p qᵀ in every block of the layer.

    Attributes:
      inputs: p (*stack, v, d_in).
      outputs: q (*stack, v, d_out).
    """

    inputs: jax.Array
    outputs: jax.Array

    def project(self, layer: Layer, v: jax.Array) -> jax.Array:
        """⟨Z_k, V⟩ of all k, (*stacked, v), for V (*stack, d_in, d_out)."""
        products = jnp.sum((self.inputs @ v) * self.outputs, -1)
        return products.sum(tuple(range(len(layer.stacked), len(layer.stack_shape))))

    def combine(self, layer: Layer, coefficients: jax.Array) -> jax.Array:
        """Σ_k c_k Z_k, (*stack, d_in, d_out), for c (*stacked, v)."""
        blocks = (1,) * (len(layer.stack_shape) - len(layer.stacked))
        c = coefficients.reshape(*layer.stacked, *blocks, -1)
        return (self.inputs * c[..., None]).mT @ self.outputs

    def gradients(self, statistics: Statistics) -> jax.Array:
        """ζ = ⟨Z_k, M_n⟩ of all k, (*stacked, n, v)."""
        return statistics.project(self.inputs, self.outputs)


class Full(NamedTuple):
    """One matrix a layer, Z (*stack, d_in, d_out)."""

    matrix: jax.Array

    def project(self, layer: Layer, v: jax.Array) -> jax.Array:
        """As `RankOne.project`, with v = 1."""
        return jnp.sum(self.matrix * v, tuple(range(len(layer.stacked), v.ndim)))[..., None]

    def combine(self, layer: Layer, coefficients: jax.Array) -> jax.Array:
        """As `RankOne.combine`."""
        axes = (1,) * (self.matrix.ndim - len(layer.stacked))
        return self.matrix * coefficients.reshape(*layer.stacked, *axes)

    def gradients(self, statistics: Statistics) -> jax.Array:
        """As `RankOne.gradients`."""
        return statistics.inner(self.matrix)[..., None]
