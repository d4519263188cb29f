"""msign against a singular value decomposition, and its coefficients against their theorem."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfe_optax import polar

from .dense import assert_close

msign = jax.jit(polar.msign, static_argnums=(1, 2))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (9, 4), (2, 11), (2, 3, 1, 4), (2, 7, 3), (1, 1)])
def test_svd(shape, x64):
    matrix = np.random.default_rng(0).normal(size=shape)
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    found = msign(jnp.asarray(matrix), polar.minimax_coefficients(16, 1e-6))
    assert_close(found, u @ v, 1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(4, 4), (2, 11)])
def test_scale_does_not_matter(shape, size):
    """Also where squares are out of float32's range."""
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ours, theirs = (msign(jnp.asarray(matrix * np.float32(s))) for s in (size, 1.0))
    assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("shape", [(3, 8), (2, 9)])
def test_null_directions_stay_null(shape):
    """Zero, and a matrix of rank one, of which u vᵀ alone is found."""
    found = msign(
        np.stack([np.zeros(shape), np.ones(shape)]).astype(np.float32), polar.minimax_coefficients(9)
    )
    assert not np.any(found[0])
    # What is a rounding error of float32 at first grows as a singular value of that size does.
    growth = np.prod([a for a, _, _ in polar.minimax_coefficients(9)[:5]])
    expected = np.ones(shape) / np.sqrt(shape[0] * shape[1])
    assert_close(found[1], expected, growth * np.finfo(np.float32).eps)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256)])
def test_half_precision(shape):
    """Rounding carries no singular value out of the polynomials' intervals, where they have no bound."""
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    both = np.stack([matrix, np.outer(matrix[:, 0], matrix[0])])
    found = msign(both, polar.minimax_coefficients(7), jnp.bfloat16)
    assert found.dtype == jnp.float32
    assert_close(np.linalg.svd(found[0])[1], np.ones(shape[0]), 0.02)
    # Each iteration moves directions by some roundings, 2⁻⁹ each.
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    assert_close(found[0], u @ v, 0.05)
    assert np.isfinite(found[1]).all() and np.linalg.svd(found[1])[1].max() < 1.02


def quintic(coefficients, s):
    a, b, c = coefficients
    return a * s + b * s**3 + c * s**5


def test_coefficients_are_the_best_on_their_interval():
    """1 − p takes its largest modulus at four points with alternating signs (Chebyshev), and the composition gets to 1."""
    lower, upper = 1e-3, 1.0
    steps = polar.minimax_coefficients(9)
    for coefficients in steps[:5]:
        s = np.linspace(lower, upper, 200_001)
        error = 1 - quintic(coefficients, s)
        worst = np.abs(error).max()
        ends = error[np.abs(error) > worst * (1 - 1e-6)]
        assert np.count_nonzero(np.diff(np.sign(ends))) == 3
        lower, upper = 1 - worst, 1 + worst
    s = np.geomspace(1e-3, 1, 1000)
    for coefficients in steps:
        s = quintic(coefficients, s)
    assert np.abs(s - 1).max() < 1e-12


def test_muon_stays_in_its_band():
    s = np.geomspace(1e-2, 1, 1000)
    for coefficients in polar.MUON:
        s = quintic(coefficients, s)
    assert s.min() > 0.65 and s.max() < 1.25


def test_misuse():
    for wrong in ({"steps": 0}, {"smallest": 0.0}, {"smallest": 1.0}):
        with pytest.raises(ValueError, match="steps must be positive and smallest in"):
            polar.minimax_coefficients(**wrong)
    with pytest.raises(ValueError, match="one triple"):
        polar.checked(())
    for wrong in ("bf", 3, jnp.int32):
        with pytest.raises(ValueError, match="iteration_dtype must be a floating-point dtype"):
            polar.checked_dtype(wrong)
