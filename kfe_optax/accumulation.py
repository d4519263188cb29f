"""Loss, gradients and state of a batch in microbatches, one forward and backward pass after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax import microbatches, static_values, varying
from kfe_optax.forward import Forward


def weights_of(cotangents: Any) -> Any:
    """(Σc, Σc²) over the elements of all registered losses, or None."""
    return sum(cotangents["outputs"]) if cotangents["outputs"] else None


def accumulated(
    forward: Forward,
    parameters: Any,
    arrays: list[Any],
    row_mask: Any,
    stacked: tuple[bool, ...],
    num_state: int,
) -> tuple[Any, Any, Any, Any, list[Any]]:
    """The passes of all microbatches, one after the other.

    Args:
      forward: one of them.
      parameters: of the model.
      arrays: those of the batch with a leading axis of microbatches.
      row_mask: likewise, or None.
      stacked: which of the arrays have that axis in what is returned: those of the batch, and the state of the model.
      num_state: how many of the first arrays are state of the model, which each pass hands on to the next.

    Returns:
      (loss, aux with a leading axis of microbatches), gradients, the model's state at the end, the weights (see `Taps`), and the
      arrays, the state of the model as each microbatch met it.
    """
    k = forward.place.microbatches
    parts, whole = microbatches.separate(stacked[num_state:], arrays[num_state:])

    rebuild: list[Any] = []

    def one(state, part):
        here, mask = part
        passed = forward(parameters, [*state, *microbatches.merge(stacked[num_state:], here, whole)], mask)
        grads, cotangents = passed.pull()
        moved, rest = static_values.split_static(passed.state)
        if len(moved) != num_state:
            raise ValueError(
                f"The model's state has {num_state} arrays before a call and {len(moved)} after it (by sow, for instance), so "
                "that it cannot move from microbatch to microbatch: take such values out with has_aux, or use one microbatch."
            )
        rebuild.append(rest)
        return (passed.loss, jax.tree.map(_wide, grads), weights_of(cotangents)), moved, passed.aux

    start = list(arrays[:num_state])
    sums, after, _ = jax.eval_shape(one, start, jax.tree.map(lambda v: v[0], (parts, row_mask)))
    start = [varying.over(varying.axes_of(new), old) for old, new in zip(start, after, strict=True)]

    def add(carry, part):
        total, state = carry
        new, moved, aux = one(state, part)
        return (jax.tree.map(jnp.add, total, new), moved), (state, aux)

    zeros = jax.tree.map(varying.zeros, sums)
    (total, state), (met, aux) = jax.lax.scan(add, (zeros, start), (parts, row_mask))
    loss, grads, weights = total
    grads = jax.tree.map(lambda g, p: (g / k).astype(p.dtype), grads, parameters)
    if weights is not None:
        # Each pass's loss has weight 1/k in their mean.
        weights = weights / jnp.array([k, k**2], weights.dtype)
    return (loss / k, aux), grads, rebuild[-1](state), weights, [*met, *arrays[num_state:]]


def _wide(gradient: jax.Array) -> jax.Array:
    """Sums of many gradients lose their last bits in half precision."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
