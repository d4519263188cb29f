"""KPSVD: F ≈ R⊗S, the best Kronecker product in the Frobenius norm, by the power method (Koroko et al. 2022)."""

from __future__ import annotations

import jax

from kfe_optax._jax import checks
from kfe_optax._layers.layer import Layer
from kfe_optax.factors import terms
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term, Weights
from kfe_optax.factors.operators import Operator, fisher_operator
from kfe_optax.factors.singular import Triple, power
from kfe_optax.factors.terms import TermsFactors


def leading(
    operator: Operator, old: Term, layer: Layer, tolerance: float, max_iterations: int
) -> tuple[Triple, jax.Array]:
    """The leading triple of Z(F), from the old S."""
    start = terms.start_positive(old.output, len(layer.stack_shape))
    return power(operator, operator.first(start), tolerance, max_iterations)


def kpsvd(decay: ScalarOrSchedule = 0.95, tolerance: float = 1e-4, max_iterations: int = 50) -> TermsFactors:
    """KPSVD's factors: F ≈ R⊗S closest to F in the Frobenius norm (Koroko et al. 2022, section 3.1).

    R = √σ MAT(u) and S = √σ MAT(v) with (σ, u, v) the leading singular triple of the rearranged Z(F), found by the power method
    with products E[M V Mᵀ] and E[Mᵀ U M] alone. It starts from the last S (I at first), which keeps R and S positive
    semi-definite.

    Args:
      decay: ρ of the running averages of R and S, a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the iteration ends when ‖Z v − σ u‖ ≤ tolerance · σ.
      max_iterations: it ends after as many products with Z and Zᵀ at the latest; those used are in the state's `iterations`.

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe`; rank 1.

    Raises:
      ValueError: a decay outside [0, 1], a negative tolerance, no iterations; in `update`, a layer whose per-example gradients
        are not kept (under a per-example vmap).

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.kpsvd(tolerance=1e-3).rank
      1
    """
    checks.decay("decay", decay)
    terms.check_iteration(tolerance, max_iterations)

    def estimate(source: Source, layer: Layer, old: tuple[Term, ...], own: Weights):
        del own
        operator = fisher_operator(source, layer, old[0])
        triple, iterations = leading(operator, old[0], layer, tolerance, max_iterations)
        return (terms.term_of(operator, triple, len(layer.stack_shape)),), iterations

    return TermsFactors(1, decay, estimate)
