"""What the papers prove about the factors' errors, on random rows; F is dense and does not come from the library."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfe_optax as kfe

from . import dense_factors as df
from . import factor_rows as fr
from .dense import relative_error

DECAY = 0.6
PROPERTY = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
BATCHES = {"seed": st.integers(0, 2**31 - 1), "size": st.floats(0.01, 100)}
# (never worse, than): of one batch's own F, in dense layers, shared positions, stacks and parameters used twice.
ORDER = [
    ("kpsvd", "kfac"),
    ("kpsvd", "tkfac"),
    ("kpsvd", "tkfac_example"),
    ("deflation", "kpsvd"),
    ("lanczos", "kpsvd"),
    ("streaming", "kpsvd"),
    ("kfac_corrected", "kfac"),
    ("lanczos", "kfac_corrected"),
]


def errors(seed, size):
    """{layer: {estimator: ‖F − F̂‖/‖F‖}} and {layer: the singular values of Z(F)/‖F‖ over all matrices}."""
    rows = fr.random_rows(seed, size)
    _, terms = fr.updater(DECAY)(fr.init(DECAY, fr.WHOLE), rows, 0)
    found, values = {}, {}
    for name, own in terms.items():
        for key, a, g, pairs in fr.members(rows, own):
            f = df.fisher_of_rows(a, g)
            found.setdefault(key, {})[name] = relative_error(df.matrix(pairs), f)
            z = df.rearrange(f, a.shape[-1], g.shape[-1])
            values[key] = np.linalg.svd(z, compute_uv=False) / np.linalg.norm(f)
    return found, values


@pytest.mark.slow
@PROPERTY
@given(**BATCHES)
def test_order_of_the_errors(x64, seed, size):
    found, values = errors(seed, size)
    assert len(found) == 5
    for key, error in found.items():
        for better, worse in ORDER:
            if better in error and worse in error:
                assert error[better] <= error[worse] + 1e-12, (key, better, worse)
        assert abs(error["deflation"] - error["lanczos"]) <= 1e-10
        # The best of all Kronecker products, not only of the symmetric ones (Van Loan & Pitsianis 1993).
        assert abs(error["kpsvd"] ** 2 - (1 - values[key][0] ** 2)) <= 1e-10


@functools.cache
def basis_states():
    """rows → the states of EKFAC and TEKFAC after one batch."""
    layers = fr.layers()
    differentiate = kfe.value_grad_and_taps(fr.loss_fn, layers, fisher="empirical")
    methods = {
        "kfac": kfe.scale_by_ekfac(layers, 1e-3, scale="batch"),
        "tkfac": kfe.scale_by_tekfac(layers, 1e-3, pairing="example"),
    }

    @jax.jit
    def run(rows):
        params = fr.parameters()
        _, grads, taps = differentiate(params, rows)
        states = {n: tx.update(grads, tx.init(params), params, taps=taps)[1] for n, tx in methods.items()}
        make = {"kfac": kfe.factors.kfac(), "tkfac": kfe.factors.tkfac()}
        return {n: (make[n].terms(s.method.factors, layers), s.method) for n, s in states.items()}

    return run


@PROPERTY
@given(**BATCHES)
def test_a_scale_in_the_basis_is_never_worse(x64, seed, size):
    """‖F − EKFAC‖ ≤ ‖F − K-FAC‖ and ‖F − TEKFAC‖ ≤ ‖F − TKFAC‖, both with the trace of F."""
    rows = fr.random_rows(seed, size)
    for name, (terms, state) in basis_states()(rows).items():
        count = 0
        for (layer, i), a, g, pairs in fr.members(rows, terms):
            f = df.fisher_of_rows(a, g)
            pick = lambda v, layer=layer, i=i: np.asarray(v[i] if fr.SHAPES[layer][0] else v)
            u_in, u_out = (pick(side.vectors) for side in state.basis[layer])
            own = df.in_basis(pick(state.scale[layer]), u_in, u_out)
            assert relative_error(own, f) <= relative_error(df.matrix(pairs), f) + 1e-12, (name, layer)
            assert abs(np.trace(own) / np.trace(f) - 1) <= 1e-12
            count += 1
        assert count == 5
