"""The orthogonal factor of a matrix, msign(X) = U Vᵀ for X = U diag(s) Vᵀ, by Newton–Schulz iterations: products alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Coefficients = Sequence[tuple[float, float, float]]

MUON: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's five iterations (Jordan et al. 2024): they take singular values from about 1e-2 of the norm to [0.68, 1.21]."""


@functools.cache
def minimax_coefficients(steps: int = 5, smallest: float = 1e-3) -> Coefficients:
    """The odd quintics a s + b s³ + c s⁵ that take all singular values in [smallest, 1] closest to 1, one after the other.

    Each is the best uniform approximation of 1 on the interval that the one before has left, [1 − e, 1 + e], by Remez'
    exchange; their composition is the best of all compositions of so many (Amsel et al. 2025).

    Args:
      steps: how many.
      smallest: ℓ, relative to the norm; smaller singular values grow by at least as much and end below 1.

    Raises:
      ValueError: no step, or a `smallest` outside (0, 1).

    Example:
      >>> from kfe_optax import polar
      >>> [round(c, 2) for c in polar.minimax_coefficients(5)[0]]
      [8.47, -25.11, 18.63]
    """
    if steps < 1 or not 0 < smallest < 1:
        raise ValueError(f"steps must be positive and smallest in (0, 1), not {steps!r} and {smallest!r}.")
    lower, upper, found = float(smallest), 1.0, []
    for _ in range(steps):
        quintic, error = _best_quintic(lower, upper)
        found.append(quintic)
        lower, upper = 1 - error, 1 + error
    return tuple(found)


def _best_quintic(lower: float, upper: float) -> tuple[tuple[float, float, float], float]:
    """(a, b, c) and the error of the best odd quintic on an interval: 1 − p alternates at four points."""
    if upper - lower < 1e-4:
        # The limit, with an error of third order, where Remez' system is singular.
        return (15 / 8, -10 / 8, 3 / 8), (upper - lower) ** 3
    points = np.array([lower, (3 * lower + upper) / 4, (lower + 3 * upper) / 4, upper])
    error = np.inf
    for _ in range(100):
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], 1)
        *quintic, new = np.linalg.solve(system, np.ones(4))
        a, b, c = quintic
        if abs(new - error) <= 1e-14 * abs(new):
            break
        error = new
        root = np.sqrt(9 * b * b - 20 * a * c)
        points[1:3] = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
    return (float(a), float(b), float(c)), float(abs(error))


def checked(coefficients: Coefficients | None) -> Coefficients:
    """The coefficients as tuples, the default ones for None; raises ValueError for what are none."""
    if coefficients is None:
        return minimax_coefficients()
    try:
        found = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError):
        found = ()
    if not found:
        raise ValueError(
            "coefficients must be one triple (a, b, c) for each Newton–Schulz iteration, such as "
            f"kfe.polar.minimax_coefficients(5) or kfe.polar.MUON, not {coefficients!r}."
        )
    return found


def checked_dtype(dtype: jax.typing.DTypeLike | None) -> jax.typing.DTypeLike | None:
    """The dtype, or None; raises ValueError for what is no floating-point dtype."""
    try:
        known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(
            f"iteration_dtype must be a floating-point dtype such as jnp.bfloat16, or None, not {dtype!r}."
        )
    return dtype


# Above this ratio of its sides, products of a matrix with its Gram matrices cost more than the Gram matrices among each other.
_WIDE = 3


# Behind the end of its interval a polynomial rises so steeply that roundings of bfloat16 (in which accelerators multiply float32
# as well) carry the largest singular values to 1e20 in seven iterations. So they are kept this far inside of it.
_MARGIN = 1.01


def msign(
    matrix: Float[Array, "*stack d_in d_out"],
    coefficients: Coefficients | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """U Vᵀ of X = U diag(s) Vᵀ, to the accuracy of the coefficients: X ← a X + (b X Xᵀ + c (X Xᵀ)²) X from X/‖X‖_F.

    Args:
      matrix: X (..., m, n), real; zero stays zero. Above n = 3m (or m = 3n) all iterations but the last run on the Gram matrix
        of the smaller side alone; the last one, on the matrix, undoes what squaring the singular values has lost.
      coefficients: (a, b, c) of each iteration; `minimax_coefficients()` by default. Muon's are `MUON`.
      dtype: what the iterations are computed in; that of X by default. In bfloat16, with which accelerators multiply several
        times as fast, singular values come out to a percent.

    Returns:
      An array in the shape and dtype of X.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kfe_optax import polar
      >>> x = jax.random.normal(jax.random.key(0), (3, 8))
      >>> sign = polar.msign(x, polar.minimax_coefficients(7))
      >>> bool(jnp.allclose(sign @ sign.T, jnp.eye(3), atol=1e-4))
      True
    """
    coefficients = minimax_coefficients() if coefficients is None else coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    # The largest entry first: squares of tiny gradients are zero in float32.
    for size in (lambda v: jnp.abs(v).max((-2, -1), keepdims=True), _norm):
        x = x / jnp.where(size(x) > 0, size(x), 1)
    x = x if dtype is None else x.astype(dtype)
    if jnp.finfo(x.dtype).bits <= 32:
        # Nothing follows the last one.
        inside = [(a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in coefficients[:-1]]
        coefficients = (*inside, coefficients[-1])
    if x.shape[-1] > _WIDE * x.shape[-2] and len(coefficients) > 1 and jnp.finfo(x.dtype).bits >= 32:
        # Squares of singular values that are lost in rounding may come out negative, and grow.
        with jax.default_matmul_precision("highest"):
            x, coefficients = _by_gram(x, coefficients[:-1]), coefficients[-1:]
    x = _directly(x, coefficients).astype(matrix.dtype)
    return x.mT if tall else x


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))


def _directly(x: jax.Array, coefficients: Coefficients) -> jax.Array:
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _by_gram(x: jax.Array, coefficients: Coefficients) -> jax.Array:
    """p(X Xᵀ) X with the product p of all polynomials, which commute: small products between the first and the last."""
    gram = x @ x.mT
    identity = jnp.eye(x.shape[-2], dtype=x.dtype)
    product = identity
    for a, b, c in coefficients:
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x
