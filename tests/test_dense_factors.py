"""The dense references themselves obey the papers' theorems."""

from __future__ import annotations

import numpy as np
import pytest

from . import dense_factors as df
from . import dense_soap
from .dense import relative_error

N, D_IN, D_OUT = 7, 4, 3


def rows(positions, seed=0):
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(N, positions, D_IN)) + 0.5
    return a, generator.normal(size=(N, positions, D_OUT)) * (1 + a[..., :1] ** 2)


@pytest.mark.parametrize("positions", [1, 3])
def test_theorems(positions):
    a, g = rows(positions)
    f = df.fisher_of_rows(a, g)
    error = lambda terms: relative_error(df.matrix(terms), f)
    factors, ((r, s),) = df.kfac(a, g), df.kpsvd(f, D_IN, D_OUT)
    assert np.linalg.eigvalsh(r)[0] > -1e-12 and np.linalg.eigvalsh(s)[0] > -1e-12
    # Over all matrices, not only symmetric ones: the leading triple is symmetric.
    sigma = np.linalg.svd(df.rearrange(f, D_IN, D_OUT), compute_uv=False)
    best = error([(r, s)])
    assert best == pytest.approx(np.sqrt(np.sum(sigma[1:] ** 2)) / np.linalg.norm(f), rel=1e-12)
    assert error(df.deflation(f, D_IN, D_OUT)) < best < error([factors])
    assert error(df.kfac_corrected(f, *factors)) < error([factors])
    for pairing in ("position", "example"):
        sigma, phi, psi = df.tkfac(a, g, pairing)
        np.testing.assert_allclose([np.trace(phi), np.trace(psi)], 1, rtol=1e-13)
        if (pairing, positions) != ("position", 3):
            assert sigma == pytest.approx(np.trace(f), rel=1e-13)
        own, basis = error(df.tkfac_terms(sigma, phi, psi)), (np.linalg.eigh(phi)[1], np.linalg.eigh(psi)[1])
        assert best < own
        assert relative_error(df.in_basis(df.best_diagonal(f, *basis), *basis), f) < own


def test_two_terms_are_found_and_inverted():
    generator = np.random.default_rng(1)
    a, b, c, d = (m @ m.T for m in (generator.normal(size=(k, k)) for k in (D_IN, D_OUT, D_IN, D_OUT)))
    f, v = np.kron(a, b) + np.kron(c, d), generator.normal(size=(D_IN, D_OUT))
    np.testing.assert_allclose(df.unrearrange(df.rearrange(f, D_IN, D_OUT), D_IN, D_OUT), f)
    np.testing.assert_allclose(df.rearrange(np.kron(a, b), D_IN, D_OUT), np.outer(a, b), rtol=1e-14)
    for terms in (df.lanczos(f, D_IN, D_OUT), df.streaming([f, f, f], 0.9, 2, D_IN, D_OUT)[-1]):
        assert relative_error(df.matrix(terms), f) < 1e-13
    solved = [df.solve_two_terms(a, b, c, d, v, 1, how, 0.5) for how in ("exact", "absolute", "clip")]
    assert relative_error(solved, [solved[0]] * 3) < 1e-9
    # Indefinite C and D: (A⊗B)^(−1/2) f(X)⁻¹ (A⊗B)^(−1/2), f on the eigenvalues of the explicit X.
    c, d = c - 9 * np.eye(D_IN), d - 4 * np.eye(D_OUT)
    root = np.kron(df.inverse_root(a), df.inverse_root(b))
    x, e = np.linalg.eigh(root @ np.kron(c, d) @ root)
    assert x[0] < -1
    clipped = [(sign, "clip", np.maximum(1 + sign * x, 0.5)) for sign in (1, -1)]
    for sign, how, divisor in [(1, "absolute", 1 + np.abs(x)), *clipped]:
        actual = df.solve_two_terms(a, b, c, d, v, sign, how, 0.5).ravel()
        assert relative_error(actual, root @ e @ ((e.T @ root @ v.ravel()) / divisor)) < 1e-9


def test_averages_ignore_the_sign_of_a_second_term():
    (r, s), (p, q) = df.deflation(df.fisher_of_rows(*rows(1)), D_IN, D_OUT)
    average = df.TermsAverage(0.9)
    terms = average.add([(r, s), (p, q)])
    assert relative_error(df.matrix(average.add([(r, s), (-p, -q)])), df.matrix(terms)) < 1e-14


@pytest.mark.parametrize("options", [{}, {"refresh": "qr"}, {"second_moment": "rotate"}])
@pytest.mark.parametrize("after", [False, True])
def test_soap_follows_a_rotation_of_the_parameters(options, after):
    generator = np.random.default_rng(2)
    o, sequence = np.linalg.qr(generator.normal(size=(3, 3)))[0], generator.normal(size=(6, 3, 3))
    options = {**options, "period": 2, "eps": 1e-4, "refresh_after": after}
    plain = dense_soap.soap([[g] for g in sequence], **options)
    turned = dense_soap.soap([[o @ g] for g in sequence], **options)
    assert relative_error([o.T @ u[0] for u in turned], [u[0] for u in plain]) < 1e-10
