"""`clip_by_kl`: bounds the change of the predictive distribution in one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax import checks, counts, explicit
from kfe_optax.transforms import layerwise
from kfe_optax.transforms.layerwise import ScalarOrSchedule


class KlClipState(NamedTuple):
    """State of `clip_by_kl`.

    Attributes:
      inner: the wrapped transformation's state.
      count: int32, the number of steps taken.
      kl_factor: the last factor ν (1: not clipped).
      rejected: int32, updates whose size was not finite, which were not taken.
    """

    inner: Any
    count: jax.Array
    kl_factor: jax.Array
    rejected: jax.Array


def clip_by_kl(
    inner: optax.GradientTransformation,
    max_kl: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Scales the update Δ of a preconditioner by ν = min(1, sqrt(max_kl / (η² Σ|Δ ∇|))).

    With Δ = F̂⁻¹∇, η² Δᵀ∇ = (ηΔ)ᵀF̂(ηΔ) is twice the KL divergence between the predictions before and after a step of
    learning rate η, to second order (Ba et al. 2017; George et al. 2018, "norm constraint").

    Args:
      inner: the preconditioner, such as `kfe.scale_by_ekfac(...)`: it sees the gradient, the clip sees both.
      max_kl: the bound, a scalar or a schedule of the step.
      learning_rate: η of the steps that follow in the chain, a scalar or a schedule.

    Returns:
      A transformation whose state's `kl_factor` is ν (`kfe.info`), 0 for an update that is not finite, which is not taken.

    Raises:
      ValueError: a bound that is not positive, a negative learning rate.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> tx = kfe.clip_by_kl(optax.identity(), max_kl=1e-2, learning_rate=0.1)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> round(float(state.kl_factor), 6)                      # sqrt(1e-2 / (0.01 · 25))
      0.2
    """
    checks.bound(max_kl=max_kl)
    checks.not_negative(learning_rate=learning_rate)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        count, rejected = (jnp.zeros((), jnp.int32) for _ in range(2))
        return KlClipState(inner.init(params), count, jnp.ones((), jnp.result_type(float)), rejected)

    def update(updates, state, params=None, **extra):
        checks.state(state, KlClipState)
        new, inner_state = inner.update(updates, state.inner, params, **extra)
        eta = layerwise.value(learning_rate, state.count, "learning_rate")
        products = jax.tree.map(
            lambda d, g: jnp.abs(jnp.vdot(d.astype(jnp.promote_types(d.dtype, jnp.float32)), g)), new, updates
        )
        size = eta**2 * sum(jax.tree.leaves(products))
        bound = layerwise.value(max_kl, state.count, "max_kl")
        factor = jnp.where(size > bound, jnp.sqrt(bound / jnp.where(size > 0, size, 1)), 1)
        # Nothing bounds a step whose size is not a number: it is not taken, and the factor says so.
        finite = jnp.isfinite(size)
        factor = jnp.where(finite, factor, 0).astype(state.kl_factor.dtype)
        new = jax.tree.map(lambda d: jnp.where(factor > 0, d * factor, 0).astype(d.dtype), new)
        return new, KlClipState(
            inner_state, counts.following(state.count), factor, counts.added(state.rejected, ~finite)
        )

    return optax.GradientTransformationExtraArgs(init, explicit.on_any_mesh(update))
