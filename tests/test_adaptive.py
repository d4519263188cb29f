"""The complete optimizer: devices, compilation, frameworks, checkpoints, averaging; it trains without a learning rate."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kfe_optax as kfe

from . import problems
from .dense import assert_close

# Everything happens on every step.
ALWAYS = {
    "damping_period": 1,
    "search_period": 1,
    "factor_update_period": 1,
    "inverse_update_period": 1,
    "l2": 0.01,
}


@functools.cache
def _stepped(fisher, axis_name=None):
    """(problem, tx, train step) in float64, compiled once for all tests."""
    problem = problems.make("plain")
    layers = problem.layers()
    tx = kfe.kfac_adaptive(layers, initial_damping=0.5, **ALWAYS)
    differentiate = kfe.value_grad_and_taps(
        problem.loss_fn, layers, fisher=fisher, axis_name=axis_name, quadratic_model=True
    )

    def train_step(params, opt_state, x, y, key):
        loss, grads, taps = differentiate(params, x, y, key=key)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        return optax.apply_updates(params, updates), opt_state, loss

    return problem, tx, train_step


@functools.cache
def _compiled(fisher):
    return jax.jit(_stepped(fisher)[2])


@functools.cache
def _trained(fisher, steps=3):
    """The parameters, the state and the losses after some steps on one device."""
    problem, tx, _ = _stepped(fisher)
    train_step = _compiled(fisher)
    params, opt_state, losses = problem.params, tx.init(problem.params), []
    for i in range(steps):
        params, opt_state, loss = train_step(params, opt_state, *problem.args, jax.random.key(i))
        losses.append(float(loss))
    return params, opt_state, losses


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_trains_without_a_learning_rate(fisher, x64):
    """One trace, a falling loss, nothing rejected, and a state whose shapes and dtypes stay."""
    problem, tx, _ = _stepped(fisher)
    _, opt_state, losses = _trained(fisher, 6)
    assert losses == sorted(losses, reverse=True)
    assert _compiled(fisher)._cache_size() == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, tx.init(problem.params))
    told = kfe.info(opt_state)
    assert told.rejected == 0
    assert told.step_size > 0
    assert told.inner_damping != told.damping


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_two_devices_equal_one(fisher, x64):
    """pmap over two halves of the batch: gradient, products with the Fisher and trial loss are those of the whole."""
    problem, tx, train_step = _stepped(fisher, "devices")
    halves = [v.reshape(2, -1, *v.shape[1:]) for v in problem.args]
    mapped = jax.pmap(train_step, "devices", in_axes=(None, None, 0, 0, None), devices=jax.devices()[:2])
    two = mapped(problem.params, tx.init(problem.params), *halves, jax.random.key(0))
    one = _trained(fisher, 1)
    for device in range(2):
        first = jax.tree.map(lambda v, device=device: np.asarray(v)[device], two)
        assert_close(first[0], one[0], 1e-9)
        assert_close(kfe.info(first[1])._asdict(), kfe.info(one[1])._asdict() | {"kl_factor": None}, 1e-9)


def test_sharded_batch(x64):
    """Nothing but a sharding: the batch over eight devices gives the step of one."""
    problem, tx, train_step = _stepped("sampled")
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    params, opt_state = jax.device_put((problem.params, tx.init(problem.params)), everywhere)
    batch = [jax.device_put(v, split) for v in problem.args]
    new, _, _ = jax.jit(train_step)(params, opt_state, *batch, jax.random.key(0))
    assert_close(jax.device_get(new), _trained("sampled", 1)[0], 1e-9)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_frameworks_agree(framework, x64):
    """Linen and NNX take the steps of plain JAX."""
    problem = problems.make(framework)
    layers = problem.layers()
    tx = kfe.kfac_adaptive(layers, initial_damping=0.5, **ALWAYS)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)
    params, parameters = problem.params, problems.state_of(problem.params)
    opt_state, update = tx.init(parameters), jax.jit(tx.update)
    for _ in range(3):
        _, grads, taps = differentiate(params, *problem.args)
        updates, opt_state = update(grads, opt_state, parameters, taps=taps)
        parameters = optax.apply_updates(parameters, updates)
        if framework == "nnx":
            nnx.update(params, parameters)
        else:
            params = parameters
    expected, plain_state, _ = _trained("exact")
    plain = problems.make("plain").layers()
    names = zip(layers.values(), plain.values(), strict=True)
    averages = [kfe.averaged_parameters(s, p) for s, p in ((opt_state, parameters), (plain_state, expected))]
    for ours, theirs in names:
        assert_close(ours.to_matrix(parameters), theirs.to_matrix(expected), 1e-9)
        assert_close(ours.to_matrix(averages[0]), theirs.to_matrix(averages[1]), 1e-9)


def test_averaged_parameters(x64):
    """θ̄ is the mean of the iterates while 1 − 1/k is below the decay, and decays from there on."""
    tx = optax.chain(optax.sgd(1.0), kfe.average_iterates(0.75))
    params = {"w": jnp.zeros(3, jnp.bfloat16)}
    state, iterates, expected = tx.init(params), [], 0.0
    assert kfe.averaged_parameters(state, params)["w"].dtype == jnp.bfloat16
    for i in range(6):
        updates, state = tx.update({"w": jnp.full(3, -float(i), jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(float(params["w"][0]))
        expected = np.mean(iterates[:4]) if i < 4 else 0.75 * expected + 0.25 * iterates[-1]
        assert_close(state[1].average["w"][0], expected, 1e-6)
    with pytest.raises(ValueError, match="averages the parameters"):
        tx.update(params, state)


def test_tiny_networks_that_go_wrong(x64):
    """A loss that is not finite on a step: the parameters stay, λ rises, and training goes on."""
    problem, _, _ = _stepped("exact")
    train_step = _compiled("exact")
    params, opt_state, _ = _trained("exact")
    x, y = problem.args
    bad, after, _ = train_step(params, opt_state, x * jnp.nan, y, jax.random.key(0))
    assert_close(bad, params, 1e-12)
    assert kfe.info(after).damping > kfe.info(opt_state).damping
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after) if leaf.ndim)
    _, _, loss = train_step(bad, after, x, y, jax.random.key(1))
    _, _, expected = train_step(params, opt_state, x, y, jax.random.key(1))
    assert loss == expected
