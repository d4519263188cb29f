"""Streaming KPSVD: the running F itself is tracked as r Kronecker terms, batch after batch. Beyond the papers."""

from __future__ import annotations

import jax

from kfe_optax._jax import checks
from kfe_optax._layers.layer import Layer
from kfe_optax._linalg import kronecker
from kfe_optax.factors import base, terms
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term, Weights
from kfe_optax.factors.lanczos import check_subspace, leading_terms
from kfe_optax.factors.operators import fisher_operator, times
from kfe_optax.factors.terms import TermsFactors


def streaming(
    rank: int = 2,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    subspace: int = 8,
    max_restarts: int = 10,
) -> TermsFactors:
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
      ValueError: a rank below 1, a decay outside [0, 1], a negative tolerance, a subspace that is too small; in `update`, a
        layer whose per-example gradients are not kept (under a per-example vmap).

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.streaming(rank=1).rank
      1
    """
    checks.number(rank=rank)
    if rank < 1:
        raise ValueError(f"rank is a number of Kronecker terms and cannot be {rank!r}; give 1 or 2.")
    checks.decay("decay", decay)
    checks.number(max_restarts=max_restarts)
    terms.check_iteration(tolerance, 1 + max_restarts)
    check_subspace(subspace, rank)

    def estimate(source: Source, layer: Layer, old: tuple[Term, ...], own: Weights):
        weight = own.past.astype(layer.factor_dtype)
        past = [Term(times(weight, term.input), term.output) for term in old]
        operator = fisher_operator(
            source, layer, old[0], weight=own.new.astype(layer.factor_dtype), plus=past
        )
        return leading_terms(operator, old, len(layer.stack_shape), tolerance, subspace, max_restarts)

    def proportion(source: Source, layer: Layer, old: tuple[Term, ...]) -> jax.Array:
        # Both seen from the leading S: E[(gᵀSg) ā āᵀ] and Σ ⟨S_k, S⟩ R_k.
        side, stacked = old[0].output, len(layer.stack_shape)
        operator = fisher_operator(source, layer, old[0])
        past = sum(times(kronecker.dot(term.output, side, stacked), term.input) for term in old)
        return base.proportion(past, operator.to_input(operator.first(side)))

    return TermsFactors(rank, decay, estimate, proportion)
