"""Linear algebra of Kronecker-factored matrices: inverses, eigenbases, products; one batched call for each shape.

A factor is a symmetric positive semi-definite matrix (..., d, d), or its diagonal (..., d) where a side is larger than
`max_dim`. (A⊗G) vec(V) = vec(A V Gᵀ) in row-major vec.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._linalg.devices import ALONE, Devices, shared, whole

Key = Any


class Eigenbasis(NamedTuple):
    """Eigenvalues (..., d) and eigenvectors (..., d, d) as columns, in any order; vectors None for a diagonal side.

    Of a pencil (see `pencil`), the relative eigenvalues s and the columns of K.
    """

    values: jax.Array
    vectors: jax.Array | None


def by_shape(
    function: Callable[..., Any], arguments: Mapping[Key, Any], devices: Devices = ALONE
) -> dict[Key, Any]:
    """Applies a batched function (b, d, d), ... → pytree of (b, ...) once for each shape and dtype, to all arguments stacked.

    Args:
      function: takes as many stacks as there are entries in an argument.
      arguments: {key: matrix (*stack, d, d), or a tuple of arrays with one `stack`, a matrix first; what is smaller than a
        matrix, such as eigenvalues (*stack, d), has the rank of `stack` plus its own}.
      devices: who computes; several have their share each, and all of them the results.
    """
    tuples = {key: value if isinstance(value, tuple) else (value,) for key, value in arguments.items()}
    return _by_form(function, tuples, {key: value[0].ndim - 2 for key, value in tuples.items()}, devices)


def each(
    function: Callable[..., Any], arguments: Mapping[Key, tuple[Any, ...]], devices: Devices
) -> dict[Key, Any]:
    """{key: function(*argument)} for what is not worth stacking, such as products: by shape only where devices share the work.

    Args:
      function: of arrays with any `stack` in front, to arrays with the same.
      arguments: {key: (matrix (*stack, m, n), further pytrees of arrays (*stack, ...))}; a layer whose blocks share a factor,
        which has ones in its `stack`, is not taken apart.
      devices: who computes; several have their share each, and all of them the results.
    """
    if devices.count == 1:
        return {key: function(*argument) for key, argument in arguments.items()}
    leads = {}
    for key, argument in arguments.items():
        lead = argument[0].shape[:-2]
        apart = all(leaf.shape[: len(lead)] == lead for leaf in jax.tree.leaves(argument))
        leads[key] = len(lead) if apart else 0
    return _by_form(function, arguments, leads, devices)


def _by_form(
    function: Callable[..., Any],
    arguments: Mapping[Key, tuple[Any, ...]],
    leads: Mapping[Key, int],
    devices: Devices,
) -> dict[Key, Any]:
    """Stacks arguments of one form along one axis in place of their first axes, as many as `leads` says."""
    groups: dict[Any, list[Key]] = {}
    flat = {key: jax.tree.flatten(whole(argument)) for key, argument in arguments.items()}
    for key, (leaves, structure) in flat.items():
        form = (structure, tuple((v.shape[leads[key] :], v.dtype) for v in leaves))
        groups.setdefault(form, []).append(key)
    stacks = []
    for (structure, shapes), keys in groups.items():
        parts = [[flat[key][0][i].reshape(-1, *s) for key in keys] for i, (s, _) in enumerate(shapes)]
        stacks.append(structure.unflatten([p[0] if len(p) == 1 else jnp.concatenate(p) for p in parts]))
    results: dict[Key, Any] = {}
    for keys, result in zip(groups.values(), shared(devices, function, stacks), strict=True):
        start = 0
        for key in keys:
            lead = flat[key][0][0].shape[: leads[key]]
            here = slice(start, start + math.prod(lead))
            results[key] = jax.tree.map(
                lambda v, here=here, lead=lead: v[here].reshape(*lead, *v.shape[1:]), result
            )
            start = here.stop
    return results


def inverse(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverses of positive definite (b, d, d) by Cholesky, and which of them are finite."""

    def batched(stack):
        lower = _cholesky(stack)
        if lower.shape[-1] <= _DIRECT:
            h = _inverse_of_triangular(lower)
            return h.mT @ h
        p, q, r = _inverse_halves(lower)
        below = r.mT @ q
        return jnp.block([[p.mT @ p + q.mT @ q, below.mT], [below, r.mT @ r]])

    inverses = one_at_a_time_on_cpu(batched, matrices)
    return inverses, jnp.isfinite(inverses).all((-2, -1))


