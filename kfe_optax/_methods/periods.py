"""When something is due: factors, inverses, bases and scales are made anew every so many steps, and in the first ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax._jax import varying_axes

T = TypeVar("T")


class Early(NamedTuple):
    """How often everything is refreshed in the beginning.

    Attributes:
      steps: in each of so many steps.
      per_doubling: n > 0: periods begin at a fifth of what they are, and at step t none is longer than t/n, down to a power of 2,
        if that is more.
    """

    steps: Any = 0
    per_doubling: Any = 0


PLAIN = Early()


def due(count: jax.Array, period: Any, early: Early = PLAIN) -> jax.Array:
    """Whether a refresh with this period falls on step `count`."""
    every = jnp.asarray(period).astype(jnp.int32)
    n = jnp.asarray(early.per_doubling).astype(jnp.int32)
    ratio = jnp.maximum(count // jnp.maximum(n, 1), 1).astype(jnp.int32)
    power = jnp.left_shift(1, 31 - jax.lax.clz(ratio))
    least = jnp.maximum(every // 5, 1)
    every = jnp.where(n > 0, jnp.clip(power, least, every), every)
    return (count % every == 0) | (count < early.steps)


def new_if_due(due: jax.Array, finite: jax.Array, new: Callable[[], T], old: T) -> T:
    """`new()` on a step that is due and whose gradient is finite, `old` otherwise.

    The branch is taken on the count alone: under a vmap over seeds, where the count is one and `finite` is one a seed, it
    stays a branch; and devices with other gradients than the rest do not wait for each other.
    """
    old = varying_axes.like(old, finite)

    def branch() -> T:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new(), old)

    return jax.lax.cond(due, branch, lambda: old)
