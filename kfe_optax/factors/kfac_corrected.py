"""KFAC-corrected: F ≈ A⊗G + P⊗Q, K-FAC plus the best Kronecker product of what it misses (Koroko et al. 2022)."""

from __future__ import annotations

from kfe_optax._jax import checks
from kfe_optax._layers.layer import Layer
from kfe_optax.factors import base, terms
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term, Weights
from kfe_optax.factors.kfac import estimate as kfac_estimate
from kfe_optax.factors.operators import fisher_operator
from kfe_optax.factors.singular import power
from kfe_optax.factors.terms import TermsFactors


def kfac_corrected(
    decay: ScalarOrSchedule = 0.95, tolerance: float = 1e-4, max_iterations: int = 50
) -> TermsFactors:
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
      ValueError: a decay outside [0, 1], a negative tolerance, no iterations; in `update`, a layer whose per-example gradients
        are not kept (under a per-example vmap).

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.kfac_corrected().rank
      2
    """
    checks.decay("decay", decay)
    terms.check_iteration(tolerance, max_iterations)

    def estimate(source: Source, layer: Layer, old: tuple[Term, ...], own: Weights):
        del own
        first = kfac_estimate(source, {layer.name: base.is_diagonal(layer, old[0])})[layer.name]
        # −A⊗G is one more term of the operator, with the sign on one side.
        minus = Term(-first.input, first.output)
        operator = fisher_operator(source, layer, old[1], plus=(minus,))
        stacked = len(layer.stack_shape)
        start = operator.first(terms.start_random(old[1].output, stacked))
        second, iterations = power(operator, start, tolerance, max_iterations)
        return (first, terms.term_of(operator, second, stacked)), iterations

    return TermsFactors(2, decay, estimate, starts_with_kfac=True)
