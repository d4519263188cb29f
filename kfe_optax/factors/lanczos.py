"""Lanczos: F ≈ R⊗S + P⊗Q, both leading singular triples at once (Koroko et al. 2022)."""

from __future__ import annotations

import jax

from kfe_optax._jax import checks
from kfe_optax._layers.layer import Layer
from kfe_optax.factors import singular, terms
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term, Weights
from kfe_optax.factors.operators import Operator, fisher_operator, times
from kfe_optax.factors.terms import TermsFactors


def leading_terms(
    operator: Operator,
    old: tuple[Term, ...],
    stacked: int,
    tolerance: float,
    subspace: int,
    max_restarts: int,
) -> tuple[tuple[Term, ...], jax.Array]:
    """As many leading terms of an operator as there are old ones, from the sum of the old output sides."""
    sides = [terms.start_positive(old[0].output, stacked)]
    sides += [terms.start_random(term.output, stacked) for term in old[1:]]
    # A start that holds all the old vectors; Zᵀ Z of it, since a vector of the operator has its own form.
    image = operator.first(sum(sides[1:], sides[0]))
    size = singular.length(operator.dot_in(image, image))
    # Of unit length, so that its square is no larger than what the iteration meets anyway.
    start = operator.adjoint(times(1 / singular.safe(size), image))
    found, products = singular.lanczos(operator, start, len(old), tolerance, subspace, max_restarts)
    return tuple(terms.term_of(operator, triple, stacked) for triple in found), products


def lanczos(
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    subspace: int | None = None,
    max_restarts: int = 10,
) -> TermsFactors:
    """Two Kronecker terms by Lanczos: F ≈ R⊗S + P⊗Q, the best symmetric Kronecker rank 2 (Koroko et al. 2022, section 3.3).

    Both leading singular triples of Z(F) from one thick-restarted Golub–Kahan bidiagonalization, which starts from the old S and
    Q. With shared positions Z(F) also has a part on skew matrices, which is not searched.

    Args:
      decay: ρ of the running averages of R, S, P and Q, each by itself after (P, Q) has been given the sign that agrees with the
        old pair; a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the cycles end when ‖Zᵀu − σ v‖ ≤ tolerance · σ for both triples (‖Z v − σ u‖ vanishes by construction).
      subspace: the size of the bidiagonal matrix, above 2; as many vectors of each side are kept while it runs;
        None: 8.
      max_restarts: cycles after the first, at most; the products with Z used are in the state's `iterations`.

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe` (whose basis is that of R⊗S); rank 2.

    Raises:
      ValueError: a decay outside [0, 1], a negative tolerance, a subspace that is too small; in `update`, a layer whose
        per-example gradients are not kept (under a per-example vmap).

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.lanczos(subspace=6).rank
      2
    """
    checks.decay("decay", decay)
    checks.number(max_restarts=max_restarts)
    terms.check_iteration(tolerance, 1 + max_restarts)
    size = 8 if subspace is None else subspace
    check_subspace(size, 2)

    def estimate(source: Source, layer: Layer, old: tuple[Term, ...], own: Weights):
        del own
        operator = fisher_operator(source, layer, old[0])
        return leading_terms(operator, old, len(layer.stack_shape), tolerance, size, max_restarts)

    return TermsFactors(2, decay, estimate)


def check_subspace(subspace: int, wanted: int) -> None:
    """Raises ValueError for a subspace in which a restart leaves no room."""
    if isinstance(subspace, jax.Array):
        raise ValueError(
            "subspace fixes shapes and cannot be an array: give optax.inject_hyperparams static_args=('subspace',)."
        )
    checks.number(subspace=subspace)
    if subspace < wanted + 2:
        raise ValueError(
            f"A subspace of {subspace} leaves no room beside the {wanted} wanted triples; make it at least {wanted + 2}."
        )
