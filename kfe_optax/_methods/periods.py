"""When something is due: factors, inverses, bases and scales are made anew every so many steps, and in the first ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax._jax import varying_axes

T = TypeVar("T")


def due(count: jax.Array, period: Any, first: int = 0) -> jax.Array:
    """Whether a refresh with this period falls on step `count`; always in the first `first` steps."""
    every = jnp.asarray(period).astype(jnp.int32)
    return (count % every == 0) | (count < first)


def new_if_due(due: jax.Array, finite: jax.Array, new: Callable[[], T], old: T) -> T:
    """`new()` on a step that is due and whose gradient is finite, `old` otherwise.

    The branch is taken on the count alone: under a vmap over seeds, where the count is one and `finite` is one a seed, it
    stays a branch; and devices with other gradients than the rest do not wait for each other.
    """
    old = varying_axes.like(old, finite)

    def branch() -> T:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new(), old)

    return jax.lax.cond(due, branch, lambda: old)
