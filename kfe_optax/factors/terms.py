"""The state and the averaging that the singular-vector estimators share: KPSVD, deflation, Lanczos, KFAC-corrected, streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax import kronecker
from kfe_optax.factors import base
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term
from kfe_optax.factors.operators import Operator, times
from kfe_optax.factors.singular import Triple
from kfe_optax.layers import Layer


class TermsState(NamedTuple):
    """Kronecker terms of every layer, from which the next estimate also starts.

    Attributes:
      updates: int32, how many batches went in.
      terms: {layer: (Term, ...)}, the leading one first.
      iterations: {layer: int32}, the products with Z(F) and its transpose that the last estimate took.
      failures: int32, estimates that were not finite and were left out.
    """

    updates: jax.Array
    terms: dict[str, tuple[Term, ...]]
    iterations: dict[str, jax.Array]
    failures: jax.Array


def init(layers: Sequence[Layer], max_dim: int, rank: int) -> TermsState:
    """Zero terms."""
    base.check_max_dim(max_dim)
    return TermsState(
        jnp.zeros((), jnp.int32),
        {layer.name: tuple(base.zero_term(layer, max_dim) for _ in range(rank)) for layer in layers},
        {layer.name: jnp.zeros((), jnp.int32) for layer in layers},
        jnp.zeros((), jnp.int32),
    )


Estimate = Callable[[Layer, tuple[Term, ...]], tuple[tuple[Term, ...], jax.Array]]


def update(state: TermsState, source: Source, estimate: Estimate, rho: jax.Array) -> TermsState:
    """M ← ρM + (1 − ρ)M_new on every side of every term, the signs of all terms but the first aligned with the old ones.

    Args:
      state: the state before.
      source: the batch.
      estimate: (layer, old terms) → (terms of the batch, iterations).
      rho: ρ; 0 replaces the terms.
    """
    new, iterations = {}, {}
    for name, old in state.terms.items():
        layer = source.layers[name]
        stacked = len(layer.stack_shape)
        found, iterations[name] = estimate(layer, old)
        new[name] = (found[0], *(aligned(*pair, stacked) for pair in zip(found[1:], old[1:], strict=True)))
    terms, failures = base.average(state.terms, new, rho)
    return TermsState(state.updates + 1, terms, iterations, state.failures + failures)


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
    return _or(old, identity_like(old, stacked), stacked)


def start_random(old: jax.Array, stacked: int) -> jax.Array:
    """The old Q, or a fixed random symmetric matrix before the first estimate."""
    drawn = jax.random.normal(jax.random.key(0), old.shape, old.dtype)
    return _or(old, _symmetric(drawn, stacked), stacked)


def identity_like(side: jax.Array, stacked: int) -> jax.Array:
    """I in the shape of a factor."""
    if kronecker.is_diagonal(side, stacked):
        return jnp.ones_like(side)
    return jnp.broadcast_to(jnp.eye(side.shape[-1], dtype=side.dtype), side.shape)


def _or(old: jax.Array, other: jax.Array, stacked: int) -> jax.Array:
    norm = jnp.sqrt(kronecker.dot(old, old, stacked))
    known = norm > 0
    chosen = jnp.where(known.reshape(known.shape + (1,) * (old.ndim - known.ndim)), old, other)
    size = jnp.sqrt(kronecker.dot(chosen, chosen, stacked))
    return times(1 / size, chosen)


def check_iteration(tolerance: ScalarOrSchedule, max_iterations: int) -> None:
    """Raises ValueError for a tolerance or a limit that no iteration can have."""
    if isinstance(tolerance, float | int) and not tolerance >= 0:
        raise ValueError(
            f"tolerance is a relative residual and cannot be {tolerance!r}; give a number such as 1e-4."
        )
    if not isinstance(max_iterations, jax.Array) and max_iterations < 1:
        raise ValueError(f"At least one iteration is needed, not {max_iterations!r}.")
