"""Through Optax's wrappers, Flax's training states, several devices: the same updates, and `kfe.info` finds its way."""

from __future__ import annotations

import functools

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
from .methods import CASES, DAMPING


@pytest.fixture(scope="module")
def step():
    """(problem, layers, gradients, taps) of one sampled step."""
    problem = problems.make("linen")
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)
    _, grads, taps = differentiate(problem.params, *problem.args, key=jax.random.key(0))
    return problem, layers, grads, taps


def update(tx, params, grads, taps):
    return jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)


@pytest.fixture(scope="module")
def bare_of(step):
    """The update of a method by itself."""
    problem, layers, grads, taps = step
    return functools.cache(lambda name: update(CASES[name].make(layers), problem.params, grads, taps)[0])


@pytest.fixture
def bare(bare_of):
    return bare_of("kfac")


def _everywhere(value):
    return lambda tree: jax.tree.map(lambda _: value, tree)


# (case, layers) → the wrapped transformation, whose update is the bare one.
WRAPPERS = {
    "chain": lambda case, layers: optax.chain(optax.identity(), case.make(layers), optax.identity()),
    "apply_if_finite": lambda case, layers: optax.apply_if_finite(case.make(layers), 3),
    "masked": lambda case, layers: optax.masked(case.make(layers), _everywhere(True)),
    "partition": lambda case, layers: optax.partition(
        {"all": case.make(layers), "none": optax.set_to_zero()}, _everywhere("all")
    ),
    "multi steps of one": lambda case, layers: optax.MultiSteps(
        case.make(layers), 1
    ).gradient_transformation(),
    "inject_hyperparams": lambda case, layers: case.inject(layers),
    "conditionally": lambda case, layers: optax.transforms.conditionally_transform(
        case.make(layers), lambda step: step >= 0
    ),
    "clip": lambda case, layers: kfe.clip_by_kl(case.make(layers), 1e6),
}
# Each by itself around K-FAC; around every other method one of them in turn and the clip, which is ours. Most of them at once,
# for every method, are in test_conformance_methods.
QUICK = {("kfac", "conditionally"), ("kfac", "clip"), ("kfac", "inject_hyperparams")}
EACH = [
    pytest.param(name, wrapper, marks=[] if (name, wrapper) in QUICK else pytest.mark.nightly)
    for i, name in enumerate(CASES)
    for j, wrapper in enumerate(WRAPPERS)
    if name == "kfac" or wrapper == "clip" or j == i % len(WRAPPERS)
]


@pytest.mark.parametrize(("name", "wrapper"), EACH)
def test_wrappers(name, wrapper, step, bare_of):
    """Each passes the taps on, gives the same update, and `kfe.info` digs through its state."""
    problem, layers, grads, taps = step
    updates, state = update(WRAPPERS[wrapper](CASES[name], layers), problem.params, grads, taps)
    assert_close(updates, bare_of(name), 1e-5)
    info = kfe.info(state)
    if CASES[name].damped:
        assert_close(info.damping, DAMPING, 1e-6)
    assert (int(info.failures), int(info.last_refresh), int(info.nonfinite)) == (0, 0, 0)
    assert (info.kl_factor is None) == (wrapper != "clip")


def test_a_masked_layer(step, bare):
    """A wholly masked layer is not preconditioned, the other one as before."""
    problem, layers, grads, taps = step
    tx = optax.masked(CASES["kfac"].make(layers), {"dense_0": False, "dense_1": True})
    updates, state = update(tx, problem.params, grads, taps)
    assert_close(updates["dense_1"], bare["dense_1"], 1e-6)
    assert_close(updates["dense_0"], grads["dense_0"], 1e-6)
    assert_close(kfe.info(state).damping, DAMPING, 1e-6)


def test_multi_steps(step):
    """Accumulated gradients with the statistics of the last microbatch; in between nothing moves."""
    problem, layers, *_ = step
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)
    x, y = problem.args
    tx = optax.MultiSteps(CASES["kfac"].make(layers), 2)
    jitted = jax.jit(tx.update)
    state, halves, found = tx.init(problem.params), [], []
    for i, part in enumerate((slice(0, 4), slice(4, 8))):
        _, grads, taps = differentiate(problem.params, x[part], y[part], key=jax.random.key(i))
        updates, state = jitted(grads, state, problem.params, taps=taps)
        halves.append(grads)
        found.append(updates)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found[0]))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    expected, _ = update(CASES["kfac"].make(layers), problem.params, mean, taps)
    assert_close(found[1], expected, 1e-5)


def test_train_state(step, bare):
    """kfe.TrainState passes the taps on and counts the step."""
    problem, layers, grads, taps = step
    tx = optax.chain(kfe.scale_by_kfac(layers, 0.1), optax.scale(-1.0))
    state = kfe.TrainState.create(apply_fn=None, params=problem.params, tx=tx)
    state = jax.jit(lambda s, g, t: s.apply_gradients(grads=g, taps=t))(state, grads, taps)
    assert_close(state.params, jax.tree.map(lambda p, d: p - d, problem.params, bare), 1e-6)
    assert int(state.step) == 1
    assert_close(kfe.info(state.opt_state).damping, 0.1, 1e-6)


