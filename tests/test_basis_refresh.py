"""The refresh of the eigenbasis: bases kept within a tolerance, and QR steps that converge to the eigenvectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import factor_rows as fr
from . import given_factors as gf
from .dense import assert_close, relative_error


def still_table(off_diagonal):
    """Two steps of terms: diagonal in the basis of the first, then with this part of their norm beside the diagonal."""
    generator, table = np.random.default_rng(4), {}
    for name, (stacked, _, *sizes) in fr.SHAPES.items():
        sides = []
        for i, d in enumerate(sizes):
            lead = (stacked,) if stacked else ()
            if gf.DIAGONAL[name][i]:
                sides.append(np.ones((2, *lead, d)))
                continue
            u = np.linalg.qr(generator.normal(size=(*lead, d, d)))[0]
            beside = np.ones((d, d)) - np.eye(d)
            values = np.diag(np.arange(1.0, d + 1))
            # ‖offdiag‖ = share ‖whole‖ and a diagonal of norm √(1 − share²).
            whole = off_diagonal * beside / np.linalg.norm(beside)
            whole = whole + np.sqrt(1 - off_diagonal**2) * values / np.linalg.norm(values)
            sides.append(np.stack([u @ m @ u.swapaxes(-1, -2) for m in (values, whole)]))
        table[name] = (kfe.factors.Term(*sides),)
    return table


@pytest.mark.parametrize("refresh", ["eigh", "qr"])
def test_refresh_tolerance(refresh, x64):
    """At 0.1 of the norm beside the diagonal a tolerance of 0.101 keeps every bit of the basis, one of 0.099 none."""
    layers, params = fr.layers(), fr.parameters()
    table = still_table(0.1)
    gradients = gf.random_gradients(np.random.default_rng(0))

    @jax.jit
    def run(tolerance):
        tx = kfe.in_kfe(
            optax.identity(),
            layers,
            basis=gf.Given(table),
            factor_update_period=1,
            basis_update_period=1,
            refresh=refresh,
            refresh_tolerance=tolerance,
        )
        first = tx.update(gradients, tx.init(params), params)[1]
        return first.method, tx.update(gradients, first, params)[1].method

    for tolerance, kept in ((0.101, True), (0.099, False)):
        before, after = run(jnp.asarray(tolerance))
        for name in fr.SHAPES:
            for i, side in enumerate(after.basis[name]):
                if side.vectors is None:
                    continue
                old, factor = np.asarray(before.basis[name][i].vectors), table[name][0][i][1]
                assert np.array_equal(old, side.vectors) == kept, (name, i)
                # Kept or not, the eigenvalues are Rayleigh quotients of the new factor.
                u = np.asarray(side.vectors)
                quotients = np.einsum("...ik,...ij,...jk->...k", u, factor, u)
                assert_close(side.values, quotients)
                assert relative_error(before.basis[name][i].values, quotients) > 0.1


def test_qr_converges_to_the_eigenvectors(x64):
    """Factors that stand still: one power step a refresh ends at eigh's basis, columns sorted, the largest first."""
    layers, params = fr.layers(), fr.parameters()
    table = {
        name: (kfe.factors.Term(*(side[[0, 1] + [1] * 60] for side in term)),)
        for name, (term,) in still_table(0.4).items()
    }
    tx = kfe.in_kfe(
        optax.identity(),
        layers,
        basis=gf.Given(table),
        factor_update_period=1,
        basis_update_period=1,
        refresh="qr",
    )
    gradients = gf.random_gradients(np.random.default_rng(0))

    @jax.jit
    def run(state):
        return jax.lax.scan(
            lambda s, _: (tx.update(gradients, s, params)[1], s.method.basis), state, None, 62
        )

    state, history = run(tx.init(params))
    for name in fr.SHAPES:
        for i, side in enumerate(state.method.basis[name]):
            if side.vectors is None:
                continue
            values, expected = np.linalg.eigh(table[name][0][i][-1])
            overlap = np.abs(np.asarray(side.vectors.mT) @ expected[..., ::-1])
            assert_close(overlap, np.broadcast_to(np.eye(overlap.shape[-1]), overlap.shape), 1e-8)
            assert_close(side.values, values[..., ::-1], 1e-8)
            # The start was eigh's of another matrix, in ascending order.
            start = np.abs(np.asarray(history[name][i].vectors[1].mT) @ expected[..., ::-1])
            assert relative_error(start, np.broadcast_to(np.eye(overlap.shape[-1]), start.shape)) > 0.5
