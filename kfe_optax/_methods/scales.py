"""EKFAC's scale S, the second moments of the gradient in the basis: how it is measured, averaged and damped."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._jax import counts, failures
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax._methods.basis import Basis
from kfe_optax._methods.layerwise import Matrices
from kfe_optax._taps.taps import Taps
from kfe_optax.factors import base

Scales = tuple[Matrices, jax.Array]  # the scales, and the failures


def of_batch(pulled: Any, basis: Basis) -> Matrices:
    """S* = E[(U_Aᵀ ∇W̄ U_G)²] over the per-example gradients, of the layers that have them."""

    def moments(statistics):
        found = {
            name: statistics[name].second_moment_in(inputs.vectors, outputs.vectors)
            for name, (inputs, outputs) in basis.items()
        }
        return {name: moment for name, moment in found.items() if moment is not None}

    return pulled.reduce(moments)


def of_mean(taps: Taps | None, rotated: Matrices) -> Matrices:
    """N (U_Aᵀ ∇̄ U_G)² of the mean gradient in the basis."""
    assert taps is not None
    weight = taps.gradient_weight
    return {
        name: jnp.square(v) * (taps.examples_of(name) if weight is None else weight).astype(v.dtype)
        for name, v in rotated.items()
    }


def averaged(
    old: Matrices, moments: Matrices, decay: jax.Array, known: jax.Array, failed: jax.Array
) -> Scales:
    """The running averages with one more measurement, bounded only where the old ones are `known`, and the failures with its."""
    scale = dict(old)
    for name, moment in moments.items():
        own = base.weights(decay, jnp.where(known, base.proportion(scale[name], moment), 0))
        average = own.past.astype(moment.dtype) * scale[name] + own.new.astype(moment.dtype) * moment
        finite = jnp.isfinite(jnp.abs(moment).max())
        failed = counts.added(failed, failures.estimates(~finite, finite & own.excessive))
        scale[name] = jnp.where(finite, average, scale[name])
    return scale, failed


def denominators(
    layers: Layers,
    scale: Matrices,
    basis: Basis,
    damping: jax.Array,
    *,
    damping_type: str,
    relative: bool,
    trace_floor: Any,
    null_threshold: float,
) -> Matrices:
    """What the gradient in the basis is divided by: S with its null directions pooled, damped."""
    pooled = {
        name: kronecker.pool_null_directions(own, basis[name], null_threshold) for name, own in scale.items()
    }
    if damping_type == "trace":
        return damping_lib.trace_tuned(pooled, layers, damping, trace_floor, relative=relative)
    if damping_type == "plain":
        return {name: own + _plain(own, basis[name], damping, relative) for name, own in pooled.items()}
    with_pi = damping_type == "factored"
    return {name: own + _factored(basis[name], damping, relative, with_pi) for name, own in pooled.items()}


def _plain(scale: jax.Array, basis: Any, damping: jax.Array, relative: bool) -> jax.Array:
    inputs, outputs = basis
    least = damping_lib.least(inputs.values.max(-1) * outputs.values.max(-1))[..., None, None]
    damping = damping.astype(scale.dtype)
    if relative:
        damping = damping * scale.mean((-2, -1), keepdims=True)
    return jnp.maximum(damping, least)


def _factored(basis: Any, damping: jax.Array, relative: bool, with_pi: bool) -> jax.Array:
    inputs, outputs = basis
    # π belongs to the same factors as the eigenvalues, which may be older than the running averages.
    means = inputs.values.mean(-1), outputs.values.mean(-1)
    ratio = damping_lib.common_pi(*means) if with_pi else jnp.ones((), means[0].dtype)
    if relative:
        damping = damping * means[0] * means[1]
    return damping_lib.of_eigenvalues(inputs.values, outputs.values, damping, ratio)
