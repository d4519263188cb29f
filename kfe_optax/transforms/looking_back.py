"""Whether the last update led astray: what a new batch says of the parameters with and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax.transforms.quadratic_model import inner_product

MEMORY = 0.9
"""The weight of the past in the mean change of the loss from batch to batch."""


class Seen(NamedTuple):
    """What the batches so far were like: the loss of the last one (NaN before the first), and the mean |change| of it."""

    loss: jax.Array
    spread: jax.Array

    def joined(self, loss: jax.Array, counts: jax.Array) -> Seen:
        """With one more batch, if it counts."""
        change = jnp.abs(loss - self.loss)
        spread = jnp.where(jnp.isfinite(change), MEMORY * self.spread + (1 - MEMORY) * change, self.spread)
        new = Seen(loss.astype(self.loss.dtype), spread.astype(self.spread.dtype))
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, self)


def to_blame(
    last: Any,
    moved: Any,
    expected: Any,
    seen: Seen,
    before: jax.Array,
    bad: jax.Array,
    params: Any,
    loss_at: Callable[[Any], jax.Array],
    l2: Any,
) -> jax.Array:
    """Whether δ₀ is to be taken back, by the loss h of a batch that had no part in it: at θ and at θ − δ₀.

    It is, where h(θ) or its gradient is not finite and h(θ − δ₀) is; and where h(θ) − h(θ − δ₀) > |M(δ₀)|/4 + s/10, s the usual
    change of the loss from batch to batch: a clear rise instead of the fall that the model foretold, since λ was so small that
    the update followed the noise of its own batch. The second evaluation is made only where the loss has risen by as much.

    Args:
      last: δ₀.
      moved: whether it was taken.
      expected: |M(δ₀)|, infinite where it is not known.
      seen: the batches before this one.
      before: h(θ), without the penalty.
      bad: whether that or its gradient is not finite.
      params: θ.
      loss_at: h elsewhere.
      l2: η of the penalty, or None.
    """
    clear = expected / 4 + seen.spread / 10

    def looked_back():
        back = jax.tree.map(jnp.negative, last)
        there = loss_at(optax.apply_updates(params, back))
        change = loss_change(there - before, back, params, l2)
        return jnp.isfinite(there) & (bad | (-change > clear)) & (inner_product(back, back) != 0)

    asked = moved & (bad | (before - seen.loss > clear + seen.spread / 10))
    return jax.lax.cond(asked, looked_back, lambda: jnp.zeros((), bool))


def loss_change(change: jax.Array, delta: Any, params: Any, l2: Any) -> jax.Array:
    """h(θ+δ) − h(θ) with the penalty, from the change of the loss function."""
    if l2 is None:
        return change
    return change + l2 * (inner_product(params, delta) + inner_product(delta, delta) / 2)
