"""K-FAC's factors: F ≈ A⊗G, A = E[mean_t ā āᵀ], G = E[Σ_t g gᵀ] (Martens & Grosse 2015; "expand" with shared positions)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax.layers import Layer, Layers


class FactorsState(NamedTuple):
    """Running averages of the factors.

    Attributes:
      updates: int32, how many batches went in.
      input: {layer: A (*stack, d_in, d_in)}, or the diagonal (*stack, d_in) of a side larger than `max_dim`.
      output: {layer: G (*stack, d_out, d_out)}, or its diagonal.
      failures: int32, estimates that were not finite and were left out.
    """

    updates: jax.Array
    input: dict[str, jax.Array]
    output: dict[str, jax.Array]
    failures: jax.Array


def _side(layer: Layer, side: int, max_dim: int) -> tuple[int, ...]:
    d = layer.sides[side]
    return (*layer.stack_shape, d, d) if d <= max_dim else (*layer.stack_shape, d)


def init(layers: Iterable[Layer], max_dim: int) -> FactorsState:
    """Zero factors.

    Raises:
      ValueError: `max_dim`, which fixes shapes, is traced.
    """
    if isinstance(max_dim, core.Tracer):
        raise ValueError(
            "max_dim fixes the shapes of the state and cannot be traced: give optax.inject_hyperparams "
            "static_args=('max_dim',), or call tx.init outside jit."
        )
    layers = list(layers)
    inputs, outputs = (
        {layer.name: jnp.zeros(_side(layer, side, max_dim), layer.factor_dtype) for layer in layers}
        for side in (0, 1)
    )
    return FactorsState(jnp.zeros((), jnp.int32), inputs, outputs, jnp.zeros((), jnp.int32))


def update(state: FactorsState, pulled: Any, layers: Layers, decay: jax.Array) -> FactorsState:
    """M ← ρM + (1 − ρ)M_new with ρ = min(1 − 1/k, decay) at the k-th update, so that the first batch counts in full.

    An estimate that is not finite is left out, and counted.
    """
    names = list(state.input)
    diagonal_in = {n: state.input[n].ndim == len(layers[n].stack_shape) + 1 for n in names}
    diagonal_out = {n: state.output[n].ndim == len(layers[n].stack_shape) + 1 for n in names}
    inputs = pulled.inputs(lambda s: {n: s[n].input_factor(diagonal_in[n]) for n in names})
    outputs = pulled.reduce(lambda s: {n: s[n].output_factor(diagonal_out[n]) for n in names})
    updates = state.updates + 1
    rho = jnp.minimum(1 - 1 / updates.astype(jnp.result_type(float)), decay)
    new_input, new_output, failures = {}, {}, state.failures
    for name in names:
        finite = jnp.isfinite(inputs[name]).all() & jnp.isfinite(outputs[name]).all()
        failures = failures + ~finite
        for old, new, result in (
            (state.input, inputs, new_input),
            (state.output, outputs, new_output),
        ):
            weight = rho.astype(old[name].dtype)
            average = weight * old[name] + (1 - weight) * new[name].astype(old[name].dtype)
            result[name] = jnp.where(finite, average, old[name])
    return FactorsState(updates, new_input, new_output, failures)
