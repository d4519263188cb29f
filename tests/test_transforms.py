"""The transformations' contract with Optax and JAX: constant state, no recompilation, hard inputs."""

from __future__ import annotations

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import dense, problems
from .dense import assert_close

MAKERS = {
    "kfac": lambda layers: kfe.scale_by_kfac(layers, 0.1, factor_update_period=2, inverse_update_period=3),
    "kfac exact": lambda layers: kfe.scale_by_kfac(
        layers, lambda step: 0.1 / (1 + step), damping_type="exact"
    ),
    "ekfac": lambda layers: kfe.scale_by_ekfac(layers, 0.1, factor_update_period=2, basis_update_period=3),
    "ekfac batch": lambda layers: kfe.scale_by_ekfac(layers, 0.1, scale="batch", damping_type="appendix_c"),
    "kfac alias": lambda layers: kfe.kfac(optax.linear_schedule(0.1, 0.01, 5), layers, weight_decay=1e-3),
    "ekfac alias": lambda layers: kfe.ekfac(0.1, layers),
}
EACH = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def problem():
    return problems.make("linen")


@pytest.fixture(scope="module")
def layers(problem):
    return problem.layers()


@pytest.fixture(scope="module")
def differentiate(problem, layers):
    return kfe.value_grad_and_taps(problem.loss_fn, layers)


def compilations(caplog):
    """The names of what was compiled since the last call."""
    names = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    caplog.clear()
    return names


@EACH
def test_constant_state_no_recompilation_donation(name, problem, layers, differentiate, caplog):
    """Five donated steps: one trace, one compilation, the same tree, shapes, dtypes and weak types."""
    tx = MAKERS[name](layers)
    traces = []

    def step(params, opt_state, key):
        traces.append(1)
        loss, grads, taps = differentiate(params, *problem.args, key=key)
        updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        return optax.apply_updates(params, updates), opt_state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, problem.params)
    state = tx.init(params)
    described = jax.tree.map(lambda v: (v.shape, v.dtype, v.weak_type), state)
    keys = list(jax.random.split(jax.random.key(0), 5))
    losses = []
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
        for i, key in enumerate(keys):
            before = state
            params, state, loss = jitted(params, state, key)
            losses.append(float(loss))
            assert jax.tree.map(lambda v: (v.shape, v.dtype, v.weak_type), state) == described
            # Scalars that are only written are no arguments of the program, so their buffers are not taken.
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim)
            assert bool(compilations(caplog)) == (i == 0)
    assert len(traces) == 1
    assert len(set(losses)) == 5
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


@pytest.mark.parametrize("name", ["kfac", "ekfac batch"])
def test_unjitted_caller_compiles_once(name, problem, layers, caplog):
    """A loop without jax.jit, which builds its wrapper anew each step, compiles nothing after two steps."""
    tx = MAKERS[name](layers)
    params, state = problem.params, tx.init(problem.params)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
        for i in range(5):
            compiled = compilations(caplog)
            assert i < 3 or not compiled
            differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)
            _, grads, taps = differentiate(params, *problem.args, key=jax.random.key(i))
            updates, state = tx.update(grads, state, params, taps=taps)
            params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", ["kfac", "kfac exact", "ekfac", "ekfac batch"])
def test_a_batch_with_nan_changes_nothing(name, problem, layers, differentiate):
    """The update is zero, the curvature stays, the step is counted; the next step is as if nothing had been."""
    tx = MAKERS[name](layers)
    x, y = problem.args
    update = jax.jit(tx.update)

    def step(state, x, key):
        _, grads, taps = differentiate(problem.params, x, y, key=jax.random.key(key))
        return update(grads, state, problem.params, taps=taps)

    _, good = step(tx.init(problem.params), x, 0)
    updates, state = step(good, x.at[0, 0].set(jnp.nan), 1)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    # The damping of the step is reported; all else is as it was.
    method = state.method._replace(damping=good.method.damping)
    jax.tree.map(np.testing.assert_array_equal, (method, state.rest), (good.method, good.rest))
    info = kfe.info(state)
    assert (int(info.nonfinite), int(info.failures), int(state.count)) == (1, 0, 2)
    updates, state = step(state, x, 2)
    expected, _ = step(good._replace(count=state.count - 1), x, 2)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert int(kfe.info(state).nonfinite) == 1


