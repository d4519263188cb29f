"""Streaming KPSVD: the running F itself is tracked as r Kronecker terms, batch after batch. Beyond the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax.factors import base, terms
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term
from kfe_optax.factors.lanczos import check_subspace, leading_terms
from kfe_optax.factors.operators import fisher_operator, times
from kfe_optax.factors.terms import TermsState
from kfe_optax.layers import Layer, Layers


class Streaming(NamedTuple):
    """See `streaming`."""

    rank: int
    decay: ScalarOrSchedule
    tolerance: float
    subspace: int
    max_restarts: int

    def init(self, layers: Sequence[Layer], max_dim: int) -> TermsState:
        return terms.init(layers, max_dim, self.rank)

    @property
    def needs_taps(self) -> bool:
        return True

    def update(self, state: TermsState, source: Source, count: jax.Array) -> TermsState:
        rho = base.weight_of_past(state.updates + 1, self.decay, count)

        def estimate(layer, old):
            weight = rho.astype(layer.factor_dtype)
            past = [Term(times(weight, term.input), term.output) for term in old]
            operator = fisher_operator(source, layer, old[0], weight=1 - weight, plus=past)
            stacked = len(layer.stack_shape)
            return leading_terms(operator, old, stacked, self.tolerance, self.subspace, self.max_restarts)

        # The past is inside the operator: the new terms replace the old ones.
        return terms.update(state, source, estimate, jnp.zeros_like(rho))

    def terms(self, state: TermsState, layers: Layers) -> dict[str, tuple[Term, ...]]:
        del layers
        return state.terms


def streaming(
    rank: int = 2,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    subspace: int = 8,
    max_restarts: int = 10,
) -> Any:
    """The running F as its best r Kronecker terms: F̂ ← best rank r of ρ F̂ + (1 − ρ) F of the batch.

    An average of the factors of different batches is not a factor of the average: the product of two averages has cross terms
    that belong to no batch. Here the leading singular triples are those of Z(ρ F̂ + (1 − ρ) F), in which the past enters through
    its r terms alone, and nothing but the truncation to rank r is lost.

    Args:
      rank: r; up to 2 for `kfe.scale_by_kronecker`, any for diagnostics and `kfe.in_kfe`.
      decay: ρ, a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the cycles end when ‖Zᵀu − σ v‖ ≤ tolerance · σ for all r triples.
      subspace: the size of the bidiagonal matrix.
      max_restarts: cycles after the first, at most.

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe` (whose basis is that of the leading term).

    Raises:
      ValueError: a rank below 1, a negative tolerance, a subspace that is too small.

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.streaming(rank=1).rank
      1
    """
    if rank < 1:
        raise ValueError(f"rank is a number of Kronecker terms and cannot be {rank!r}; give 1 or 2.")
    terms.check_iteration(tolerance, 1 + max_restarts)
    check_subspace(subspace, rank)
    return Streaming(rank, decay, tolerance, subspace, max_restarts)
