"""KFAC-corrected: F ≈ A⊗G + P⊗Q, K-FAC plus the best Kronecker product of what it misses (Koroko et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from kfe_optax.factors import base, terms
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term
from kfe_optax.factors.kfac import estimate as kfac_estimate
from kfe_optax.factors.operators import fisher_operator
from kfe_optax.factors.singular import power
from kfe_optax.factors.terms import TermsState
from kfe_optax.layers import Layer, Layers


class KfacCorrected(NamedTuple):
    """See `kfac_corrected`."""

    decay: ScalarOrSchedule
    tolerance: float
    max_iterations: int

    rank = 2
    needs_taps = True

    def init(self, layers: Sequence[Layer], max_dim: int) -> TermsState:
        return terms.init(layers, max_dim, self.rank)

    def update(self, state: TermsState, source: Source, count: jax.Array) -> TermsState:
        diagonal = {name: base.is_diagonal(source.layers[name], old[0]) for name, old in state.terms.items()}
        estimates = kfac_estimate(source, diagonal)

        def estimate(layer, old):
            stacked = len(layer.stack_shape)
            first = estimates[layer.name]
            # −A⊗G is one more term of the operator, with weight −1 on one side.
            minus = Term(-first.input, first.output)
            operator = fisher_operator(source, layer, old[1], plus=(minus,))
            start = operator.first(terms.start_random(old[1].output, stacked))
            second, iterations = power(operator, start, self.tolerance, self.max_iterations)
            return (first, terms.term_of(operator, second, stacked)), iterations

        rho = base.weight_of_past(state.updates + 1, self.decay, count)
        return terms.update(state, source, estimate, rho)

    def terms(self, state: TermsState, layers: Layers) -> dict[str, tuple[Term, ...]]:
        del layers
        return state.terms


def kfac_corrected(decay: ScalarOrSchedule = 0.95, tolerance: float = 1e-4, max_iterations: int = 50) -> Any:
    """K-FAC with a correction: F ≈ A⊗G + P⊗Q (Koroko et al. 2022, section 3.4).

    A and G are K-FAC's, and P⊗Q is the best symmetric Kronecker product for F − A⊗G, by the power method.

    Args:
      decay: ρ of the running averages of A, G, P and Q, each by itself after (P, Q) has been given the sign that agrees with the
        old pair; a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the iteration ends when ‖Z v − σ u‖ ≤ tolerance · σ.
      max_iterations: it ends after as many products with Z and Zᵀ at the latest.

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe` (whose basis is that of A⊗G); rank 2.

    Raises:
      ValueError: a negative tolerance, no iterations.

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.kfac_corrected().rank
      2
    """
    terms.check_iteration(tolerance, max_iterations)
    return KfacCorrected(decay, tolerance, max_iterations)
