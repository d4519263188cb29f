"""Loss, gradients and state of a batch in microbatches, one forward and backward pass after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._jax import static_values, varying_axes
from kfe_optax._taps import microbatches
from kfe_optax._taps.forward import Forward


def weights_of(cotangents: Any) -> Any:
    """(Σc, Σc², the number of negative weights) over the elements of each registered loss, (losses, 3), or None."""
    return jnp.stack(cotangents["outputs"]) if cotangents["outputs"] else None


def accumulated(
    forward: Forward,
    parameters: Any,
    arrays: list[Any],
    row_mask: Any,
    loss_scale: Any,
    stacked: tuple[bool, ...],
    num_state: int,
) -> tuple[Any, Any, Any, Any, list[Any], tuple[bool, ...]]:
    """The passes of all microbatches, one after the other.

    Args:
      forward: one of them.
      parameters: of the model.
      arrays: those of the batch with a leading axis of microbatches.
      row_mask: likewise, or None.
      loss_scale: of all passes, or None.
      stacked: which of the arrays have that axis.
      num_state: how many of the first arrays are state of NNX objects, which each pass hands on to the next.

    Returns:
      (loss, aux with a leading axis of microbatches), gradients, the state at the end, the weights (see `Taps`), and the arrays,
      moved state as each microbatch met it, and which of them have a leading axis of microbatches.
    """
    k = forward.place.microbatches
    parts, whole = microbatches.separate(stacked[num_state:], arrays[num_state:])

    rebuild: list[Any] = []
    moves: list[bool] = []

    def one(state, part):
        here, mask = part
        merged = microbatches.merge(stacked[num_state:], here, whole)
        passed = forward(parameters, [*state, *merged], mask, loss_scale)
        grads, cotangents = passed.pull()
        moved, rest = static_values.split_static(passed.state)
        if len(moved) != num_state:
            raise ValueError(
                f"The state of the NNX objects has {num_state} arrays before a call and {len(moved)} after it (by sow, for "
                "instance), so that it cannot move from microbatch to microbatch: take such values out with has_aux, or use one "
                "microbatch."
            )
        rebuild.append(rest)
        moves[:] = [new is not old for new, old in zip(moved, state, strict=True)]
        return (passed.loss, jax.tree.map(_wide, grads), weights_of(cotangents)), moved, passed.aux

    start = list(arrays[:num_state])
    sums, after, _ = jax.eval_shape(one, start, jax.tree.map(lambda v: v[0], (parts, row_mask)))
    start = [varying_axes.over(varying_axes.axes_of(new), old) for old, new in zip(start, after, strict=True)]
    # What no pass moves (keys, a frozen model) is neither carried nor kept for each of them.
    moving, fixed = microbatches.separate(moves, start)

    def add(carry, part):
        total, moving = carry
        new, moved, aux = one(microbatches.merge(moves, moving, fixed), part)
        return (jax.tree.map(jnp.add, total, new), microbatches.separate(moves, moved)[0]), (moving, aux)

    zeros = jax.tree.map(varying_axes.zeros, sums)
    (total, moving), (met, aux) = jax.lax.scan(add, (zeros, moving), (parts, row_mask))
    _, fixed = microbatches.separate(moves, arrays[:num_state])
    state = rebuild[-1](microbatches.merge(moves, moving, fixed))
    given = [*microbatches.merge(moves, met, fixed), *arrays[num_state:]], (*moves, *stacked[num_state:])
    loss, grads, weights = total
    grads = jax.tree.map(lambda g, p: (g / k).astype(p.dtype), grads, parameters)
    if weights is not None:
        # Each pass's loss has weight 1/k in their mean.
        weights = weights / jnp.array([k, k**2, 1], weights.dtype)
    return (loss / k, aux), grads, state, weights, *given


def _wide(gradient: jax.Array) -> jax.Array:
    """Sums of many gradients lose their last bits in half precision."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
