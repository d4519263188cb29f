"""What is not the same for every method: un-jitted callers, dense oracles at the edges, `rest`, priors, the KL clip."""

from __future__ import annotations

import functools
import gc
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import dense, methods, problems
from .dense import assert_close


def compilations(caplog):
    """The names of what was compiled since the last call."""
    names = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    caplog.clear()
    return names


def test_unjitted_caller_compiles_once(caplog):
    """A loop without jax.jit, which builds its wrapper anew each step, compiles nothing after two steps."""
    problem = problems.make("linen")
    layers = problem.layers()
    tx = kfe.scale_by_kfac(layers, 0.1, factor_update_period=2, inverse_update_period=3)
    params, state = problem.params, tx.init(problem.params)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
        for i in range(5):
            compiled = compilations(caplog)
            assert i < 3 or not compiled
            differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)
            _, grads, taps = differentiate(params, *problem.args, key=jax.random.key(i))
            updates, state = tx.update(grads, state, params, taps=taps)
            params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(("sizes", "examples"), [((5, 3, 2), 2), ((3, 4, 2), 1), ((1, 1, 1), 4)])
def test_rank_deficient_one_example_width_one(sizes, examples, x64):
    """Against the dense formulas: fewer examples than inputs, a batch of one, width one."""
    problem = problems.make("plain", "gaussian", sizes=sizes, examples=examples)
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    factors = dense.kfac_factors(problem.weights, problem.args[0], problem.loss)
    gradients = dense.gradients(problem.weights, problem.args[0], problem.loss)
    for kind, formula in (("factored", dense.kfac_factored), ("exact", dense.kfac_exact)):
        tx = kfe.scale_by_kfac(layers, 1e-3, damping_type=kind)
        updates, state = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
        for name, (a, g), v in zip(problem.names, factors, gradients, strict=True):
            assert_close(layers[name].to_matrix(updates), formula(a, g, v, 1e-3))
        assert int(kfe.info(state).failures) == 0


def test_parameters_outside_the_layers(x64):
    """Parameters of no layer go through `rest`: Adam by default, or what is given."""
    model = nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.Dense(2)])
    x, y = problems.make("linen").args
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def loss_fn(params, x, y):
        logits = model.apply({"params": params}, x)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    layers = kfe.find_layers(loss_fn, params, x, y).without("layers_1")
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, y, key=jax.random.key(0))
    for rest, expected in ((None, optax.scale_by_adam()), (optax.scale(3.0), optax.scale(3.0))):
        tx = kfe.scale_by_kfac(layers, 0.1, rest=rest)
        compiled = jax.jit(lambda grads, taps, tx=tx: tx.update(grads, tx.init(params), params, taps=taps))
        updates, _ = compiled(grads, taps)
        own = grads["layers_1"]
        alone = jax.jit(lambda own, expected=expected: expected.update(own, expected.init(own))[0])
        assert_close(updates["layers_1"], alone(own), 1e-12)


def test_taps_of_more_layers_than_the_optimizer_has(x64):
    """What is left out goes through the rest, whether the taps know it or not."""
    problem = problems.make("linen")
    layers = problem.layers()
    inside = layers.without("dense_0")
    tx = kfe.scale_by_kfac(inside, 0.1, rest=optax.identity())
    found = []
    for known in (layers, inside):
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, known)
        _, grads, taps = differentiate(problem.params, *problem.args, key=jax.random.key(0))
        update = jax.jit(lambda v, taps: tx.update(v, tx.init(problem.params), problem.params, taps=taps)[0])
        found.append(update(grads, taps))
        assert_close(found[-1]["dense_0"], grads["dense_0"], 1e-12)
    assert_close(*found, 1e-12)


def test_a_prior_inside_the_loss():
    """It reads the parameters as they are, and is not part of the Fisher."""
    problem = problems.make("linen")
    structure = jax.tree.structure(problem.params)

    def l2(params):
        return 0.5 * sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params))

    def per_leaf(params):
        assert jax.tree.structure(params) == structure
        return sum(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(params))

    for prior in (l2, per_leaf):

        def loss_fn(params, x, y, prior=prior):
            return problem.loss_fn(params, x, y) + 0.1 * prior(params)

        layers = kfe.find_layers(loss_fn, problem.params, *problem.args)

        @jax.jit
        def read(params, loss_fn=loss_fn, layers=layers):
            *found, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, *problem.args)
            without = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")
            bare = without(params, *problem.args)[2]
            expected = [*jax.value_and_grad(loss_fn)(params, *problem.args)]
            return (found, expected), [t["dense_0"].covariances() for t in (taps, bare)]

        gradients, factors = read(problem.params)
        assert_close(*gradients, 1e-6)
        # The prior is not part of the Fisher.
        assert_close(*factors, 1e-6)


