"""Tikhonov damping of Kronecker-factored curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._linalg import kronecker

ROUNDINGS = 4
"""So many rounding errors of the largest curvature are the least that is added to it."""


def least(largest: jax.Array) -> jax.Array:
    """The least damping of a matrix with eigenvalues up to `largest`, 4 ε of them: less would divide by rounding errors."""
    return ROUNDINGS * float(jnp.finfo(largest.dtype).eps) * largest


def pi(input_factor: jax.Array, output_factor: jax.Array, stacked: int) -> jax.Array:
    """π = sqrt[(tr A / d_in) / (tr G / d_out)], (...,); 1 where a trace is zero (Martens & Grosse 2015, section 6.3)."""
    return pi_of_means(
        kronecker.trace(input_factor, stacked) / input_factor.shape[-1],
        kronecker.trace(output_factor, stacked) / output_factor.shape[-1],
    )


def pi_of_means(mean_in: jax.Array, mean_out: jax.Array) -> jax.Array:
    """π from the mean eigenvalues of A and G."""
    ratio = mean_in / jnp.where(mean_out > 0, mean_out, 1)
    return jnp.sqrt(jnp.where((mean_in > 0) & (mean_out > 0), ratio, 1))


def common_pi(mean_in: jax.Array, mean_out: jax.Array) -> jax.Array:
    """π of every block from the mean eigenvalues of its A and G; of their means where several blocks share a factor."""
    shared = tuple(i for i, sizes in enumerate(zip(mean_in.shape, mean_out.shape, strict=True)) if 1 in sizes)
    return pi_of_means(*(mean.mean(shared, keepdims=True) for mean in (mean_in, mean_out)))


def add_to_diagonal(factor: jax.Array, amount: jax.Array, stacked: int) -> jax.Array:
    """factor + amount I, one amount a matrix (...,)."""
    if kronecker.is_diagonal(factor, stacked):
        return factor + amount[..., None]
    identity = jnp.expand_dims(jnp.eye(factor.shape[-1], dtype=factor.dtype), range(amount.ndim))
    return factor + amount[..., None, None] * identity


def factored(
    input_factor: jax.Array,
    output_factor: jax.Array,
    damping: jax.Array,
    stacked: int,
    relative: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """π√λ and √λ/π for the diagonals of A and G, each at least 4 ε of its trace (Martens & Grosse 2015, section 6.3).

    Relative: λ is `damping` times the mean curvature (tr A/d_in)(tr G/d_out), and so √λ (tr A/d_in) and √λ (tr G/d_out).
    """
    mean_in = kronecker.trace(input_factor, stacked) / input_factor.shape[-1]
    mean_out = kronecker.trace(output_factor, stacked) / output_factor.shape[-1]
    root = jnp.sqrt(damping).astype(input_factor.dtype)
    if relative:
        amounts = root * mean_in, root * mean_out
    else:
        ratio = common_pi(mean_in, mean_out)
        amounts = ratio * root, root / ratio
    traces = mean_in * input_factor.shape[-1], mean_out * output_factor.shape[-1]
    return jnp.maximum(amounts[0], least(traces[0])), jnp.maximum(amounts[1], least(traces[1]))


def of_eigenvalues(
    values_in: jax.Array, values_out: jax.Array, damping: jax.Array, ratio: jax.Array
) -> jax.Array:
    """λ + (√λ/π) s_A 1ᵀ + π√λ 1 s_Gᵀ, (..., d_in, d_out): what factored damping adds to s_A s_Gᵀ, with π = `ratio`.

    At least 4 ε of the largest s_A s_G.
    """
    floor = least(values_in.max(-1) * values_out.max(-1))[..., None, None]
    root = jnp.sqrt(damping).astype(values_in.dtype)
    inputs = values_in * (root / ratio)[..., None]
    outputs = values_out * (root * ratio)[..., None]
    own = damping.astype(values_in.dtype)[..., None, None]  # one for all blocks, or one each
    return jnp.maximum(own + inputs[..., :, None] + outputs[..., None, :], floor)


def trace_tuned(
    scales: Mapping[str, jax.Array],
    layers: Mapping[str, Any],
    damping: jax.Array,
    floor: float | jax.Array,
    relative: bool = False,
) -> dict[str, jax.Array]:
    """TEKFAC's denominators from the scales Θ (Gao et al. 2020, section 4).

    A convolution l has Θ_l + λ_l, λ_l = max{tr Θ_l, ϑ} / (d_in d_out), its mean eigenvalue: with feature groups that of all its
    blocks, tr Θ_l the sum of their traces and d_in d_out the number of their elements. Stacked layers are layers of their own.
    All else (dense layers, embeddings, norms, convolutions that share nothing) is fully connected and has β(Θ + λ) with β the
    largest λ_l, or Θ + λ in a network without convolutions. The paper leaves λ inside β open. λ_l and λ are at least 4 ε of the
    largest element of their Θ.

    Args:
      scales: {layer: Θ (*stack, d_in, d_out)}, stacked layers first, then blocks.
      layers: {layer: its description}.
      damping: λ.
      floor: ϑ.
      relative: whether λ is `damping` times the mean of Θ.
    """
    tuned = {}
    lowest = {name: least(scale.max((-2, -1), keepdims=True)) for name, scale in scales.items()}
    for name, scale in scales.items():
        if layers[name].kind.convolution:
            own = tuple(range(len(layers[name].stacked), scale.ndim))
            trace = jnp.maximum(scale.sum(own, keepdims=True), floor)
            tuned[name] = trace / math.prod(scale.shape[axis] for axis in own)
    factor = jnp.stack([value.max() for value in tuned.values()]).max() if tuned else None
    denominators = {}
    for name, scale in scales.items():
        if name in tuned:
            denominators[name] = scale + jnp.maximum(tuned[name], lowest[name])
        else:
            own = damping.astype(scale.dtype)
            own = own * scale.mean((-2, -1), keepdims=True) if relative else own
            plain = scale + jnp.maximum(own, lowest[name])
            denominators[name] = plain if factor is None else factor.astype(scale.dtype) * plain
    return denominators