def test_nnx_optimizer(step, bare):
    """nnx.Optimizer.update(model, grads, taps=taps) moves the model as Linen's loop moves its tree."""
    problem, *_ = step
    other = problems.make("nnx")
    layers = other.layers()
    tx = optax.chain(kfe.scale_by_kfac(layers, 0.1), optax.scale(-1.0))
    optimizer = nnx.Optimizer(other.params, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x, y, key):
        loss, grads, taps = kfe.value_grad_and_taps(other.loss_fn, layers)(model, x, y, key=key)
        optimizer.update(model, grads, taps=taps)
        return loss

    train_step(other.params, optimizer, *other.args, jax.random.key(0))
    for i, name in enumerate(("dense_0", "dense_1")):
        layer = other.params.dense[i]
        moved = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        expected = jax.tree.map(lambda p, d: p - d, problem.params[name], bare[name])
        assert_close(moved, expected, 1e-5)
    info = kfe.info(optimizer.opt_state)
    assert_close(info.damping, 0.1, 1e-6)
    assert (int(info.last_refresh), int(info.failures), int(info.nonfinite)) == (0, 0, 0)


def test_info_of_other_optimizers():
    assert kfe.info(optax.adam(1e-3).init({"w": jnp.ones(2)})) == kfe.Info()


def test_weight_decay_acts_where_its_mask_says(step):
    """Without a gradient the update is the decay alone, −η w θ."""
    problem, layers, grads, taps = step
    mask = jax.tree.map(lambda p: p.ndim > 1, problem.params)
    tx = kfe.kfac(0.1, layers, weight_decay=0.5, mask=mask)
    updates, _ = update(tx, problem.params, jax.tree.map(jnp.zeros_like, grads), taps)
    assert_close(updates, jax.tree.map(lambda p: -0.05 * p * (p.ndim > 1), problem.params), 1e-6)


def test_info_of_two_preconditioners(step):
    """Counts are added over the parts of a partition."""
    problem, layers, grads, taps = step
    labels = {"dense_0": "a", "dense_1": "b"}
    tx = optax.partition({"a": kfe.scale_by_kfac(layers, 0.1), "b": kfe.scale_by_ekfac(layers, 0.1)}, labels)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    _, state = update(tx, problem.params, bad, taps)
    assert int(kfe.info(state).nonfinite) == 2


def test_info_of_a_wrapped_preconditioner_before_a_bare_one(step):
    """All that the first one says is said of the first one, however deep it stands."""
    problem, layers, *_ = step
    tx = optax.chain(kfe.clip_by_kl(kfe.scale_by_kfac(layers, 0.1), 1.0), kfe.scale_by_kfac(layers, 0.2))
    first, second = tx.init(problem.params)
    second = second._replace(method=second.method._replace(damping=jnp.float32(2.0)))
    assert kfe.info(second).damping == 2
    assert kfe.info((first, second)).damping == first.inner.method.damping == 0


@pytest.mark.parametrize(
    ("make", "fisher"),
    [
        (kfe.kfac, "sampled"),
        pytest.param(kfe.ekfac, "exact", marks=pytest.mark.nightly),
        pytest.param(kfe.kfac, "empirical", marks=pytest.mark.nightly),
        pytest.param(kfe.kfac, "exact", marks=pytest.mark.nightly),
        pytest.param(kfe.ekfac, "sampled", marks=pytest.mark.nightly),
        pytest.param(kfe.ekfac, "empirical", marks=pytest.mark.nightly),
    ],
)
def test_two_devices_equal_one(make, fisher, x64):
    """pmap over two halves of a batch, statistics and sampled targets included, is one device on the whole batch."""
    problem = problems.make("plain")
    layers = problem.layers()
    tx = make(0.1, layers)
    key = jax.random.key(0)

    def train_step(params, opt_state, x, y, key, axis_name=None):
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher=fisher, axis_name=axis_name)
        loss, grads, taps = differentiate(params, x, y, key=key)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        return optax.apply_updates(params, updates), opt_state, loss

    start = (problem.params, tx.init(problem.params))
    one = jax.jit(train_step)(*start, *problem.args, key)
    halves = [v.reshape(2, -1, *v.shape[1:]) for v in problem.args]
    mapped = jax.pmap(
        lambda *args: train_step(*args, axis_name="devices"),
        "devices",
        in_axes=(None, None, 0, 0, None),
        devices=jax.devices()[:2],
    )
    two = mapped(*start, *halves, key)
    for device in range(2):
        assert_close(jax.tree.map(lambda v, device=device: np.asarray(v)[device], two[0]), one[0], 1e-10)
    assert_close(two[2][0], one[2], 1e-12)


def test_sharded_batch_under_jit(x64):
    """Nothing but a sharding: the batch over eight devices gives the update of one device."""
    problem = problems.make("linen")
    layers = problem.layers()
    tx = kfe.ekfac(0.1, layers, scale="batch")
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)

    @jax.jit
    def train_step(params, x, y):
        _, grads, taps = differentiate(params, x, y, key=jax.random.key(0))
        return tx.update(grads, tx.init(params), params, taps=taps)[0]

    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    expected = train_step(problem.params, *problem.args)
    sharded = train_step(
        jax.device_put(problem.params, everywhere), *(jax.device_put(v, split) for v in problem.args)
    )
    assert len(problem.args[0].devices()) == 1
    assert_close(sharded, expected, 1e-10)
