"""K-FAC's factors: F ≈ A⊗G, A = E[mean_t ā āᵀ], G = E[Σ_t g gᵀ] (Martens & Grosse 2015; "expand" with shared positions)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks, counts, failures
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax.factors import base
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term


class FactorsState(NamedTuple):
    """Running averages of the factors.

    Attributes:
      updates: int32, how many batches went in.
      input: {layer: A (*stack, d_in, d_in)}, or the diagonal (*stack, d_in) of a side larger than `max_dim`.
      output: {layer: G (*stack, d_out, d_out)}, or its diagonal.
      failures: by reason (`kfe.Failure`), int32: estimates that were not finite and were left out, or out of proportion and
        bounded.
    """

    updates: jax.Array
    input: dict[str, jax.Array]
    output: dict[str, jax.Array]
    failures: jax.Array


def zeros(layers: Sequence[Layer], max_dim: int | None) -> FactorsState:
    """Zero factors."""
    base.check_max_dim(max_dim)
    terms = {layer.name: base.zero_term(layer, max_dim) for layer in layers}
    inputs = {name: term.input for name, term in terms.items()}
    outputs = {name: term.output for name, term in terms.items()}
    return FactorsState(jnp.zeros((), jnp.int32), inputs, outputs, failures.none())


def averaged(state: FactorsState, new: dict[str, Term], rho: jax.Array) -> FactorsState:
    """One more batch in the running averages of both sides."""
    old = {name: Term(state.input[name], state.output[name]) for name in state.input}
    terms, more = base.average(old, new, rho)
    return FactorsState(
        counts.added(state.updates, 1),
        {name: term.input for name, term in terms.items()},
        {name: term.output for name, term in terms.items()},
        counts.added(state.failures, more),
    )


def estimate(source: Source, diagonal: dict[str, tuple[bool, bool]]) -> dict[str, Term]:
    """A and G of one batch."""
    pulled = source.pulled
    assert pulled is not None
    plain = {name: d for name, d in diagonal.items() if not source.layers[name].mixed}
    # Uses with input and output exchanged as well: A and G of both kinds of uses, with the traces of the other side as weights.
    mixed = {name: d for name, d in diagonal.items() if name not in plain}
    inputs, (outputs, traced) = pulled.both(
        lambda s: {n: s[n].input_factor(d[0]) for n, d in plain.items()},
        lambda s: (
            {n: s[n].output_factor(d[1]) for n, d in plain.items()},
            {n: s[n].traced_factors("use", d) for n, d in mixed.items()},
        ),
    )
    terms = {name: Term(inputs[name], outputs[name]) for name in plain}
    for name, (sigma, first, second) in traced.items():
        trace = jnp.where(sigma > 0, sigma, 1)
        terms[name] = Term(first / trace.reshape(*trace.shape, *(1,) * (first.ndim - trace.ndim)), second)
    return {name: terms[name] for name in diagonal}


class Kfac(NamedTuple):
    """See `kfac`."""

    decay: ScalarOrSchedule

    rank = 1
    needs_taps = True

    def init(self, layers: Sequence[Layer], max_dim: int | None) -> FactorsState:
        return zeros(layers, max_dim)

    def update(self, state: FactorsState, source: Source, count: jax.Array) -> FactorsState:
        diagonal = {
            name: base.is_diagonal(source.layers[name], Term(state.input[name], state.output[name]))
            for name in state.input
        }
        rho = base.weight_of_past(counts.added(state.updates, 1), self.decay, count)
        return averaged(state, estimate(source, diagonal), rho)

    def terms(self, state: FactorsState, layers: Layers) -> dict[str, tuple[Term, ...]]:
        del layers
        return {name: (Term(state.input[name], state.output[name]),) for name in state.input}


def kfac(decay: ScalarOrSchedule = 0.95) -> Kfac:
    """K-FAC's factors: F ≈ A⊗G with A = E[mean_t ā āᵀ] and G = E[Σ_t g gᵀ] (Martens & Grosse 2015, section 3).

    Args:
      decay: ρ of the running averages, a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe`; rank 1.

    Raises:
      ValueError: a decay outside [0, 1].

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.kfac(decay=0.9).rank
      1
    """
    checks.decay("decay", decay)
    return Kfac(decay)
