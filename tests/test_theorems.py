"""The papers' theorems as property tests on random networks."""

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

from . import dense, problems
from .dense import assert_close
from .methods import quick

PROPERTY = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@functools.cache
def ekfac_state(kind):
    """One compiled function: W̄ matrices, inputs, targets → EKFAC's state after one exact step."""
    problem = problems.make("plain", kind)
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")
    tx = kfe.scale_by_ekfac(layers, 1e-3, scale="batch")

    @jax.jit
    def run(weights, x, y):
        params = [{"kernel": w[:-1], "bias": w[-1]} for w in weights]
        _, grads, taps = differentiate(params, x, y)
        _, state = tx.update(grads, tx.init(params), params, taps=taps)
        return state.method

    return problem, run


@pytest.mark.parametrize(
    "kind",
    quick("softmax", slow=["gaussian"], of=["softmax", "gaussian", "pixels", "counts"]),
)
@PROPERTY
@given(seed=st.integers(0, 2**31 - 1), size=st.floats(0.1, 3))
def test_ekfac_is_the_better_approximation(kind, x64, seed, size):
    """‖F − F_EKFAC‖_F ≤ ‖F − F_KFAC‖_F and tr F_EKFAC = tr F; F is dense and does not come from the library."""
    problem, run = ekfac_state(kind)
    x, y = problem.args
    generator = np.random.default_rng(seed)
    x = jnp.asarray(generator.normal(size=x.shape))
    weights = [jnp.asarray(size * generator.normal(size=w.shape)) for w in problem.weights]
    state = run(weights, x, y)
    for i, name in enumerate(problem.names):
        fisher = np.asarray(dense.layer_fisher(weights, x, problem.loss, i))
        kfac = np.kron(state.factors.input[name], state.factors.output[name])
        basis = np.kron(state.basis[name][0].vectors, state.basis[name][1].vectors)
        ekfac = basis @ np.diag(state.scale[name].ravel()) @ basis.T
        norm = np.linalg.norm
        # The last layer of a Gaussian is a Kronecker product: both errors are rounding then.
        assert norm(fisher - ekfac) <= norm(fisher - kfac) + 1e-13 * norm(fisher)
        assert abs(np.trace(ekfac) - np.trace(fisher)) <= 1e-10 * np.trace(fisher)
        np.testing.assert_array_less(norm(basis.T @ basis - np.eye(len(basis))), 1e-10)


@PROPERTY
@given(seed=st.integers(0, 2**31 - 1))
def test_carrying_the_scale_keeps_its_trace(x64, seed):
    from kfe_optax._linalg import kronecker, moving

    generator = np.random.default_rng(seed)
    orthogonal = lambda d: jnp.asarray(np.linalg.qr(generator.normal(size=(2, d, d)))[0])
    basis = lambda: tuple(kronecker.Eigenbasis(jnp.ones((2, d)), orthogonal(d)) for d in (4, 3))
    scale = generator.uniform(size=(2, 4, 3))
    old, new = basis(), basis()
    carried = np.asarray(jax.jit(moving.carry_second_moment)(scale, old, new))
    assert_close(carried.sum((-2, -1)), scale.sum((-2, -1)), 1e-12)
    assert (carried >= 0).all()
    for i in range(2):
        rotation = np.kron(new[0].vectors[i], new[1].vectors[i]).T @ np.kron(
            old[0].vectors[i], old[1].vectors[i]
        )
        # The diagonal of the old diagonal matrix seen in the new basis.
        expected = np.diag(rotation @ np.diag(scale[i].ravel()) @ rotation.T)
        assert_close(carried[i].ravel(), expected, 1e-12)


SIZES = (3, 4, 2)
EXAMPLES = 24


