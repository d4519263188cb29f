"""The minimum of a quadratic model over the span of one or two vectors, which are trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._taps.taps import symmetric


def minimum(
    fisher: jax.Array, vectors: list[Any], gradient: Any, shift: jax.Array, taken: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The coefficients x of δ = Σ xᵢ vᵢ that minimizes the model, M(δ) − M(0) = ½ xᵀb with b = (∇hᵀvᵢ), and δᵀδ.

    `shift` is what the model has beside F, λ + η. Vectors that are not `taken` count as zero.
    """
    pairs = taken[None, :] & taken[:, None]
    fisher, norms = (jnp.where(pairs, m, 0) for m in (fisher, symmetric(inner_product, vectors)))
    slope = jnp.where(taken, jnp.stack([inner_product(gradient, v) for v in vectors]), 0)
    x = solve(fisher + shift * norms, -slope)
    # Of two vectors that are nearly parallel the sum may be lost in rounding, but not that there is one.
    squared = jnp.where((x != 0).any(), jnp.maximum(x @ norms @ x, jnp.finfo(x.dtype).tiny), 0)
    return x, x @ slope / 2, squared


def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """x with M x = b for a positive semi-definite M (k, k), k ≤ 2: zero for a zero vector, one of two parallel ones alone."""
    size = jnp.diagonal(matrix)
    scale = jnp.where(size > 0, jax.lax.rsqrt(jnp.where(size > 0, size, 1)), 0)
    scaled = scale * right
    if len(right) == 1:
        return scale * scaled
    cosine = matrix[0, 1] * scale[0] * scale[1]
    rest = 1 - cosine**2
    independent = (scale > 0).all() & (rest > 8 * jnp.finfo(matrix.dtype).eps)
    both = (scaled - cosine * scaled[::-1]) / jnp.where(independent, rest, 1)
    alone = jnp.where(scale[0] > 0, jnp.stack([scaled[0], jnp.zeros_like(cosine)]), scaled)
    return scale * jnp.where(independent, both, alone)


def inner_product(a: Any, b: Any) -> jax.Array:
    """aᵀb of two trees, in float32 at least."""
    products = jax.tree.map(lambda x, y: jnp.vdot(x.astype(wide(x)), y.astype(wide(y))), a, b)
    return jnp.stack(jax.tree.leaves(products)).sum()


def combined(coefficients: jax.Array, vectors: list[Any]) -> Any:
    """Σ xᵢ vᵢ, in float32 at least."""

    def leaf(*parts):
        return sum(c.astype(wide(p)) * p.astype(wide(p)) for c, p in zip(coefficients, parts, strict=True))

    return jax.tree.map(leaf, *vectors)


def wide(leaf: Any) -> Any:
    """The dtype of a leaf, float32 at least."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)