def _inverse_factor(stack: jax.Array) -> jax.Array:
    """H = L⁻¹ with L Lᵀ = A, lower triangular: H A Hᵀ = I and A⁻¹ = Hᵀ H; NaN where A is not positive definite."""
    lower = _cholesky(stack)
    if lower.shape[-1] <= _DIRECT:
        return _inverse_of_triangular(lower)
    p, q, r = _inverse_halves(lower)
    return jnp.block([[p, jnp.zeros_like(q.mT)], [q, r]])


def _cholesky(stack: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(stack)


# Above this size halves and the products between them are faster; halves of halves gain 8 % of 1,000 units, and compile for long.
_DIRECT = 256


def _inverse_halves(lower: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """P⁻¹, −R⁻¹ Q P⁻¹ and R⁻¹, the parts of the inverse of L = [[P, 0], [Q, R]].

    The factorization itself is not done by halves: with P⁻¹ for a solve its Schur complement loses half of its digits.
    """
    half = lower.shape[-1] // 2
    p, r = (_inverse_of_triangular(part) for part in (lower[..., :half, :half], lower[..., half:, half:]))
    return p, -r @ lower[..., half:, :half] @ p, r


def _inverse_of_triangular(lower: jax.Array) -> jax.Array:
    identity = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def eigh(matrices: jax.Array) -> tuple[Eigenbasis, jax.Array]:
    """Eigenbases of symmetric (b, d, d), eigenvalues clipped at zero, and which of them are finite."""
    basis = one_at_a_time_on_cpu(raw_eigh, matrices)
    finite = jnp.isfinite(basis.vectors).all((-2, -1)) & jnp.isfinite(basis.values).all(-1)
    return Eigenbasis(jnp.maximum(basis.values, 0), basis.vectors), finite


def raw_eigh(stack: jax.Array) -> Eigenbasis:
    """Eigenbases of a stack in one call, unchecked; to be called inside `one_at_a_time_on_cpu`."""
    vectors, values = jax.lax.linalg.eigh(stack, symmetrize_input=True)
    return Eigenbasis(values, vectors)


def pencil(positive: jax.Array, other: jax.Array) -> tuple[Eigenbasis, jax.Array]:
    """K and s with Kᵀ A K = I and Kᵀ C K = diag(s), for A positive definite and C symmetric (b, d, d), and which are finite.

    K = A^{-1/2} E up to a rotation of the root, with E the eigenvectors of A^{-1/2} C A^{-1/2}. An A that rounding has left
    with eigenvalues at or below zero is inverted with its eigenvalues raised to `_SMALLEST` of the largest.
    """

    def batched(a, c):
        root = _inverse_factor(a).mT
        root = jax.lax.cond(jnp.isfinite(root).all(), lambda: root, lambda: _clipped_inverse_root(a))
        values, rotation = raw_eigh(root.mT @ c @ root)
        return Eigenbasis(values, root @ rotation)

    basis = one_at_a_time_on_cpu(batched, positive, other)
    finite = jnp.isfinite(basis.vectors).all((-2, -1)) & jnp.isfinite(basis.values).all(-1)
    return basis, finite


_SMALLEST = 1e-6


def _clipped_inverse_root(stack: jax.Array) -> jax.Array:
    vectors, values = jax.lax.linalg.eigh(stack, symmetrize_input=True)
    floor = _SMALLEST * values.max(-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(values, floor))[..., None, :]


def one_at_a_time_on_cpu(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """A batched factorization; matrix by matrix on a CPU, also under a user's vmap.

    jaxlib's batched LAPACK kernels wait in XLA's thread pool for workers of that same pool: two of them at once, of different
    shapes, hang a machine with two cores. A single matrix needs no worker.
    """

    @jax.custom_batching.sequential_vmap
    def single(*matrices):
        return jax.tree.map(lambda v: v[0], function(*(matrix[None] for matrix in matrices)))

    return jax.lax.platform_dependent(
        *stacks, cpu=lambda *s: jax.lax.map(lambda m: single(*m), s), default=function
    )


def is_diagonal(factor: jax.Array, stacked: int) -> bool:
    """Whether a factor is stored as its diagonal, for a layer with `stacked` stacked axes."""
    return factor.ndim == stacked + 1


def trace(factor: jax.Array, stacked: int) -> jax.Array:
    """(...,) traces of factors or diagonals."""
    if is_diagonal(factor, stacked):
        return factor.sum(-1)
    # jnp.trace masks and reads the whole matrix, on every step.
    index = jnp.arange(factor.shape[-1])
    return factor[..., index, index].sum(-1)


def identity_like(factor: jax.Array, stacked: int) -> jax.Array:
    """I in the shape of a factor, or a diagonal of ones."""
    if is_diagonal(factor, stacked):
        return jnp.ones_like(factor)
    return jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)


def left(factor: jax.Array | None, v: jax.Array, stacked: int, transpose: bool = False) -> jax.Array:
    """factor @ V (or its transpose); a diagonal scales rows, None is the identity."""
    if factor is None:
        return v
    if is_diagonal(factor, stacked):
        return factor[..., :, None] * v
    return (factor.mT if transpose else factor) @ v


def right(v: jax.Array, factor: jax.Array | None, stacked: int, transpose: bool = False) -> jax.Array:
    """V @ factor (or its transpose); a diagonal scales columns, None is the identity."""
    if factor is None:
        return v
    if is_diagonal(factor, stacked):
        return v * factor[..., None, :]
    return v @ (factor.mT if transpose else factor)


def to_basis(v: jax.Array, basis: tuple[Eigenbasis, Eigenbasis], stacked: int) -> jax.Array:
    """U_Aᵀ V U_G."""
    return right(left(basis[0].vectors, v, stacked, transpose=True), basis[1].vectors, stacked)


def from_basis(v: jax.Array, basis: tuple[Eigenbasis, Eigenbasis], stacked: int) -> jax.Array:
    """U_A V U_Gᵀ."""
    return right(left(basis[0].vectors, v, stacked), basis[1].vectors, stacked, transpose=True)


def dot(a: jax.Array, b: jax.Array, stacked: int) -> jax.Array:
    """(...,) Frobenius inner products of two factors, or of two diagonals."""
    return jnp.sum(a * b, tuple(range(stacked, a.ndim)))


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a bᵀ for (..., m) and (..., n)."""
    return a[..., :, None] * b[..., None, :]


def pool_null_directions(
    scale: jax.Array, basis: tuple[Eigenbasis, Eigenbasis], threshold: float
) -> jax.Array:
    """Directions with an eigenvalue below `threshold` of the largest share the mean of their scales.

    eigh's basis of a null space is arbitrary, and with it a diagonal scale in that space; its mean is not. A side that has no
    vectors keeps its own coordinates, and its scales.
    """
    if isinstance(threshold, float | int) and not threshold:
        return scale
    for side in (0, 1):
        values = basis[side].values
        if basis[side].vectors is None:
            continue
        # Products with zeros and ones, which compile faster than choices.
        null = (values < threshold * values.max(-1, keepdims=True)).astype(scale.dtype)
        null = null[..., :, None] if side == 0 else null[..., None, :]
        axis = -2 if side == 0 else -1
        count = jnp.maximum(null.sum(axis, keepdims=True), 1)
        scale = (1 - null) * scale + null * (jnp.sum(null * scale, axis, keepdims=True) / count)
    return scale
