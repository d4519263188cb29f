"""`clip_by_kl`: bounds the change of the predictive distribution in one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks, counts, explicit_axes
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._methods import layerwise, matrices
from kfe_optax._methods.layerwise import ScalarOrSchedule


class KlClipState(NamedTuple):
    """State of `clip_by_kl`.

    Attributes:
      inner: the wrapped transformation's state.
      count: int32, the number of steps taken.
      kl_factor: the last factor ν (1: not clipped); the least of them where every layer has its own.
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
    *,
    layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the update Δ of a preconditioner by ν = min(1, sqrt(max_kl / (η² Σ|Δ ∇|))).

    With Δ = F̂⁻¹∇, η² Δᵀ∇ = (ηΔ)ᵀF̂(ηΔ) is twice the KL divergence between the predictions before and after a step of
    learning rate η, to second order (Ba et al. 2017; George et al. 2018, "norm constraint").

    Args:
      inner: the preconditioner, such as `kfe.scale_by_ekfac(...)`: it sees the gradient, the clip sees both.
      max_kl: the bound, a scalar or a schedule of the step.
      learning_rate: η of the steps that follow in the chain, a scalar or a schedule.
      layers: with what `kfe.find_layers` returned, every layer's matrix (and every parameter outside them) has a ν of its own, of
        its own part of the sum. One ν for all promises each layer the whole decrease of the loss: a layer with little
        curvature then moves too far without a word.

    Returns:
      A transformation whose state's `kl_factor` is ν (`kfe.info`), 0 for an update that is not finite, which is not taken.

    Raises:
      TypeError: layers that are none.
      ValueError: a bound that is not positive, a negative learning rate; in `update`, a tree that is not that of the layers.

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
    if layers is not None:
        require_layers(layers)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        count, rejected = (jnp.zeros((), jnp.int32) for _ in range(2))
        return KlClipState(inner.init(params), count, jnp.ones((), jnp.result_type(float)), rejected)

    def update(updates, state, params=None, **extra):
        checks.state(state, KlClipState)
        new, inner_state = inner.update(updates, state.inner, params, **extra)
        eta = layerwise.value(learning_rate, state.count, "learning_rate")
        bound = layerwise.value(max_kl, state.count, "max_kl")
        factors = []

        def factor(size: jax.Array) -> jax.Array:
            clipped = jnp.where(size > bound, jnp.sqrt(bound / jnp.where(size > 0, size, 1)), 1)
            # Nothing bounds a step whose size is not a number: it is not taken, and the factor says so.
            factors.append(jnp.where(jnp.isfinite(size), clipped, 0).astype(state.kl_factor.dtype))
            return factors[-1]

        if layers is None:
            products = jax.tree.map(
                lambda d, g: jnp.abs(jnp.vdot(d.astype(jnp.promote_types(d.dtype, jnp.float32)), g)),
                new,
                updates,
            )
            nu = factor(eta**2 * sum(jax.tree.leaves(products)))
            new = jax.tree.map(lambda d: jnp.where(nu > 0, d * nu, 0).astype(d.dtype), new)
        else:
            new = matrices.rescaled(
                layers,
                lambda d, g: factor(eta**2 * jnp.abs(jnp.sum(d * g, (-2, -1)))),
                new,
                updates,
                outside=lambda d, g: factor(eta**2 * jnp.abs(jnp.sum(d * g))),
            )
        least = jnp.stack([f.min() for f in factors]).min()
        rejected = counts.added(state.rejected, least == 0)
        return new, KlClipState(inner_state, counts.following(state.count), least, rejected)

    return optax.GradientTransformationExtraArgs(init, explicit_axes.on_any_mesh(update))
