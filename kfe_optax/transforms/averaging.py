"""`average_iterates`: the running average of the parameters, which is what to evaluate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax.transforms import layerwise
from kfe_optax.transforms.layerwise import ScalarOrSchedule


class AveragingState(NamedTuple):
    """State of `average_iterates`: the number of steps taken and θ̄, in float32 at least."""

    count: jax.Array
    average: Any


def average_iterates(decay: ScalarOrSchedule = 0.99) -> optax.GradientTransformation:
    """Keeps θ̄_k = ξθ̄_{k−1} + (1 − ξ)θ_k, ξ = min(1 − 1/k, decay) (Polyak averaging; Martens & Grosse 2015, section 13).

    Stands last in a chain and passes the updates on; what is not finite is left out. Read θ̄ with `averaged_parameters`.

    Args:
      decay: the largest ξ in [0, 1), a scalar or a schedule; 0 keeps the last iterate.

    Raises:
      ValueError: a decay outside [0, 1); in `update`: no `params`.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> tx = optax.chain(optax.sgd(1.0), kfe.average_iterates())
      >>> params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
      >>> for gradient in (-1.0, -1.0):
      ...     updates, state = tx.update(jnp.asarray(gradient), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params), float(kfe.averaged_parameters(state, params))
      (2.0, 1.5)
    """

    if isinstance(decay, float | int) and not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), not {decay!r}.")

    def init(params):
        wide = lambda p: jnp.array(p, jnp.promote_types(jnp.result_type(p), jnp.float32))  # noqa: E731
        return AveragingState(jnp.zeros((), jnp.int32), jax.tree.map(wide, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "average_iterates averages the parameters: call tx.update(grads, opt_state, params, ...)."
            )
        k = (state.count + 1).astype(jnp.result_type(float))
        past = jnp.minimum(1 - 1 / k, layerwise.value(decay, state.count))

        def averaged(mean, p, u):
            weight = past.astype(mean.dtype)
            new = p.astype(mean.dtype) + u.astype(mean.dtype)
            return jnp.where(jnp.isfinite(new), weight * mean + (1 - weight) * new, mean)

        average = jax.tree.map(averaged, state.average, params, updates)
        return updates, AveragingState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged_parameters(opt_state: Any, params: Any) -> Any:
    """θ̄ out of any nesting of Optax states, in the dtypes of `params`; `params` itself where nothing is averaged.

    Args:
      opt_state: the state of an Optax optimizer.
      params: the present parameters.

    Example:
      >>> import optax, kfe_optax as kfe
      >>> kfe.averaged_parameters(optax.sgd(0.1).init({"w": 1.0}), {"w": 1.0})
      {'w': 1.0}
    """
    is_average = lambda node: isinstance(node, AveragingState)  # noqa: E731
    for node in jax.tree.leaves(opt_state, is_leaf=is_average):
        if is_average(node):
            # nnx.Optimizer keeps each leaf of the state in a variable: the containers differ, the leaves do not.
            means, structure = jax.tree.leaves(node.average), jax.tree.structure(params)
            leaves = zip(means, jax.tree.leaves(params), strict=True)
            return jax.tree.unflatten(structure, [m.astype(jnp.result_type(p)) for m, p in leaves])
    return params
