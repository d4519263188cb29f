"""EKFAC against an independent dense float64 computation, to 1e-10."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import dense, dense_optimizers, problems
from .dense import assert_close


def damping(step):
    return 0.2 / (1 + step)


def compare(problem, steps, options, kind_weight):
    """Runs both implementations and compares the weights after each step."""
    layers = problem.layers()
    tx = optax.chain(kfe.scale_by_ekfac(layers, damping, **options), optax.scale_by_learning_rate(0.1))
    trajectory, _ = problems.run(problem, layers, tx, steps)
    oracle = dense_optimizers.Ekfac(damping, **options, weight=kind_weight)
    weights, x = list(problem.weights), problem.args[0]
    oracle.start(len(weights))
    for step in range(steps):
        new = oracle.precondition(step, weights, x, problem.loss)
        weights = [w - 0.1 * d for w, d in zip(weights, new, strict=True)]
        assert_close(trajectory[step], [np.asarray(w) for w in weights])


every_framework = pytest.mark.parametrize(
    "framework",
    [
        pytest.param(name, marks=[] if name == "plain" else pytest.mark.nightly)
        for name in problems.FRAMEWORKS
    ],
)
PERIODS = {"factor_update_period": 1, "basis_update_period": 2, "initial_refreshes": 1, "decay": 0.7}


@pytest.mark.parametrize("scale", ["batch", "running"])
@every_framework
def test_trajectory(framework, scale, x64):
    """Five steps of the plain form, S carried from basis to basis."""
    options = {**PERIODS, "scale": scale, "scale_decay": 0.8}
    compare(problems.make(framework), 5, options, problems.EXAMPLES)


@pytest.mark.parametrize(
    ("damping_type", "on_refresh", "scale"),
    [
        ("appendix_c", "carry", "batch"),
        ("appendix_c", "carry", "running"),
        pytest.param("factored", "carry", "batch", marks=pytest.mark.slow),
        pytest.param("factored", "carry", "running", marks=pytest.mark.nightly),
        *(
            pytest.param(damping_type, "restart", scale, marks=pytest.mark.nightly)
            for damping_type in ("appendix_c", "factored")
            for scale in ("batch", "running")
        ),
    ],
)
def test_damping_of_the_factors(scale, on_refresh, damping_type, x64):
    """Appendix C's damping and that with π, both ways of refreshing, with a sparse scale and all periods different."""
    options = {
        "scale": scale,
        "damping_type": damping_type,
        "on_refresh": on_refresh,
        "scale_decay": 0.5,
        "decay": 0.6,
        "factor_update_period": 2,
        "basis_update_period": 4,
        "scale_update_period": 3,
        "initial_refreshes": 2,
    }
    # A mean over 2 pixels: an element's weight is 1/(2N).
    compare(problems.make("plain", "pixels"), 7, options, 2 * problems.EXAMPLES)


@pytest.mark.slow
def test_batch_scale_without_memory(x64):
    """scale_decay=0 is the paper's EKFAC: S* of the current batch alone."""
    problem = problems.make("linen", "gaussian")
    options = {**PERIODS, "scale": "batch", "scale_decay": 0.0}
    compare(problem, 3, options, 1)
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    tx = kfe.scale_by_ekfac(layers, 0.1, scale="batch", scale_decay=0.0)
    updates, state = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    for i, name in enumerate(problem.names):
        fisher = np.asarray(dense.layer_fisher(problem.weights, problem.args[0], problem.loss, i))
        a, g = dense.kfac_factors(problem.weights, problem.args[0], problem.loss)[i]
        basis, *_ = dense.kronecker_basis(a, g)
        expected = dense.diagonal_in(fisher, basis)
        assert_close(state.method.scale[name].ravel(), expected)
        v = dense.gradients(problem.weights, problem.args[0], problem.loss)[i]
        inverse = np.linalg.inv(basis @ np.diag(expected + 0.1) @ basis.T)
        assert_close(layers[name].to_matrix(updates).ravel(), inverse @ v.ravel())