@pytest.mark.parametrize("name", ["kfac", "kfac exact", "ekfac", "ekfac batch"])
def test_overflowing_statistics_are_left_out(name, problem, layers, differentiate):
    """Finite gradients with factors beyond float32: the last good factors stay, and the failures are counted."""
    tx = MAKERS[name](layers)
    x, y = problem.args
    update = jax.jit(tx.update)
    _, grads, taps = differentiate(problem.params, x, y, key=jax.random.key(0))
    _, good = update(grads, tx.init(problem.params), problem.params, taps=taps)
    good = good._replace(count=jnp.asarray(0, jnp.int32))  # so that everything is refreshed again
    _, large_grads, large = differentiate(problem.params, x * 1e25, y, key=jax.random.key(1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(large_grads))
    updates, state = update(grads, good, problem.params, taps=large)
    factors, before = state.method.factors, good.method.factors
    np.testing.assert_array_equal(factors.input["dense_0"], before.input["dense_0"])
    np.testing.assert_array_equal(factors.output["dense_0"], before.output["dense_0"])
    assert int(kfe.info(state).failures) >= 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("name", ["kfac", "kfac exact", "ekfac", "ekfac batch"])
def test_layer_without_gradient_is_left_alone(name):
    """A head whose loss has weight zero: its update is its (zero) gradient, not 0/0; a parameter of no use too."""
    model = problems.LinenNet((4, 2))
    problem = problems.make("linen")
    x, y = problem.args
    params = {**problem.params, "other": {"kernel": jnp.ones((4, 2))}, "idle": jnp.ones(3)}

    def loss_fn(params, x, y):
        z = model.apply({"params": {k: params[k] for k in ("dense_0", "dense_1")}}, x)
        other = kfe.tag_dense(
            x @ jnp.ones((3, 4)), x @ jnp.ones((3, 4)) @ params["other"]["kernel"], params["other"]
        )
        return kfe.losses.l2_loss(z, z * 0 + 1).mean() + 0.0 * kfe.losses.l2_loss(other).mean()

    layers = kfe.find_layers(loss_fn, params, x, y)
    assert list(layers) == ["dense_0", "dense_1", "other"]
    tx = MAKERS[name](layers)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, y, key=jax.random.key(0))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    np.testing.assert_array_equal(updates["other"]["kernel"], 0)
    np.testing.assert_array_equal(updates["idle"], 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    assert np.linalg.norm(updates["dense_0"]["kernel"]) > 0


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
    """LayerNorm's parameters go through `rest`: Adam by default, or what is given."""
    model = nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.Dense(2)])
    x, y = problems.make("linen").args
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, x, y):
        logits = model.apply({"params": params}, x)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    layers = kfe.find_layers(loss_fn, params, x, y)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, y, key=jax.random.key(0))
    for rest, expected in ((None, optax.scale_by_adam()), (optax.scale(3.0), optax.scale(3.0))):
        tx = kfe.scale_by_kfac(layers, 0.1, rest=rest)
        updates, _ = tx.update(grads, tx.init(params), params, taps=taps)
        own = grads["layers_1"]
        assert_close(updates["layers_1"], expected.update(own, expected.init(own))[0], 1e-12)


def test_l2_inside_the_loss_and_plain():
    """A sum of squares over the parameters does not see the riders, nor does a loss that reads kfe.plain(params)."""
    problem = problems.make("linen")
    structure = jax.tree.structure(problem.params)

    def l2(params):
        return 0.5 * sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params))

    def per_leaf(params):
        assert jax.tree.structure(params) == structure
        return sum(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(params))

    for prior in (l2, lambda params: l2(kfe.plain(params)), lambda params: per_leaf(kfe.plain(params))):

        def loss_fn(params, x, y, prior=prior):
            return problem.loss_fn(params, x, y) + 0.1 * prior(params)

        layers = kfe.find_layers(loss_fn, problem.params, *problem.args)
        value, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(
            problem.params, *problem.args
        )
        assert_close((value, grads), jax.value_and_grad(loss_fn)(problem.params, *problem.args), 1e-6)
        # The prior is not part of the Fisher.
        without = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")
        bare = without(problem.params, *problem.args)[2]
        assert_close(taps["dense_0"].covariances(), bare["dense_0"].covariances(), 1e-6)
    assert kfe.plain(problem.params)["dense_0"].keys() == problem.params["dense_0"].keys()


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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters(dtype):
    """Factors and inverses are float32, updates have the gradient's dtype."""
    problem = problems.make("plain")
    params = jax.tree.map(lambda v: v.astype(dtype), problem.params)
    args = (problem.args[0].astype(dtype), problem.args[1])
    layers = kfe.find_layers(problem.loss_fn, params, *args)
    tx = kfe.ekfac(0.1, layers)
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers)(params, *args, key=jax.random.key(0))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    method = state[0].inner.method
    assert {leaf.dtype for leaf in jax.tree.leaves((method.factors.input, method.basis, method.scale))} == {
        jnp.dtype(jnp.float32)
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert all(np.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(updates))
