"""K-FAC against an independent dense float64 computation, to 1e-10."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import dense, dense_optimizers, problems
from .dense import assert_close
from .methods import kinds_of_frameworks, quick


def damping(step):
    """A schedule, for both implementations."""
    return 0.3 / (1 + step)


@pytest.mark.parametrize(("kind", "framework"), kinds_of_frameworks("plain", "nnx"))
def test_factors(framework, kind, x64):
    problem = problems.make(framework, kind)
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")
    loss, grads, taps = differentiate(problem.params, *problem.args)
    x = problem.args[0]
    assert_close(loss, problem.loss(dense.forward(problem.weights, x)[0]), 1e-12)
    expected = dense.kfac_factors(problem.weights, x, problem.loss)
    gradients = dense.gradients(problem.weights, x, problem.loss)
    factors = jax.jit(lambda taps: {name: taps[name].covariances() for name in problem.names})(taps)
    for name, pair, gradient in zip(problem.names, expected, gradients, strict=True):
        assert_close(factors[name], pair)
        assert_close(layers[name].to_matrix(grads), gradient)


@pytest.mark.parametrize("damping_type", ["factored", "exact"])
@pytest.mark.parametrize("framework", quick("linen", slow=["nnx"], of=problems.FRAMEWORKS))
def test_preconditioned_gradient_and_trajectory(framework, damping_type, x64):
    """Five steps with periods and a damping schedule; the first is the preconditioned gradient itself."""
    problem = problems.make(framework)
    layers = problem.layers()
    options = {"factor_update_period": 2, "inverse_update_period": 3, "initial_refreshes": 2, "decay": 0.7}
    preconditioner = kfe.scale_by_kfac(layers, damping, damping_type=damping_type, **options)
    tx = optax.chain(preconditioner, optax.scale_by_learning_rate(0.2))
    trajectory, _ = problems.run(problem, layers, tx, 5)

    oracle = dense_optimizers.Kfac(damping, damping_type, **options)
    weights, x = list(problem.weights), problem.args[0]
    oracle.start(len(weights))
    for step in range(5):
        new = oracle.precondition(step, weights, x, problem.loss)
        weights = [w - 0.2 * d for w, d in zip(weights, new, strict=True)]
        assert_close(trajectory[step], [np.asarray(w) for w in weights])


@pytest.mark.parametrize("framework", problems.FRAMEWORKS)
def test_alias(framework, x64):
    """kfe.kfac: KL clip, momentum, decoupled weight decay and a learning-rate schedule."""
    problem = problems.make(framework, "gaussian")
    layers = problem.layers()
    rate = lambda step: 0.5 / (1 + step)
    periods = {"factor_update_period": 1, "inverse_update_period": 2, "refreshes_per_doubling": 1}
    tx = kfe.kfac(
        rate,
        layers,
        0.01,
        **{**kfe.NATURAL, "max_kl": 0.02, "max_change": None},
        momentum=0.9,
        weight_decay=0.1,
        initial_refreshes=1,
        **periods,
    )
    trajectory, state = problems.run(problem, layers, tx, 5)

    oracle = dense_optimizers.Kfac(lambda step: 0.01, **periods)
    weights, x = list(problem.weights), problem.args[0]
    oracle.start(len(weights))
    trace, factors = [np.zeros(w.shape) for w in weights], []
    for step in range(5):
        new = oracle.precondition(step, weights, x, problem.loss)
        gradients = dense.gradients(weights, x, problem.loss)
        # |Δ·∇| is summed leaf by leaf: kernels and biases apart.
        split = lambda matrices: [part for m in matrices for part in (m[:-1], m[-1])]
        factors.append(dense_optimizers.kl_factor(split(new), split(gradients), rate(step), 0.02))
        trace = [0.9 * t + factors[-1] * d for t, d in zip(trace, new, strict=True)]
        weights = [w - rate(step) * (t + 0.1 * w) for w, t in zip(weights, trace, strict=True)]
        assert_close(trajectory[step], [np.asarray(w) for w in weights])
    assert min(factors) < 1  # it did clip
    assert_close(kfe.info(state).kl_factor, jnp.asarray(factors[-1]))


def test_diagonal_sides(x64):
    """A side larger than max_dim is its diagonal in the same formulas."""
    problem = problems.make("plain", sizes=(5, 3, 2))
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    x = problem.args[0]
    factors = dense.kfac_factors(problem.weights, x, problem.loss)
    gradients = dense.gradients(problem.weights, x, problem.loss)
    keep = lambda m: m if len(m) <= 3 else np.diag(np.diag(m))
    for damping_type, formula in (("factored", dense.kfac_factored), ("exact", dense.kfac_exact)):
        tx = kfe.scale_by_kfac(layers, 0.1, damping_type=damping_type, max_dim=3)
        state = tx.init(problem.params)
        updates, _ = jax.jit(tx.update)(grads, state, problem.params, taps=taps)
        for name, (a, g), v in zip(problem.names, factors, gradients, strict=True):
            assert_close(layers[name].to_matrix(updates), formula(keep(a), keep(g), v, 0.1))
    assert state.method.factors.input["0"].shape == (6,)


def test_default_periods_and_sampled_updates(x64):
    """Between refreshes nothing changes but the gradient; sampled factors are those of the same taps."""
    problem = problems.make("plain")
    layers = problem.layers()
    tx = kfe.scale_by_kfac(layers, 0.1)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)
    state, update = tx.init(problem.params), jax.jit(tx.update)
    seen = []
    for step in range(12):
        _, grads, taps = differentiate(problem.params, *problem.args, key=jax.random.key(step))
        _, state = update(grads, state, problem.params, taps=taps)
        seen.append((int(state.method.factors.updates), int(state.method.last_refresh)))
        if step == 0:
            a, g = taps["0"].covariances()
            assert_close((state.method.factors.input["0"], state.method.factors.output["0"]), (a, g))
    # Everything in each of the first three steps, then factors every 10, inverses every 50.
    assert seen == [(1, 0), (2, 1), (3, 2)] + [(3, 2)] * 7 + [(4, 2)] * 2