@every_framework
def test_alias(framework, x64):
    """kfe.ekfac: KL clip, Nesterov momentum and learning rate."""
    problem = problems.make(framework, "gaussian")
    layers = problem.layers()
    tx = kfe.ekfac(
        0.5,
        layers,
        0.01,
        **{**kfe.NATURAL, "nesterov": True, "max_kl": 0.02, "max_change": None},
        momentum=0.8,
        scale="batch",
        damping_type="plain",
        scale_decay=0.8,
        scale_update_period=1,
        refreshes_per_doubling=0,
        **PERIODS,
    )
    trajectory, state = problems.run(problem, layers, tx, 5)
    oracle = dense_optimizers.Ekfac(lambda step: 0.01, **PERIODS, scale_decay=0.8)
    weights, x = list(problem.weights), problem.args[0]
    oracle.start(len(weights))
    trace, factors = [np.zeros(w.shape) for w in weights], []
    for step in range(5):
        new = oracle.precondition(step, weights, x, problem.loss)
        gradients = dense.gradients(weights, x, problem.loss)
        split = lambda matrices: [part for m in matrices for part in (m[:-1], m[-1])]
        factors.append(dense_optimizers.kl_factor(split(new), split(gradients), 0.5, 0.02))
        new = [factors[-1] * d for d in new]
        trace = [0.8 * t + d for t, d in zip(trace, new, strict=True)]
        weights = [w - 0.5 * (0.8 * t + d) for w, t, d in zip(weights, trace, new, strict=True)]
        assert_close(trajectory[step], [np.asarray(w) for w in weights])
    assert min(factors) < 1
    assert_close(kfe.info(state).kl_factor, jnp.asarray(factors[-1]))


@pytest.mark.slow
def test_diagonal_side(x64):
    """A side larger than max_dim keeps the identity as its basis; S stays the diagonal of F in that basis."""
    problem = problems.make("plain", sizes=(5, 3, 2))
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    tx = kfe.scale_by_ekfac(layers, 0.1, scale="batch", max_dim=3)
    updates, state = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    x = problem.args[0]
    (_, g), *_ = dense.kfac_factors(problem.weights, x, problem.loss)
    basis = np.kron(np.eye(6), np.linalg.eigh(g)[1])
    scale = dense.diagonal_in(np.asarray(dense.layer_fisher(problem.weights, x, problem.loss, 0)), basis)
    assert_close(state.method.scale["0"].ravel(), scale)
    v = dense.gradients(problem.weights, x, problem.loss)[0].ravel()
    assert_close(layers["0"].to_matrix(updates).ravel(), basis @ ((basis.T @ v) / (scale + 0.1)))


def test_null_directions_share_a_scale(x64):
    """With fewer examples than inputs the update does not depend on eigh's choice of a null space's basis."""
    problem = problems.make("plain", "gaussian", sizes=(6, 2), examples=3)
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    # The gradient of another batch has a part in the null space of A.
    v = np.random.default_rng(3).normal(size=(7, 2))
    leaves = layers["0"].from_matrix(jnp.asarray(v))
    other = [{"kernel": leaves[(0, "kernel")], "bias": leaves[(0, "bias")]}]
    tx = kfe.scale_by_ekfac(layers, 1e-2, scale="batch")
    _, state = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    x = problem.args[0]
    ((a, _),) = dense.kfac_factors(problem.weights, x, problem.loss)
    s_a, u_a = np.linalg.eigh(a)
    null = s_a < 1e-5 * s_a.max()
    assert null.sum() == 4
    mix = np.linalg.qr(np.random.default_rng(4).normal(size=(4, 4)))[0]
    u_a = np.concatenate([u_a[:, null] @ mix, u_a[:, ~null]], 1)
    u_g = np.eye(2)  # G is the identity: both directions of equal curvature
    basis = np.kron(u_a, u_g)
    fisher = np.asarray(dense.layer_fisher(problem.weights, x, problem.loss, 0))
    scale = dense.diagonal_in(fisher, basis).reshape(7, 2)
    scale[:4] = scale[:4].mean(0)
    expected = basis @ ((basis.T @ v.ravel()) / (scale.ravel() + 1e-2))
    zero_taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )[2]
    state = state._replace(count=jnp.asarray(1, jnp.int32))
    frozen = kfe.scale_by_ekfac(layers, 1e-2, scale="batch", scale_update_period=10)
    updates, _ = jax.jit(frozen.update)(other, state, problem.params, taps=zero_taps)
    assert_close(layers["0"].to_matrix(updates).ravel(), expected)
