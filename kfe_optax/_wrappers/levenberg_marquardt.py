"""The Levenberg–Marquardt rule (Martens & Grosse 2015, section 6.5): the reduction ratio r, λ after it, steps too long for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfe_optax._methods import layerwise
from kfe_optax._wrappers.minimum import inner_product


def reduction_ratio(change: jax.Array, model: jax.Array, before: jax.Array) -> jax.Array:
    """r, at most zero where the loss rose, and 1/2 where either change is lost in rounding, which says nothing of the model."""
    noise = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    silent = (change == 0) | (jnp.abs(model) <= noise)
    ratio = change / jnp.where(silent, 1, model)
    return jnp.where(silent, 0.5, jnp.where(change > 0, -jnp.abs(ratio), ratio))


def adapted(damping: jax.Array, ratio: jax.Array, power: Any, floor: Any, ceiling: Any) -> jax.Array:
    """λ after a reduction ratio r: ω₁λ for r > 3/4, λ/ω₁ for r < 1/4 or no number, in [floor, ceiling]."""
    scale = jnp.where(ratio > 0.75, power, jnp.where(ratio >= 0.25, 1, 1 / power))
    return jnp.clip(damping * scale, floor, ceiling).astype(damping.dtype)


def loss_change(change: jax.Array, delta: Any, params: Any, l2: Any) -> jax.Array:
    """h(θ+δ) − h(θ) from the change of the loss function."""
    if l2 is None:
        return change
    return change + l2 * (inner_product(params, delta) + inner_product(delta, delta) / 2)


def reversible(params: Any, delta: Any, squared: jax.Array) -> jax.Array:
    """Whether θ + δ is finite, and so near that half of the digits of θ, as one vector, survive θ + δ − δ, δᵀδ = `squared`."""
    size, kinds = inner_product(params, params), [jnp.finfo(p.dtype) for p in jax.tree.leaves(params)]
    # With a finite δᵀδ no |δᵢ| is above the root of the largest float32 number, and only float16 can overflow.
    reversible = jnp.isfinite(squared) & ((size == 0) | (squared * max(float(k.eps) for k in kinds) <= size))
    if any(float(kind.max) < 1e38 for kind in kinds):
        reversible &= layerwise.all_finite(jax.tree.leaves(optax.apply_updates(params, delta)))
    return reversible
