"""The complete optimizer: devices, compilation, frameworks, wrappers, averaging; it trains without a learning rate."""

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


@pytest.mark.slow
@pytest.mark.parametrize("fisher", [pytest.param("sampled", marks=pytest.mark.nightly), "exact"])
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


@pytest.mark.parametrize("fisher", ["sampled", pytest.param("exact", marks=pytest.mark.nightly)])
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


@pytest.mark.nightly
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


def deep(params, x):
    """A network whose two middle layers are alike: `blocks`, a stack in a scan, or `block_0` and `block_1`."""

    def block(x, layer):
        return jnp.tanh(kfe.tag_dense(x, x @ layer["kernel"] + layer["bias"], layer)), None

    x, _ = block(x, params["first"])
    if "blocks" in params:
        x, _ = jax.lax.scan(block, x, params["blocks"])
    else:
        x, _ = block(block(x, params["block_0"])[0], params["block_1"])
    return kfe.tag_dense(x, x @ params["last"]["kernel"], params["last"])


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["sampled", pytest.param("exact", marks=pytest.mark.nightly)])
def test_a_stack_is_its_layers(fisher, x64):
    """Layers in a scan take the steps of the same network written out: factors, products Jv, search and damping."""
    generator = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(generator.normal(size=shape))

    params = {
        "first": {"kernel": draw(3, 3), "bias": draw(3)},
        "blocks": {"kernel": draw(2, 3, 3), "bias": draw(2, 3)},
        "last": {"kernel": draw(3, 2)},
    }
    unrolled = {name: params[name] for name in ("first", "last")}
    unrolled |= {f"block_{i}": jax.tree.map(lambda v, i=i: v[i], params["blocks"]) for i in range(2)}
    x, y = draw(6, 3), jnp.arange(6) % 2

    def loss_fn(params, x, y):
        return kfe.losses.softmax_cross_entropy_with_integer_labels(deep(params, x), y).mean()

    def trained(params, count):
        layers = kfe.find_layers(loss_fn, params, x, y)
        assert len(layers) == count
        tx = kfe.kfac_adaptive(layers, initial_damping=0.5, **ALWAYS)
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher, quadratic_model=True)

        @jax.jit
        def step(params, state, key):
            _, grads, taps = differentiate(params, x, y, key=key)
            updates, state = tx.update(grads, state, params, taps=taps)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for i in range(3):
            params, state = step(params, state, jax.random.key(i))
        told = kfe.info(state)
        return params, (told.damping, told.inner_damping, told.step_size, told.momentum, told.reduction_ratio)

    (stacked, told), (one_by_one, expected) = trained(params, 3), trained(unrolled, 4)
    blocks = jax.tree.map(lambda *v: jnp.stack(v), one_by_one.pop("block_0"), one_by_one.pop("block_1"))
    assert_close(stacked, one_by_one | {"blocks": blocks}, 1e-9)
    assert_close(told, expected, 1e-8)
    assert told[1] != told[0]


