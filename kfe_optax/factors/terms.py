"""The state and the averaging that the singular-vector estimators share: KPSVD, deflation, Lanczos, KFAC-corrected, streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks, counts, failures
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker
from kfe_optax.factors import base
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term, Weights
from kfe_optax.factors.operators import Operator, times
from kfe_optax.factors.singular import Triple, length


class TermsState(NamedTuple):
    """Kronecker terms of every layer, from which the next estimate also starts.

    Attributes:
      updates: int32, how many batches went in.
      terms: {layer: (Term, ...)}, the leading one first.
      iterations: {layer: int32}, the products with Z(F) and its transpose that the last estimate took.
      failures: by reason (`kfe.Failure`), int32: estimates that were not finite and were left out, or out of proportion and
        bounded.
    """

    updates: jax.Array
    terms: dict[str, tuple[Term, ...]]
    iterations: dict[str, jax.Array]
    failures: jax.Array


# (source, layer, old terms, their weight and the batch's) → the terms and the iterations.
Estimate = Callable[[Source, Layer, tuple[Term, ...], Weights], tuple[tuple[Term, ...], jax.Array]]
# (source, layer, old terms) → how many times larger than they are the batch is.
Proportion = Callable[[Source, Layer, tuple[Term, ...]], jax.Array]


class TermsFactors(NamedTuple):
    """Factors (see `base.Factors`) whose terms of one batch come from `estimate`.

    Attributes:
      rank: how many terms.
      decay: ρ of the running averages.
      estimate: see `Estimate`.
      proportion: see `Proportion`. None: R, S, P, Q, ... are averaged side by side, the signs of all terms but the first aligned
        with the old ones. Given: the past is inside the estimate, which replaces the terms.
      starts_with_kfac: whether the first term is K-FAC's.
    """

    rank: int
    decay: ScalarOrSchedule
    estimate: Estimate
    proportion: Proportion | None = None
    starts_with_kfac: bool = False

    @property
    def needs_taps(self) -> bool:
        return True

    def init(self, layers: Sequence[Layer], max_dim: int | None) -> TermsState:
        base.check_max_dim(max_dim)
        base.check_own_factors(layers, "this method", self.starts_with_kfac)
        return TermsState(
            jnp.zeros((), jnp.int32),
            {layer.name: tuple(base.zero_term(layer, max_dim) for _ in range(self.rank)) for layer in layers},
            {layer.name: jnp.zeros((), jnp.int32) for layer in layers},
            failures.none(),
        )

    def update(self, state: TermsState, source: Source, count: jax.Array) -> TermsState:
        rho = base.weight_of_past(counts.added(state.updates, 1), self.decay, count)
        new, iterations = {}, {}
        excessive = jnp.zeros((), jnp.int32)
        for name, old in state.terms.items():
            layer = source.layers[name]
            stacked = len(layer.stack_shape)
            size = 0 if self.proportion is None else self.proportion(source, layer, old)
            own = base.weights(base.rho_of(old, rho), jnp.asarray(size, rho.dtype))
            excessive = excessive + own.excessive
            (first, *others), iterations[name] = self.estimate(source, layer, old, own)
            new[name] = (
                first,
                *(aligned(term, past, stacked) for term, past in zip(others, old[1:], strict=True)),
            )
        kept = rho if self.proportion is None else jnp.zeros_like(rho)
        # A second term may be near zero in one batch and not in the next.
        terms, more = base.average(state.terms, new, kept, lambda entry: entry[0])
        more = more + failures.estimates(0, excessive)
        updates = counts.added(state.updates, 1)
        return TermsState(updates, terms, iterations, counts.added(state.failures, more))

    def terms(self, state: TermsState, layers: Layers) -> dict[str, tuple[Term, ...]]:
        del layers
        return state.terms


def aligned(new: Term, old: Term, stacked: int) -> Term:
    """±(P, Q), the sign for which ⟨P, P_old⟩ + ⟨Q, Q_old⟩ ≥ 0: P⊗Q does not see it, an average of P and Q does."""
    agreement = sum(kronecker.dot(n, o, stacked) for n, o in zip(new, old, strict=True))
    sign = jnp.where(agreement < 0, -1, 1).astype(new.input.dtype)
    return Term(times(sign, new.input), times(sign, new.output))


def term_of(operator: Operator, triple: Triple, stacked: int) -> Term:
    """R = √σ MAT(u), S = √σ MAT(v), symmetric, with tr R ≥ 0."""
    root = jnp.sqrt(triple.value)
    inputs = times(root, operator.to_input(triple.left))
    outputs = times(root, operator.to_output(triple.right))
    sign = jnp.where(kronecker.trace(inputs, stacked) < 0, -1, 1).astype(inputs.dtype)
    return Term(*(times(sign, _symmetric(side, stacked)) for side in (inputs, outputs)))


def _symmetric(side: jax.Array, stacked: int) -> jax.Array:
    return side if kronecker.is_diagonal(side, stacked) else (side + side.mT) / 2


def start_positive(old: jax.Array, stacked: int) -> jax.Array:
    """The old S, or the identity before the first estimate: both keep R and S positive semi-definite."""
    return _or(old, kronecker.identity_like(old, stacked), stacked)


def start_random(old: jax.Array, stacked: int) -> jax.Array:
    """The old Q, or a fixed random symmetric matrix before the first estimate."""
    drawn = jax.random.normal(jax.random.key(0), old.shape, old.dtype)
    return _or(old, _symmetric(drawn, stacked), stacked)


def _or(old: jax.Array, other: jax.Array, stacked: int) -> jax.Array:
    norm = length(kronecker.dot(old, old, stacked))
    known = norm != 0
    chosen = jnp.where(known.reshape(known.shape + (1,) * (old.ndim - known.ndim)), old, other)
    size = length(kronecker.dot(chosen, chosen, stacked))
    return times(1 / size, chosen)


def check_iteration(tolerance: ScalarOrSchedule, max_iterations: int) -> None:
    """Raises ValueError for a tolerance or a limit that no iteration can have."""
    checks.number_or_schedule(tolerance=tolerance)
    checks.number(max_iterations=max_iterations)
    if isinstance(tolerance, float | int) and not tolerance >= 0:
        raise ValueError(
            f"tolerance is a relative residual and cannot be {tolerance!r}; give a number such as 1e-4."
        )
    if not isinstance(max_iterations, jax.Array) and max_iterations < 1:
        raise ValueError(f"At least one iteration is needed, not {max_iterations!r}.")
