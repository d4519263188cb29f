"""Theorem 1 and its corollaries (Martens & Grosse 2015, section 8) as property tests for both of K-FAC's inverses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfe_optax as kfe

from . import dense
from .dense import assert_close

PROPERTY = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
D, DEPTH, EXAMPLES = 3, 3, 24
LOSSES = {
    # Outputs: the loss, and how the Fisher is taken.
    "gaussian": (lambda z, y: kfe.losses.l2_loss(z, y).sum(-1).mean(), "sampled"),
    "bernoulli": (lambda z, y: kfe.losses.sigmoid_binary_cross_entropy(z, y).sum(-1).mean(), "exact"),
}


def reparameterized(loss):
    """Layer i computes s_i = Φ_i W̄_iᵀ [B_i h_{i−1} + c_i; 1], h_i = tanh(s_i), with h_{-1} = x."""

    def loss_fn(params, x, y, maps):
        for i, (layer, (matrix, shift, phi)) in enumerate(zip(params, maps, strict=True)):
            x = (x if i == 0 else jnp.tanh(x)) @ matrix + shift
            x = kfe.tag_dense(x, x @ layer["kernel"] + layer["bias"], layer) @ phi
        return loss(x, y)

    return loss_fn


def as_list(weights):
    return [{"kernel": w[:-1], "bias": w[-1]} for w in weights]


@functools.cache
def compiled(kind):
    """W̄ matrices, data, maps → the loss and the matrices after a step with each inverse, undamped."""
    loss, fisher = LOSSES[kind]
    loss_fn = reparameterized(loss)
    weights = [jnp.ones((D + 1, D))] * DEPTH
    maps = [(jnp.eye(D), jnp.zeros(D), jnp.eye(D))] * DEPTH
    x = jnp.ones((EXAMPLES, D))
    layers = kfe.find_layers(loss_fn, as_list(weights), x, x, maps)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher)
    key = jax.random.key(0) if fisher == "sampled" else None
    transforms = (kfe.scale_by_kfac(layers, 1e-30), kfe.scale_by_block_tridiagonal(layers, 1e-30))

    @jax.jit
    def run(weights, x, y, maps):
        params = as_list(weights)
        value, grads, taps = differentiate(params, x, y, maps, key=key)
        moved = []
        for tx in transforms:
            updates, _ = tx.update(grads, tx.init(params), params, taps=taps)
            new = optax.apply_updates(params, jax.tree.map(jnp.negative, updates))
            moved.append([layer.to_matrix(new) for layer in layers.values()])
        return value, moved

    return run


def regular(generator):
    """A matrix with singular values between 1/2 and 2."""
    left, right = np.linalg.qr(generator.normal(size=(2, D, D)))[0]
    return left * generator.uniform(0.5, 2, D) @ right


def homogeneous_map(matrix, shift):
    """Ω with [h; 1]ᵀ Ω = [h B + c; 1]ᵀ."""
    return np.block([[matrix, np.zeros((D, 1))], [shift[None], np.ones((1, 1))]])


@pytest.mark.parametrize("kind", LOSSES)
@PROPERTY
@given(seed=st.integers(0, 2**31 - 1))
def test_invariance_under_affine_reparameterization(kind, x64, seed):
    """Inputs and activations affinely transformed, pre-activations linearly: the step in function space stays the same."""
    generator = np.random.default_rng(seed)
    run = compiled(kind)
    weights = dense.plain_weights((D,) * (DEPTH + 1), seed)
    x = jnp.asarray(generator.normal(size=(EXAMPLES, D)))
    y = jnp.asarray(generator.uniform(size=(EXAMPLES, D)))
    identity = [(jnp.eye(D), jnp.zeros(D), jnp.eye(D))] * DEPTH
    maps = [(regular(generator), generator.normal(size=D), regular(generator)) for _ in range(DEPTH)]
    maps[-1] = (*maps[-1][:2], np.eye(D))  # the distribution's parameters are what they are

    # W̄† with Ω_i W̄_i† Φ_i = W̄_i: the same function of x.
    omegas = [homogeneous_map(matrix, shift) for matrix, shift, _ in maps]
    changed = [
        jnp.asarray(np.linalg.solve(omega, w) @ np.linalg.inv(phi))
        for omega, w, (_, _, phi) in zip(omegas, weights, maps, strict=True)
    ]
    value, moved = run(weights, x, y, identity)
    changed_value, changed_moved = run(changed, x, y, jax.tree.map(jnp.asarray, maps))
    assert_close(changed_value, value, 1e-12)
    for before, after in zip(moved, changed_moved, strict=True):
        back = [omega @ w @ phi for omega, w, (_, _, phi) in zip(omegas, after, maps, strict=True)]
        # The new weights stand in the same relation as the old ones; the tolerance is the conditioning of the factors.
        assert_close(back, [np.asarray(w) for w in before], 1e-6)
        assert dense.relative_error(before[0], weights[0]) > 1e-3  # it moved
    # The two inverses are not one.
    assert dense.relative_error(moved[1][0] - weights[0], moved[0][0] - weights[0]) > 1e-3
