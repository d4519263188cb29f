"""Counts of steps and events in int32 that never wrap around."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LAST = 2**31 - 1
"""The largest int32."""

CYCLE = 2**10 * 3**2 * 5**4 * 7 * 11
"""What a step count falls back by when it is at the largest: a multiple of all usual periods."""


def following(count: jax.Array) -> jax.Array:
    """The count of the next step; after the largest int32 one of the 443,520,000 numbers before it, over and over.

    Schedules have long come to their end there, and what is due at multiples of a period goes on at that period: of one that
    does not divide 2¹⁰ 3² 5⁴ 7 11 a single interval in so many steps has another length.

    Example:
      >>> import jax.numpy as jnp
      >>> int(following(jnp.int32(6))), int(following(jnp.int32(LAST))) % 50 == (LAST + 1) % 50
      (7, True)
    """
    return jnp.where(count == LAST, LAST + 1 - CYCLE, count + 1).astype(count.dtype)


def added(total: jax.Array, more: jax.Array | int) -> jax.Array:
    """A total of events and some more, at most the largest int32.

    Example:
      >>> import jax.numpy as jnp
      >>> int(added(jnp.int32(6), 2)), int(added(jnp.int32(LAST - 1), 2)) == LAST
      (8, True)
    """
    return total + jnp.minimum(more, LAST - total)