def reparameterized(outer, inner, phi):
    """A network in which the middle activations are A h + c before, and the pre-activations are Φ s after, the weights.

    Layer 0 computes s₀ = Φ(W̄₀ᵀ [B x + c; 1]), layer 1 s₁ = W̄₁ᵀ [A tanh(s₀) + d; 1].
    """

    def loss_fn(params, x, y):
        (b, c), (a, d) = outer, inner
        x = x @ b + c
        s = kfe.tag_dense(x, x @ params[0]["kernel"] + params[0]["bias"], params[0]) @ phi
        h = jnp.tanh(s) @ a + d
        z = kfe.tag_dense(h, h @ params[1]["kernel"] + params[1]["bias"], params[1])
        return kfe.losses.l2_loss(z, y).sum(-1).mean()

    return loss_fn


def as_list(weights):
    return [{"kernel": w[:-1], "bias": w[-1]} for w in weights]


def homogeneous_map(matrix, shift):
    """Ω with [x; 1]ᵀ Ω = [x B + c; 1]ᵀ."""
    d = len(shift)
    return np.block([[np.asarray(matrix), np.zeros((d, 1))], [np.asarray(shift)[None], np.ones((1, 1))]])


def step(loss_fn, weights, x, y, damping_type):
    params = as_list(weights)
    layers = kfe.find_layers(loss_fn, params, x, y)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, y)
    tx = optax.chain(kfe.scale_by_kfac(layers, 1e-30, damping_type=damping_type), optax.scale(-1.0))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    return [np.asarray(layer.to_matrix(optax.apply_updates(params, updates))) for layer in layers.values()]


@pytest.mark.parametrize("damping_type", ["factored", "exact"])
@pytest.mark.parametrize("seed", quick(0, of=range(3)))
def test_invariance_under_affine_reparameterization(damping_type, seed, x64):
    """Without damping K-FAC takes the same step in function space (Martens & Grosse 2015, Theorem 1)."""
    generator = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape))
    weights = dense.plain_weights(SIZES, seed)
    x, y = normal(EXAMPLES, SIZES[0]), normal(EXAMPLES, SIZES[2])
    outer, inner, phi = (normal(3, 3), normal(3)), (normal(4, 4), normal(4)), normal(4, 4)
    plain = ((jnp.eye(3), jnp.zeros(3)), (jnp.eye(4), jnp.zeros(4)), jnp.eye(4))

    # W̄† with Ω₀ W̄₀† Φ = W̄₀ and Ω₁ W̄₁† = W̄₁: the same function of x.
    omega = [homogeneous_map(*outer), homogeneous_map(*inner)]
    changed = [
        jnp.asarray(np.linalg.solve(omega[0], weights[0]) @ np.linalg.inv(phi)),
        jnp.asarray(np.linalg.solve(omega[1], weights[1])),
    ]
    first, second = reparameterized(*plain), reparameterized(outer, inner, phi)
    assert_close(second(as_list(changed), x, y), first(as_list(weights), x, y), 1e-10)
    moved = step(first, weights, x, y, damping_type)
    moved_changed = step(second, changed, x, y, damping_type)
    # The new weights stand in the same relation as the old ones; the tolerance is the conditioning of Ω and Φ.
    assert_close(omega[0] @ moved_changed[0] @ np.asarray(phi), moved[0], 1e-7)
    assert_close(omega[1] @ moved_changed[1], moved[1], 1e-7)
    assert dense.relative_error(moved[0], weights[0]) > 1e-2  # it moved


def test_gradient_descent_is_not_invariant(x64):
    """The check above can fail: plain gradient descent does not pass it."""
    generator = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape))
    weights = dense.plain_weights(SIZES, 0)
    x, y, b = normal(EXAMPLES, SIZES[0]), normal(EXAMPLES, SIZES[2]), normal(3, 3)
    identity = ((jnp.eye(4), jnp.zeros(4)), jnp.eye(4))
    omega = homogeneous_map(b, np.zeros(3))
    moved = []
    for outer, w in ((jnp.eye(3), weights[0]), (b, jnp.linalg.solve(omega, weights[0]))):
        params = as_list([w, weights[1]])
        grads = jax.grad(reparameterized((outer, jnp.zeros(3)), *identity))(params, x, y)
        moved.append(np.concatenate([grads[0]["kernel"], grads[0]["bias"][None]]))
    assert dense.relative_error(omega @ moved[1], moved[0]) > 0.1