def test_averaged_parameters(x64):
    """θ̄ is the mean of the iterates while 1 − 1/k is below the decay, and decays from there on."""
    tx = optax.chain(kfe.average_iterates(0.75), optax.sgd(1.0))
    params = {"w": jnp.zeros(3)}
    state, iterates, expected = tx.init(params), [], 0.0
    assert_close(kfe.averaged_parameters(state, params), params)
    for i in range(6):
        updates, state = tx.update({"w": jnp.full(3, -float(i))}, state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(float(params["w"][0]))
        expected = np.mean(iterates[:4]) if i < 4 else 0.75 * expected + 0.25 * iterates[-1]
        assert_close(kfe.averaged_parameters(state, params)["w"], jnp.full(3, expected), 1e-12)
    with pytest.raises(ValueError, match="averages the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="average has 'w', which the parameters have not"):
        kfe.averaged_parameters(state, {"params": params})


def test_the_average_is_kept_in_float32():
    tx = kfe.average_iterates()
    params = {"w": jnp.zeros(3, jnp.bfloat16)}
    state = tx.init(params)
    for i in range(4):
        _, state = tx.update(params, state, {"w": jnp.full(3, 1 + i / 128, jnp.bfloat16)})
    assert_close(state.average["w"], jnp.full(3, 1 + 2 / 128), 1e-6)
    assert kfe.averaged_parameters(state, params)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_the_average_of_a_part(wrap, x64):
    """What an optimizer of some of the parameters averages; the others are as they are."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    one = lambda: optax.chain(kfe.average_iterates(), optax.sgd(1.0))
    tx = {
        "masked": optax.chain(optax.masked(one(), {"a": True, "b": True, "c": False})),
        "partition": optax.partition(
            {"first": one(), "second": one(), "plain": optax.sgd(1.0)},
            {"a": "first", "b": "second", "c": "plain"},
        ),
    }[wrap]
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(lambda p: p - 1, params), state, params)
        params = jax.tree.map(lambda p: p + 1, params)
    averaged = kfe.averaged_parameters(state, params)
    assert_close(averaged, {"a": jnp.full(2, 1.5), "b": jnp.full(2, 1.5), "c": jnp.full(2, 2.0)}, 1e-12)


def test_the_average_leaves_out_what_is_taken_back(x64):
    """A step beyond the barrier, where the loss is no number: the average is that of the other iterates."""
    params, loss_fn, layers = problems.barrier()
    tx = kfe.kfac_adaptive(layers, initial_damping=1e-3, damping_period=1000)
    step = problems.tuned_step(tx, loss_fn, layers)
    state, good = tx.init(params), []
    for i in range(14):
        here = params["kernel"][0, 0]
        params, state, loss = step(params, state)
        good += [float(here)] if i and jnp.isfinite(loss) else []
    assert kfe.info(state).rejected > 0
    assert state[0].averaged == len(good)
    assert_close(state[0].average["kernel"][0, 0], jnp.asarray(np.mean(good)), 1e-12)


def test_a_batch_with_nan(x64):
    """Bad data are no bad step: it is passed over, λ and δ₀ stay, nothing that is no number is in the state."""
    problem, _, _ = _stepped("exact")
    train_step = _compiled("exact")
    x, y = problem.args
    key = jax.random.key(0)
    params, opt_state, _ = _trained("exact")
    moved, after, before = train_step(params, opt_state, x, y, key)
    damping, nonfinite = kfe.info(after).damping, kfe.info(after).nonfinite
    for i in range(1, 11):
        held, after, _ = train_step(moved, after, x * jnp.nan, y, key)
        jax.tree.map(np.testing.assert_array_equal, held, moved)
        assert (kfe.info(after).rejected, kfe.info(after).nonfinite) == (0, nonfinite + i)
    assert kfe.info(after).damping == damping
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after) if leaf.ndim)
    again, after, first = train_step(held, after, x, y, key)
    assert kfe.info(after).momentum != 0
    _, _, second = train_step(again, after, x, y, key)
    assert second < first < before


@pytest.mark.slow
def test_nnx_optimizer_and_wrappers(x64):
    """nnx.Optimizer, optax.masked, apply_if_finite and inject_hyperparams hand on other trees than the loss's."""
    problem = problems.make("nnx")
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)
    static = ("search_period", "damping_period", "averaging")
    tx = optax.inject_hyperparams(kfe.kfac_adaptive, static_args=static)(
        layers, initial_damping=0.5, **ALWAYS
    )
    optimizer = nnx.Optimizer(problem.params, optax.apply_if_finite(tx, 3), wrt=nnx.Param)
    for _ in range(3):
        _, grads, taps = differentiate(problem.params, *problem.args)
        optimizer.update(problem.params, grads, taps=taps)
    expected, plain_state, _ = _trained("exact")
    plain = problems.make("plain").layers()
    parameters = problems.state_of(problem.params)
    averages = kfe.averaged_parameters(optimizer.opt_state, parameters)
    plain_averages = kfe.averaged_parameters(plain_state, expected)
    for ours, theirs in zip(layers.values(), plain.values(), strict=True):
        assert_close(ours.to_matrix(parameters), theirs.to_matrix(expected), 1e-9)
        assert_close(ours.to_matrix(averages), theirs.to_matrix(plain_averages), 1e-9)
    assert_close(kfe.info(optimizer.opt_state).damping, kfe.info(plain_state).damping, 1e-9)


def test_masked_layers_stand_still(x64):
    """optax.masked: the step of what is left, as if the others were constants."""
    problem, _, _ = _stepped("exact")
    layers = problem.layers()
    mask = [True, False]
    tx = optax.chain(
        optax.masked(kfe.kfac_adaptive(layers, initial_damping=0.5, **ALWAYS), mask),
        optax.masked(optax.set_to_zero(), [not m for m in mask]),
    )
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)

    @jax.jit
    def step(params, state):
        loss, grads, taps = differentiate(params, *problem.args)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = problem.params, tx.init(problem.params), []
    for _ in range(4):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert_close(params[1], problem.params[1])
    assert kfe.info(state).rejected == 0


def test_parameters_outside_the_layers(x64):
    """A temperature of no layer is stepped along its own gradient, and does not hold the layers back."""
    base = problems.make("plain")
    params = {"net": base.params, "temperature": jnp.ones(1)}

    def loss_fn(params, x, y):
        z = params["temperature"] * problems.plain_forward(params["net"], x)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    layers = kfe.find_layers(loss_fn, params, *base.args)
    tx = kfe.kfac_adaptive(layers, initial_damping=0.5, momentum=False)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)
    _, grads, taps = differentiate(params, *base.args)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    assert_close(updates["temperature"], -kfe.info(state).step_size * grads["temperature"], 1e-9)


def test_misuse():
    """What it finds itself is refused, and so is what would be misread."""
    layers = problems.make("plain").layers()
    for name in ("damping", "learning_rate", "max_kl", "weight_decay"):
        with pytest.raises(TypeError, match=name):
            kfe.kfac_adaptive(layers, **{name: 0.1})
    with pytest.raises(TypeError, match="True or False, not 0.9"):
        kfe.kfac_adaptive(layers, momentum=0.9)
    with pytest.raises(
        TypeError, match=r"kfe.ekfac, an optimizer with a learning rate: give kfe.METHODS\['ekfac'\].scale_by"
    ):
        kfe.kfac_adaptive(layers, preconditioner=kfe.ekfac)
    with pytest.raises(TypeError, match="initial_damping is a number"):
        kfe.kfac_adaptive(layers, initial_damping=optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match="between damping_floor, 1.0, and damping_ceiling"):
        kfe.kfac_adaptive(layers, initial_damping=0.5, damping_floor=1.0)
