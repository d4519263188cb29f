"""A damping below the rounding errors of the curvature is taken as four of them: nothing freezes, nothing overflows."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax._linalg import damping

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)) @ np.ones((2, 4)), jnp.float32)  # rank one
PARAMS = {"kernel": jnp.ones((4, 3))}


def loss_fn(params):
    z = kfe.tag_dense(X, X @ params["kernel"], params)
    return kfe.losses.l2_loss(z, jnp.ones_like(z)).mean()


LAYERS = kfe.find_layers(loss_fn, PARAMS)
METHODS = {
    "factored": lambda strength: kfe.scale_by_kfac(LAYERS, strength),
    "exact": lambda strength: kfe.scale_by_kfac(LAYERS, strength, damping_type="exact"),
    "sqrt": lambda strength: kfe.scale_by_kronecker(LAYERS, strength, damping_type="sqrt"),
    "linear": lambda strength: kfe.scale_by_kronecker(LAYERS, strength, damping_type="linear"),
    "ekfac": lambda strength: kfe.scale_by_ekfac(LAYERS, strength),
    "ekfac factored": lambda strength: kfe.scale_by_ekfac(LAYERS, strength, damping_type="factored"),
    "tekfac": lambda strength: kfe.scale_by_tekfac(LAYERS, strength),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_damping_is_the_least_one(name):
    """λ of 1e-12, 1e-20, 1e-38 and a schedule at zero: no failure, and the same finite update for all that are too small."""
    differentiate = jax.jit(kfe.value_grad_and_taps(loss_fn, LAYERS))
    _, grads, taps = differentiate(PARAMS, key=jax.random.key(0))
    updates = []
    for strength in (1e-20, 1e-38, lambda step: 0.0 * step):
        tx = METHODS[name](strength)
        new, state = tx.update(grads, tx.init(PARAMS), PARAMS, taps=taps)
        assert int(kfe.info(state).failures) == 0
        assert jnp.vdot(new["kernel"], grads["kernel"]) > 0
        updates.append(np.asarray(new["kernel"]))
        assert np.isfinite(updates[-1]).all() and np.abs(updates[-1]).max() < 1e9
    np.testing.assert_allclose(updates[1], updates[0], rtol=1e-5)
    np.testing.assert_allclose(updates[2], updates[0], rtol=1e-5)


def test_the_least_damping(x64):
    """4 ε of the largest curvature, in the dtype of the factors; more is left as it is."""
    for dtype in (jnp.float32, jnp.float64):
        assert float(damping.least(jnp.asarray(3.0, dtype))) == 12 * float(jnp.finfo(dtype).eps)
    a, g = jnp.diag(jnp.array([1.0, 3.0])), jnp.diag(jnp.array([2.0]))
    added = damping.factored(a, g, jnp.float64(1e-4), 0)
    assert float((1 + added[0]) * (2 + added[1]) - (1 + 1e-2) * (2 + 1e-2)) == pytest.approx(0, abs=1e-12)
    for strength in (0.0, 1e-40):
        inputs, outputs = damping.factored(a, g, jnp.float64(strength), 0)
        assert float(inputs) == pytest.approx(16 * np.finfo(float).eps)
        assert float(outputs) == pytest.approx(8 * np.finfo(float).eps)


def test_the_least_damping_of_elements():
    """What factored damping adds to eigenvalues, and TEKFAC's λ, are at least 4 ε of the largest element."""
    zero, values = jnp.zeros(()), (jnp.array([0.0, 3.0]), jnp.array([0.0, 2.0]))
    floor = 24 * jnp.finfo(jnp.float32).eps
    assert (damping.of_eigenvalues(*values, zero, jnp.ones(())) == floor).all()
    scale = jnp.array([[0.0, 0.0], [0.0, 6.0]])
    for convolution, smallest in ((False, floor), (True, 6 / 4)):
        layer = types.SimpleNamespace(kind=types.SimpleNamespace(convolution=convolution), stacked=())
        found = damping.trace_tuned({"layer": scale}, {"layer": layer}, zero, 0.0)["layer"]
        assert found.min() == smallest