def test_clip_by_kl():
    """ν = min(1, sqrt(c / η² Σ|Δ∇|)); not clipped within the bound, nor at a zero gradient; schedules are followed."""
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    tx = kfe.clip_by_kl(optax.scale(2.0), lambda step: jnp.where(step == 0, 0.02, 1e6), learning_rate=0.1)
    state = tx.init(grads)
    updates, state = tx.update(grads, state)
    factor = np.sqrt(0.02 / (0.01 * 50))
    assert_close(state.kl_factor, factor, 1e-6)
    assert_close(updates, jax.tree.map(lambda g: 2 * factor * g, grads), 1e-6)
    updates, state = tx.update(grads, state)
    assert float(state.kl_factor) == 1
    assert_close(updates, jax.tree.map(lambda g: 2 * g, grads), 1e-7)
    zero = jax.tree.map(jnp.zeros_like, grads)
    updates, state = tx.update(zero, state)
    assert float(state.kl_factor) == 1
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    # A size that is no number, of a finite update too, is counted.
    for count, bad in enumerate((jnp.nan, jnp.inf, 1e30), 1):
        updates, state = tx.update({**grads, "b": jnp.array([bad])}, state)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
        assert (float(state.kl_factor), int(kfe.info(state).rejected)) == (0, count)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "tekfac", "lanczos"])
def test_a_bad_first_gradient_puts_the_start_off(name):
    """Until the first refresh the gradient passes, and what was left out does not weigh as zeros afterwards."""
    problem = problems.make("plain")
    layers = problem.layers()
    options = {"factor_update_period": 2, "initial_refreshes": 1, "rest": optax.identity()}
    period = "inverse_update_period" if name in ("kfac", "lanczos") else "basis_update_period"
    if name == "tekfac":
        options["scale_update_period"] = 2
    tx = kfe.METHODS[name].scale_by(layers, 0.1, **options, **{period: 2})
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)
    x, y = problem.args
    update = jax.jit(tx.update)

    def step(state, x, key):
        _, grads, taps = differentiate(problem.params, x, y, key=jax.random.key(key))
        return grads, *update(grads, state, problem.params, taps=taps)

    _, _, state = step(tx.init(problem.params), x.at[0, 0].set(jnp.nan), 0)
    grads, updates, state = step(state, x, 1)
    assert_close(updates, grads, 1e-7)
    assert int(kfe.info(state).last_refresh) == -1
    _, updates, state = step(state, x, 2)
    fresh = tx.init(problem.params)
    _, expected, _ = step(fresh, x, 2)
    if name != "ekfac":  # whose running scale already holds one gradient
        assert_close(updates, expected, 1e-4)
    assert int(kfe.info(state).last_refresh) == 2


def branches_around(jaxpr, primitives, depth=0):
    """How many conds stand around each use of the primitives."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in primitives:
            yield depth
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from branches_around(inner, primitives, depth + (name == "cond"))


@pytest.mark.parametrize("make", [kfe.scale_by_kfac, kfe.scale_by_ekfac, kfe.scale_by_lanczos])
def test_vmap_over_seeds_with_one_count_keeps_the_branches(make):
    """Every factorization stands inside as many conds (the refresh's, the platform's) as without the vmap."""
    problem = problems.make("plain")
    layers = problem.layers()
    tx = make(layers, 0.1)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)

    def step(params, state, key):
        _, grads, taps = differentiate(params, *problem.args, key=key)
        return tx.update(grads, state, params, taps=taps)

    axes = jax.tree.map(lambda _: 0, jax.eval_shape(tx.init, problem.params))._replace(count=None)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), problem.params)
    mapped = jax.vmap(step, in_axes=(0, axes, 0), out_axes=(0, axes))
    states = jax.jit(jax.vmap(tx.init, out_axes=axes))(stack)
    depths = []
    for function, arguments in (
        (step, (problem.params, tx.init(problem.params), jax.random.key(0))),
        (mapped, (stack, states, jax.random.split(jax.random.key(0), 2))),
    ):
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        depths.append(min(branches_around(jaxpr, ("eigh", "cholesky"))))
    assert depths[0] >= 2
    assert depths[1] >= depths[0]


def test_gradient_weight_of_devices_with_other_masks(x64):
    """Σc / Σc² over all devices, as one device has it."""
    problem = problems.make("plain")
    layers = problem.layers()
    x, y = problem.args
    mask = jnp.asarray([1.0, 0, 0, 0, 1, 1, 1, 0])

    def loss_fn(params, x, y, mask, total):
        z = problems.plain_forward(params, x)
        losses = kfe.losses.softmax_cross_entropy_with_integer_labels(z, y)
        return (losses * mask).sum() / total

    def weight(x, y, mask, total, axis_name=None):
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical", axis_name=axis_name)
        return differentiate(problem.params, x, y, mask, total)[2].gradient_weight

    one = weight(x, y, mask, jnp.asarray(4.0))
    halves = [v.reshape(2, 4, *v.shape[1:]) for v in (x, y, mask)]
    # The mean over two devices of sums divided by half the total.
    two = jax.pmap(
        lambda *args: weight(*args, axis_name="devices"),
        "devices",
        in_axes=(0, 0, 0, None),
        devices=jax.devices()[:2],
    )(*halves, jnp.asarray(2.0))
    assert_close(two, jnp.stack([one, one]), 1e-12)


@pytest.mark.parametrize("divided", ["microbatches", "devices"])
def test_the_running_scale_of_a_loss_that_registers_nothing(divided, x64):
    """N counts the examples of all microbatches and devices: the scale after a step is that of the whole batch."""
    problem = problems.make("plain")
    x, y = problem.args

    def loss_fn(params, x, y):
        return jnp.square(problems.plain_forward(params, x) - y[:, None]).mean()

    layers = kfe.find_layers(loss_fn, problem.params, x, y)
    tx = kfe.scale_by_ekfac(layers, 0.1, scale="running", scale_decay=0.0)

    def scale(x, y, axis_name=None, microbatches=1):
        differentiate = kfe.value_grad_and_taps(
            loss_fn, layers, fisher="empirical", axis_name=axis_name, microbatches=microbatches
        )
        _, grads, taps = differentiate(problem.params, x, y)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        return tx.update(grads, tx.init(problem.params), problem.params, taps=taps)[1].method.scale

    expected = jax.jit(scale)(x, y)
    if divided == "microbatches":
        found = jax.jit(lambda x, y: scale(x, y, microbatches=2))(x, y)
    else:
        halves = [v.reshape(2, -1, *v.shape[1:]) for v in (x, y)]
        mapped = jax.pmap(
            lambda *args: scale(*args, axis_name="devices"), "devices", devices=jax.devices()[:2]
        )
        found = jax.tree.map(lambda v: v[0], mapped(*halves))
    assert_close(found, expected, 1e-10)


def test_python_values_that_are_equal_may_be_other_programs():
    """1, 1.0 and True each have the loss that JAX gives them, a NaN is no new program, NumPy's types are no arrays."""
    traced = []

    def loss_fn(params, x, power, dtype):
        traced.append(power)
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        factor = 3.0 if power is True else 2.0 if isinstance(power, float) else 1.0
        return factor * kfe.losses.l2_loss(z.astype(dtype)).mean()

    params, x = {"kernel": jnp.ones((2, 1))}, jnp.ones((3, 2))
    layers = kfe.find_layers(loss_fn, params, x, 1, np.float32)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    losses = [float(differentiate(params, x, power, np.float32)[0]) for power in (1, 1.0, True)]
    assert losses == [2.0, 4.0, 6.0]
    differentiate(params, x, math.nan, np.float32)
    before = len(traced)
    differentiate(params, x, float("nan"), np.float32)
    assert len(traced) == before


