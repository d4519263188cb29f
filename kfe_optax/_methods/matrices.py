"""Updates seen as the layers' matrices, for transformations that treat each layer's step by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.layers import Layers
from kfe_optax._layers.paths import leaves_by_path
from kfe_optax._methods import given as given_lib

Rescale = Callable[..., jax.Array]


def rescaled(
    layers: Layers, factor: Rescale, updates: Any, *others: Any, outside: Rescale | None = None
) -> Any:
    """Each matrix of the updates times a number of its own.

    Args:
      layers: the layers; one whose parameters are masked out is left out.
      factor: W̄-shaped matrices (*stack, d_in, d_out), in float32 at least, of the updates and of each other tree → (*stack,).
      updates: a parameter-shaped tree.
      *others: trees in its structure.
      outside: the same for the leaves outside the layers, each as a whole, → a number; None leaves them as they are.

    Returns:
      A tree in the structure and the dtypes of the updates.
    """
    trees = [leaves_by_path(tree) for tree in (updates, *others)]
    present = given_lib.present_layers(layers, trees[0])
    new = dict(trees[0])
    for layer in present:
        own = [
            layer.gather({role: leaves[path] for role, path in layer.paths}).astype(layer.factor_dtype)
            for leaves in trees
        ]
        new.update(layer.from_matrix(_times(own[0], factor(*own)[..., None, None])))
    if outside is not None:
        for path in set(layers.rest) & new.keys():
            own = [_wide(leaves[path]) for leaves in trees]
            new[path] = _times(own[0], outside(*own))
    # Flattening order is that of the paths.
    ordered = [new[path].astype(leaf.dtype) for path, leaf in trees[0].items()]
    return jax.tree.unflatten(jax.tree.structure(updates), ordered)


def _times(matrix: jax.Array, factor: jax.Array) -> jax.Array:
    # Zero times what is not finite is zero here.
    return jnp.where(factor == 0, 0, matrix * factor)


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def root_mean_square(matrix: jax.Array, axes: Any = (-2, -1)) -> jax.Array:
    """sqrt(mean of squares), by the largest entry first: squares of small numbers are zero in float32."""
    largest = jnp.abs(matrix).max(axes, keepdims=True)
    shrunk = matrix / jnp.where(largest > 0, largest, 1)
    return jnp.squeeze(largest, axes) * jnp.sqrt(jnp.mean(shrunk * shrunk, axes))


POWER_ITERATIONS = 3


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """(...,) the largest singular values of (..., m, n), from below: three power iterations from the longest row.

    Exact where one direction leads, which is where a bound matters; of a matrix of random numbers it finds nine tenths or more.
    """
    largest = jnp.abs(matrix).max((-2, -1), keepdims=True)
    shrunk = matrix / jnp.where(largest > 0, largest, 1)
    longest = jnp.argmax(jnp.sum(shrunk * shrunk, -1), -1)[..., None, None]
    row = _unit(jnp.take_along_axis(shrunk, longest, -2))
    # Sums of products: XLA's products of a matrix with one vector take two to three times as long on a CPU.
    for _ in range(POWER_ITERATIONS):
        column = jnp.sum(shrunk * row, -1, keepdims=True)
        row = _unit(jnp.sum(shrunk * column, -2, keepdims=True))
    column = jnp.sum(shrunk * row, -1)
    return largest[..., 0, 0] * jnp.sqrt(jnp.sum(column * column, -1))


def change(delta: jax.Array) -> jax.Array:
    """√(d_in/d_out) ‖Δ‖₂ of each matrix: what it changes in outputs, in units of inputs of root mean square 1."""
    return math.sqrt(delta.shape[-2] / delta.shape[-1]) * spectral_norm(delta)


def _unit(vector: jax.Array) -> jax.Array:
    length = jnp.sqrt(jnp.sum(vector * vector, (-2, -1), keepdims=True))
    return vector / jnp.where(length > 0, length, 1)
