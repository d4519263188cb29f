"""Leading singular triples of an `Operator`: the power method and restarted Golub–Kahan–Lanczos bidiagonalization."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._linalg import kronecker
from kfe_optax.factors.operators import Operator, times


class Triple(NamedTuple):
    """σ (*stack,) with unit vectors u and v: Z v = σ u exactly, Zᵀu = σ v to the tolerance."""

    value: jax.Array
    left: jax.Array
    right: jax.Array


def safe(norm: jax.Array) -> jax.Array:
    """What a vector of this length is divided by: 1 for a zero vector."""
    return jnp.where(norm == 0, 1, norm)


def length(squared: jax.Array) -> jax.Array:
    """√squared, NaN where the square overflowed: divided by infinity, a vector would be a zero that nobody notices."""
    root = jnp.sqrt(jnp.maximum(squared, 0))
    return jnp.where(jnp.isinf(root), jnp.nan, root)


def power(
    operator: Operator, start: jax.Array, tolerance: float, max_iterations: int
) -> tuple[Triple, jax.Array]:
    """The leading triple by the power method: v ← Zᵀu/‖·‖, u ← Zv/‖·‖, until ‖Z v − σ u‖ ≤ tolerance · σ.

    Args:
      operator: Z.
      start: a vector of the input side, such as `operator.first(V)`.
      tolerance: of the relative residual.
      max_iterations: products with Z and Zᵀ at most.

    Returns:
      The triple and the iterations used, int32.
    """

    def unit_in(u):
        norm = length(operator.dot_in(u, u))
        return times(1 / safe(norm), u), norm

    def step(carry):
        u, *_, iterations = carry
        v = operator.adjoint(u)
        sigma = length(operator.dot_out(v, v))
        v = times(1 / safe(sigma), v)
        image = operator.forward(v)
        difference = image - times(sigma, u)
        residual = length(operator.dot_in(difference, difference))
        u, value = unit_in(image)
        return u, v, value, jnp.all(residual <= tolerance * sigma), iterations + 1

    def running(carry):
        *_, done, iterations = carry
        return ~done & (iterations < max_iterations)

    u, norm = unit_in(start)
    v = jax.eval_shape(operator.adjoint, u)
    begin = (u, jnp.zeros(v.shape, v.dtype), norm, jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    u, v, sigma, _, iterations = jax.lax.while_loop(running, step, begin)
    return Triple(sigma, u, v), iterations


class _Space(NamedTuple):
    """Orthonormal vectors of both sides and Z between them: Z P = Q B for the first `subspace` of them."""

    right: jax.Array  # P (subspace + 1, ...)
    left: jax.Array  # Q (subspace, ...)
    core: jax.Array  # B (*stack, subspace, subspace)
    coupling: jax.Array  # β (*stack,): Zᵀ q_last = ... + β p_next


def lanczos(
    operator: Operator,
    start: jax.Array,
    wanted: int,
    tolerance: float,
    subspace: int,
    max_restarts: int,
) -> tuple[list[Triple], jax.Array]:
    """The `wanted` leading triples by thick-restarted Golub–Kahan bidiagonalization with full reorthogonalization.

    A cycle fills orthonormal bases with Z P = Q B and Zᵀ Q = P Bᵀ + β p eᵀ; the singular triples of the small B give those of Z.
    ‖Z v − σ u‖ vanishes by construction, so that the cycles end when ‖Zᵀu − σ v‖ = β |x_last| ≤ tolerance · σ. The leading
    vectors stay when a new cycle begins (Baglama & Reichel 2005).

    Args:
      operator: Z.
      start: a vector of the output side.
      wanted: how many triples.
      tolerance: of the relative residual.
      subspace: the size of B, more than `wanted`.
      max_restarts: cycles after the first, at most.

    Returns:
      The triples, the largest value first, and the products with Z and Zᵀ used, int32.
    """

    def extend(j, space):
        q, coefficients, alpha = _orthogonalized(
            operator.forward(space.right[j]), space.left, operator.dot_in
        )
        column = jnp.moveaxis(coefficients, 0, -1).at[..., j].set(alpha)
        p, _, beta = _orthogonalized(operator.adjoint(q), space.right, operator.dot_out)
        return _Space(
            space.right.at[j + 1].set(p),
            space.left.at[j].set(q),
            space.core.at[..., j].set(column),
            beta,
        )

    def cycle(carry):
        space, *_, restarts, products = carry
        # The first cycle starts with one vector, the others with the wanted ones and the next.
        begin = jnp.where(restarts == 0, 0, wanted)
        space = jax.lax.fori_loop(begin, subspace, extend, space)
        left, values, right_t = _small_svd(space.core)
        residual = space.coupling[..., None] * jnp.abs(left[..., -1, :wanted])
        done = jnp.all(residual <= tolerance * values[..., :wanted])
        restarted = _Space(
            jnp.zeros_like(space.right)
            .at[:wanted]
            .set(_combine(right_t[..., :wanted, :], space.right[:-1]))
            .at[wanted]
            .set(space.right[-1]),
            jnp.zeros_like(space.left).at[:wanted].set(_combine(left.mT[..., :wanted, :], space.left)),
            jnp.zeros_like(space.core)
            .at[..., jnp.arange(wanted), jnp.arange(wanted)]
            .set(values[..., :wanted]),
            space.coupling,
        )
        return restarted, values[..., :wanted], done, restarts + 1, products + subspace - begin

    def running(carry):
        _, _, done, restarts, _ = carry
        return ~done & (restarts <= max_restarts)

    norm = length(operator.dot_out(start, start))
    p = times(1 / safe(norm), start)
    q = jax.eval_shape(operator.forward, p)
    space = _Space(
        jnp.zeros((subspace + 1, *p.shape), p.dtype).at[0].set(p),
        jnp.zeros((subspace, *q.shape), q.dtype),
        jnp.zeros((*norm.shape, subspace, subspace), norm.dtype),
        jnp.zeros_like(norm),
    )
    zero = jnp.zeros((), jnp.int32)
    begin = (space, jnp.zeros((*norm.shape, wanted), norm.dtype), jnp.zeros((), bool), zero, zero)
    space, values, _, _, products = jax.lax.while_loop(running, cycle, begin)
    triples = [Triple(values[..., i], space.left[i], space.right[i]) for i in range(wanted)]
    return triples, products


def _orthogonalized(x: jax.Array, basis: jax.Array, dot: Any) -> tuple[jax.Array, Any, jax.Array]:
    """x without its parts in the basis (twice, against rounding), the coefficients of these parts, and its norm."""
    total = 0.0
    for _ in range(2):
        coefficients = dot(basis, x)
        x = x - jnp.sum(times(coefficients, basis), 0)
        total = total + coefficients
    norm = length(dot(x, x))
    # What rounding leaves of a vector inside the basis is no direction.
    size = length(jnp.sum(jnp.square(total), 0) + jnp.square(norm))
    dropped = norm <= 8 * jnp.finfo(norm.dtype).eps * size
    return times(jnp.where(dropped, 0, 1 / safe(norm)), x), total, jnp.where(dropped, 0, norm)


def _combine(coefficients: jax.Array, vectors: jax.Array) -> jax.Array:
    """Σ_j c_ij x_j for coefficients (*stack, i, j) and vectors (j, *stack, ...)."""
    moved = jnp.moveaxis(coefficients, (-2, -1), (0, 1))
    return jnp.stack([jnp.sum(times(row, vectors), 0) for row in moved])


def _small_svd(core: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    def batched(stack):
        return tuple(jnp.linalg.svd(stack, full_matrices=False))

    flat = core.reshape(-1, *core.shape[-2:])
    results = kronecker.one_at_a_time_on_cpu(batched, flat)
    return tuple(v.reshape(*core.shape[:-2], *v.shape[1:]) for v in results)