def test_a_method_as_the_loss():
    """Two wrappers of one bound method, of which the first goes away: the second still has its loss."""
    problem = problems.make("plain")

    class Task:
        def loss(self, params, x, y):
            return problem.loss_fn(params, x, y)

    task = Task()
    layers = kfe.find_layers(task.loss, problem.params, *problem.args)
    first = kfe.value_grad_and_taps(task.loss, layers, fisher="empirical")
    second = kfe.value_grad_and_taps(task.loss, layers, fisher="empirical")
    del first
    gc.collect()
    _, grads, _ = second(problem.params, *problem.args)
    assert_close(grads, jax.jit(jax.grad(problem.loss_fn))(problem.params, *problem.args), 1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_alias_moves_the_rest_as_adam_would(momentum):
    """The parameters outside the layers settle at Adam's steps of a tenth of the learning rate."""
    problem = methods.make_problem()
    tx = kfe.kfac(0.01, problem.layers, momentum=momentum)
    batch, state = problem.batch(), tx.init(problem.params)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, problem.layers)
    _, grads, taps = differentiate(problem.params, batch.x, batch.y, batch.weight, key=batch.key)
    update = jax.jit(tx.update)
    for _ in range(50):
        updates, state = update(grads, state, problem.params, taps=taps)
    np.testing.assert_allclose(np.abs(updates["temperature"]), 1e-3, rtol=1e-2)
    # A step that a layer's gradient forbids is none for the rest either.
    _, after = update(
        {**grads, "head": jax.tree.map(lambda g: g * jnp.nan, grads["head"])},
        state,
        problem.params,
        taps=taps,
    )
    jax.tree.map(np.testing.assert_array_equal, after[0].rest, state[0].rest)
    assert int(after[0].nonfinite.sum()) == 1


@pytest.mark.parametrize(
    "make",
    [functools.partial(kfe.scale_by_kfac, damping_type="exact"), kfe.scale_by_kfac, kfe.scale_by_ekfac],
    ids=["exact", "factored", "ekfac"],
)
def test_a_schedule_of_the_damping_may_be_zero(make):
    """An input that is always zero has no curvature and no gradient, and no 0/0 comes of it."""
    params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3).at[2].set(0.0), jnp.zeros((3, 2))

    def loss_fn(params, x, y):
        return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"], params), y).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x, y)
    tx = make(layers, lambda count: 0.0 * count)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, y)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    assert np.isfinite(updates["kernel"]).all()
    assert (updates["kernel"][:2] > 0).all()
