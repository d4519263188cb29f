"""Why something was kept out of a state: one int32 vector of counts, an entry a reason."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Failure(enum.IntEnum):
    """The entries of the `failures` of a method's and of an estimator's state.

    ESTIMATE: an estimate of factors or of a scale was not finite, and was left out. PROPORTION: it was out of all proportion to
    the running one, and was bounded. FACTORIZATION: an inverse, a root or an eigenbasis was not finite, and the last good one
    was kept. INNER: an inner transformation's state or update was not, and was left out.
    """

    ESTIMATE = 0
    PROPORTION = 1
    FACTORIZATION = 2
    INNER = 3


_UNITS = np.eye(len(Failure), dtype=np.int32)


def none() -> jax.Array:
    """No failures yet."""
    return jnp.zeros(len(Failure), jnp.int32)


def of(reason: Failure, number: Any) -> jax.Array:
    """So many failures for one reason."""
    return jnp.asarray(number, jnp.int32) * _UNITS[reason]


def estimates(lost: Any, bounded: Any) -> jax.Array:
    """Estimates that were left out, and others that were bounded."""
    return of(Failure.ESTIMATE, lost) + of(Failure.PROPORTION, bounded)


def between(old: jax.Array, new: jax.Array) -> jax.Array:
    """What an estimator's failures have grown by; one that counts without reasons counts estimates."""
    more = new - old
    return more if more.ndim else of(Failure.ESTIMATE, more)
