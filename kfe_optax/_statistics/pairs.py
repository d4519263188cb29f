"""What the rows of two layers say together: A_ij = E[mean_t ā_i ā_jᵀ] and G_ij = E[Σ_t g_i g_jᵀ], position by position.

Each is scaled like the factors of its two layers, by the root of the product of their counts where masks differ: A_ii, A_ij and
A_jj are then blocks of one positive semi-definite matrix, whatever the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._jax import chunks
from kfe_optax._statistics.rows import Rows

Member = tuple[Rows, int | None]
"""The statistics of a layer, and which one of its stack."""


def cross_input(first: Member, second: Member) -> jax.Array:
    """A_ij (d_in of the first, d_in of the second)."""
    total = _products(first, second, _input_rows)
    counts = jnp.asarray(_count(first) * _count(second), total.dtype)
    return total / jnp.sqrt(counts)


def cross_output(first: Member, second: Member) -> jax.Array:
    """G_ij (d_out of the first, d_out of the second), of one draw."""
    return _products(first, second, _output_rows) / first[0].layer.examples


def _products(first: Member, second: Member, rows: Callable[[Rows, Any], jax.Array]) -> jax.Array:
    """Σ of x_i x_jᵀ over examples and positions, a few examples at a time."""

    def product(parts):
        x, y = (rows(member[0], own) for member, own in zip((first, second), parts, strict=True))
        return x.reshape(-1, x.shape[-1]).mT @ y.reshape(-1, y.shape[-1])

    layers = (first[0].layer, second[0].layer)
    chunk = chunks.size(layers[0].examples, layers[0].row_bytes + layers[1].row_bytes)
    return chunks.fold(product, (_parts(first), _parts(second)), chunk)


def _parts(member: Member) -> Any:
    statistics, index = member
    parts = statistics.parts
    return parts if index is None else {name: part[index] for name, part in parts.items()}


def _input_rows(statistics: Rows, parts: Any) -> jax.Array:
    reduce = statistics.layer.sharing == "reduce"
    return statistics.mean_input(parts) if reduce else statistics.inputs(parts)


def _output_rows(statistics: Rows, parts: Any) -> jax.Array:
    g = statistics.outputs(parts)
    return g.sum(-2, keepdims=True) if statistics.layer.sharing == "reduce" else g


def _count(member: Member) -> Any:
    """What the sum of ā āᵀ is divided by in A."""
    statistics, index = member
    rank = len(statistics.layer.stacked)
    reduce = statistics.layer.sharing == "reduce"
    count = statistics.live_examples(rank) if reduce else statistics.count(rank)
    return count if index is None or isinstance(count, int) else count[index]
