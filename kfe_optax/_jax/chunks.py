"""Sums over the examples of a batch in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax._jax import varying_axes

T = TypeVar("T")

BUDGET = 2**25
"""Bytes that one piece may need; a single example may need more."""


def size(examples: int, bytes_per_example: int) -> int:
    """How many examples fit into the budget: all of them, or a power of two, which devices divide among themselves."""
    most = BUDGET // max(bytes_per_example, 1)
    return examples if most >= examples else 1 << max(most.bit_length() - 1, 0)


def fold(function: Callable[[Any], T], batch: Any, chunk: int) -> T:
    """Σ of `function` over chunks of the leading axis of all leaves of `batch`; the last one may be shorter."""
    n = jax.tree.leaves(batch)[0].shape[0]
    if n <= chunk:
        return function(batch)
    whole, rest = divmod(n, chunk)
    pieces = _pieces(batch, whole, chunk)
    shapes = jax.eval_shape(function, jax.tree.map(lambda v: v[0], pieces))
    zeros = jax.tree.map(varying_axes.zeros, shapes)

    def add(total, piece):
        return jax.tree.map(jnp.add, total, function(piece)), None

    total, _ = jax.lax.scan(add, zeros, pieces)
    if rest:
        last = function(jax.tree.map(lambda v: v[n - rest :], batch))
        total = jax.tree.map(jnp.add, total, last)
    return total


def mapped(function: Callable[[Any], jax.Array], batch: Any, chunk: int) -> jax.Array:
    """`function`, which keeps the leading axis, applied chunk by chunk."""
    n = jax.tree.leaves(batch)[0].shape[0]
    if n <= chunk:
        return function(batch)
    whole, rest = divmod(n, chunk)
    done = jax.lax.map(function, _pieces(batch, whole, chunk))
    parts = [done.swapaxes(0, 1).reshape(whole * chunk, *done.shape[2:])]
    if rest:
        parts.append(function(jax.tree.map(lambda v: v[n - rest :], batch)))
    return jnp.concatenate(parts)


def _pieces(batch: Any, whole: int, chunk: int) -> Any:
    """Piece j holds every `whole`-th example from the j-th on: of a batch divided over devices, each keeps its own."""
    return jax.tree.map(
        lambda v: v[: whole * chunk].reshape(chunk, whole, *v.shape[1:]).swapaxes(0, 1), batch
    )
