"""Deflation: F ≈ R⊗S + P⊗Q, two power methods one after the other (Koroko et al. 2022)."""

from __future__ import annotations

from kfe_optax._jax import checks
from kfe_optax._layers.layer import Layer
from kfe_optax.factors import terms
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term, Weights
from kfe_optax.factors.kpsvd import leading
from kfe_optax.factors.operators import fisher_operator, without
from kfe_optax.factors.singular import power
from kfe_optax.factors.terms import TermsFactors


def deflation(
    decay: ScalarOrSchedule = 0.95, tolerance: float = 1e-4, max_iterations: int = 50
) -> TermsFactors:
    """Two Kronecker terms by deflation: F ≈ R⊗S + P⊗Q (Koroko et al. 2022, section 3.2).

    R⊗S is KPSVD's; (P, Q) comes from the power method on Z(F) − vec(R) vec(S)ᵀ, started at a random symmetric matrix, later at
    the last Q. Together they are the best symmetric Kronecker rank 2, as `lanczos` is. With shared positions Z(F) also has a part
    on skew matrices, which is not searched.

    Args:
      decay: ρ of the running averages of R, S, P and Q, each by itself after (P, Q) has been given the sign that agrees with the
        old pair; a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).
      tolerance: each iteration ends when ‖Z v − σ u‖ ≤ tolerance · σ.
      max_iterations: each ends after as many products with Z and Zᵀ at the latest.

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe` (whose basis is that of R⊗S); rank 2.

    Raises:
      ValueError: a decay outside [0, 1], a negative tolerance, no iterations; in `update`, a layer whose per-example gradients
        are not kept (under a per-example vmap).

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.deflation().rank
      2
    """
    checks.decay("decay", decay)
    terms.check_iteration(tolerance, max_iterations)

    def estimate(source: Source, layer: Layer, old: tuple[Term, ...], own: Weights):
        del own
        stacked = len(layer.stack_shape)
        operator = fisher_operator(source, layer, old[0])
        first, iterations = leading(operator, old[0], layer, tolerance, max_iterations)
        deflated = without(operator, first.left)
        start = deflated.first(terms.start_random(old[1].output, stacked))
        second, more = power(deflated, start, tolerance, max_iterations)
        found = tuple(terms.term_of(operator, triple, stacked) for triple in (first, second))
        return found, iterations + more

    return TermsFactors(2, decay, estimate)
