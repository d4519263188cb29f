"""`average_iterates`: the running average of the parameters, which is what to evaluate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks, counts
from kfe_optax._layers.paths import leaves_by_path, path_name
from kfe_optax._methods import layerwise
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._taps.taps import Taps


class AveragingState(NamedTuple):
    """State of `average_iterates`.

    The newest iterate is not in it: whether the loss there is a number shows at the next step.

    Attributes:
      count: int32, the number of steps taken.
      averaged: int32, the number of iterates in the average.
      decay: ξ with which the next iterate joins them.
      average: their average, in float32 at least.
    """

    count: jax.Array
    averaged: jax.Array
    decay: jax.Array
    average: Any


def average_iterates(decay: ScalarOrSchedule = 0.99) -> optax.GradientTransformationExtraArgs:
    """Keeps θ̄_k = ξθ̄_{k−1} + (1 − ξ)θ_k, ξ = min(1 − 1/k, decay) (Polyak averaging; Martens & Grosse 2015, section 13).

    Stands first in a chain, where it sees the gradient, and passes it on: parameters at which it is not finite, or the loss that
    the taps of a quadratic model know, are left out, for `adaptive_damping` takes them back. Read θ̄ with `averaged_parameters`,
    which adds the present parameters.

    Args:
      decay: the largest ξ in [0, 1), a scalar or a schedule; 0 keeps the last iterate.

    Raises:
      ValueError: a decay outside [0, 1); in `update`: no `params`.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> tx = optax.chain(kfe.average_iterates(), optax.sgd(1.0))
      >>> params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
      >>> for gradient in (-1.0, -1.0):
      ...     updates, state = tx.update(jnp.asarray(gradient), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params), float(kfe.averaged_parameters(state, params))
      (2.0, 1.5)
    """

    checks.number_or_schedule(decay=decay)
    if isinstance(decay, float | int) and not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), not {decay!r}.")

    def init(params):
        average = jax.tree.map(_start, params)
        zeros = (jnp.zeros((), jnp.int32) for _ in range(2))
        return AveragingState(*zeros, jnp.zeros((), jnp.result_type(float)), average)

    def update(updates, state, params=None, *, taps=None, value=None, **_):
        checks.state(state, AveragingState)
        if params is None:
            raise ValueError(
                "average_iterates averages the parameters: call tx.update(grads, opt_state, params, ...)."
            )
        seen = jax.tree.leaves(updates)
        if isinstance(taps, Taps) and taps.has_quadratic_model:
            seen.append(taps.loss if value is None else taps.mean_over_devices(jnp.asarray(value)))
        # The parameters of the first step are where training starts, and no iterate.
        joins = (state.count > 0) & layerwise.all_finite(seen)
        average = jax.tree.map(
            lambda mean, p: jnp.where(joins, _joined(mean, p, state.decay), mean), state.average, params
        )
        averaged = counts.added(state.averaged, joins)
        k = 1 + averaged.astype(state.decay.dtype)
        past = jnp.minimum(1 - 1 / k, layerwise.value(decay, state.count, "decay")).astype(state.decay.dtype)
        return updates, AveragingState(counts.following(state.count), averaged, past, average)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_parameters(opt_state: Any, params: Any) -> Any:
    """θ̄ out of any nesting of Optax states, in the dtypes of `params`; `params` themselves where nothing is averaged.

    Args:
      opt_state: the state of an Optax optimizer, `optax.masked` and `optax.partition` among them.
      params: the present parameters, the newest iterate.

    Raises:
      ValueError: parameters of another tree than those that were averaged.

    Example:
      >>> import optax, kfe_optax as kfe
      >>> kfe.averaged_parameters(optax.sgd(0.1).init({"w": 1.0}), {"w": 1.0})
      {'w': 1.0}
    """
    is_average = lambda node: isinstance(node, AveragingState)  # noqa: E731
    present, found = leaves_by_path(params), {}
    for node in filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)):
        # nnx.Optimizer keeps each leaf of the state in a variable.
        count, decay = (jax.tree.leaves(number)[0] for number in (node.count, node.decay))
        for path, mean in leaves_by_path(node.average).items():
            if path not in present:
                raise ValueError(
                    f"The average has '{path_name(path)}', which the parameters have not: pass the tree that tx.update is given."
                )
            new = present[path]
            joined = jnp.where(jnp.isfinite(new), _joined(mean, new, decay), mean)
            found[path] = jnp.where(count > 0, joined, new).astype(jnp.result_type(new))
    leaves = [found.get(path, leaf) for path, leaf in present.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _joined(mean: jax.Array, new: Any, decay: jax.Array) -> jax.Array:
    past = decay.astype(mean.dtype)
    return past * mean + (1 - past) * jnp.asarray(new, mean.dtype)


def _start(p: Any) -> jax.Array:
    """A copy of a parameter; zeros where its shape alone is known."""
    abstract = isinstance(p, jax.ShapeDtypeStruct)
    return jnp.zeros(p.shape, _wide(p)) if abstract else jnp.array(p, _wide(p))


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)
