"""`shard_state`: the same steps from a state of which each device keeps its part, and how much that is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kfe_optax as kfe
from kfe_optax._wrappers.sharded_state import shard_state, state_bytes_per_device

from . import hlo, problems
from .dense import assert_close

# No side is a multiple of the number of devices.
SIZES, EXAMPLES, STEPS = (5, 4, 3), 16, 5


def mesh_of(devices: int, kind: AxisType = AxisType.Auto) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(kind,))


def soap(layers):
    # One gradient is not of full rank on its longer side, where its basis would be arbitrary: the identity there.
    basis = {"basis": kfe.factors.gradient(), "refresh": "qr", "max_dim": 4}
    rotated = kfe.in_kfe(optax.scale_by_adam(), layers, **basis)
    return optax.chain(optax.clip_by_global_norm(10.0), rotated, optax.scale_by_learning_rate(0.1))


METHODS: dict[str, Callable[[kfe.Layers], optax.GradientTransformation]] = {
    "kfac": lambda layers: kfe.kfac(0.1, layers, 0.1),
    "ekfac": lambda layers: kfe.ekfac(0.1, layers, 0.1, basis_update_period=2),
    "deflation": lambda layers: kfe.deflation(0.1, layers, 0.1),
    "kfac_tridiagonal": lambda layers: kfe.kfac_tridiagonal(0.1, layers, 0.1),
    "adam in the eigenbasis": lambda layers: kfe.in_kfe(optax.adam(0.1), layers),
    "soap": soap,
}


class Run(NamedTuple):
    """Some steps of one method: parameters after each, the last state, how often the step was compiled."""

    params: list[Any]
    state: Any
    compilations: int
    step: Callable[..., Any]
    last: tuple[Any, ...]


@functools.cache
def problem(sizes=SIZES, examples=EXAMPLES):
    # Both sides of all factors are of full rank: the basis of a null space would be arbitrary.
    made = problems.make("linen", "gaussian", sizes, examples)
    return made, made.layers()


def step_of(tx, loss_fn, layers):
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)

    @jax.jit
    def step(params, state, x, y, key):
        _, grads, taps = differentiate(params, x, y, key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def run(name: str, devices: int) -> Run:
    """`devices` 0 for the plain optimizer."""
    made, layers = problem()
    tx = METHODS[name](layers)
    params, (x, y) = made.params, made.args
    if devices:
        mesh = mesh_of(devices)
        tx = shard_state(tx, mesh, min_size=1)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        x, y = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))
    step, state, trajectory = step_of(tx, made.loss_fn, layers), tx.init(params), []
    for i in range(STEPS):
        params, state = step(params, state, x, y, jax.random.key(i))
        trajectory.append(params)
    return Run(trajectory, state, step._cache_size(), step, (params, state, x, y))


def cut(padded: Any, like: Any) -> Any:
    """A state without its padding."""
    return jax.tree.map(lambda v, whole: np.asarray(v)[tuple(slice(d) for d in whole.shape)], padded, like)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pytest.param(
            name,
            n,
            marks={("ekfac", 2): [], ("kfac", 8): pytest.mark.slow}.get((name, n), pytest.mark.nightly),
        )
        for name in METHODS
        for n in (2, 8)
    ],
)
def test_divided_state_takes_the_same_steps(name, devices, x64):
    """The parameters of the plain optimizer, and its state; one compilation, and parts that stay where they are."""
    plain, divided = run(name, 0), run(name, devices)
    for one, many in zip(plain.params, divided.params, strict=True):
        assert_close(many, one, 1e-10)
    assert jax.tree.structure(plain.state) == jax.tree.structure(divided.state)
    for leaf, like in zip(jax.tree.leaves(divided.state), jax.tree.leaves(plain.state), strict=True):
        assert leaf.sharding.is_fully_replicated == (leaf.ndim == 0)
        assert math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size // (devices if leaf.ndim else 1)
        assert leaf.dtype == like.dtype
    assert divided.compilations == 1
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(divided.params[-1]))


def test_info_reads_a_divided_state(x64):
    assert_close(tuple(kfe.info(run("kfac", 8).state))[:5], tuple(kfe.info(run("kfac", 0).state))[:5], 1e-10)


def test_gradients_that_are_not_finite_leave_the_state(x64):
    """A NaN reaches neither the factors nor the inverses nor the padding, and the next step is as good as ever."""
    plain, divided = run("kfac", 0), run("kfac", 8)
    params, state, x, y = divided.last
    poisoned = x.at[0, 0].set(jnp.nan)
    same, after = divided.step(params, state, poisoned, y, jax.random.key(7))
    assert int(kfe.info(after).nonfinite) == 1
    chex.assert_trees_all_equal(after[0].method, state[0].method._replace(damping=after[0].method.damping))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    moved, _ = divided.step(same, after, x, y, jax.random.key(8))
    expected = plain.step(*plain.last[:2], np.asarray(poisoned), plain.last[3], jax.random.key(7))
    expected, _ = plain.step(*expected, *plain.last[2:], jax.random.key(8))
    assert_close(moved, expected, 1e-10)


def test_explicit_axes():
    """A mesh whose axes stand in the types of arrays, among them those of a divided parameter."""
    mesh = mesh_of(4, AxisType.Explicit)
    params = {"kernel": jnp.linspace(-1.0, 1.0, 8 * 9).reshape(8, 9), "bias": jnp.ones(9)}
    specs = {"kernel": PartitionSpec("data", None), "bias": PartitionSpec(None)}
    placed = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    plain, tx = optax.adam(0.1), shard_state(optax.adam(0.1), mesh, min_size=1)
    expected, found = plain.init(params), tx.init(placed)
    for update in (tx.update, jax.jit(tx.update)):
        updates, expected = plain.update(params, expected, params)
        moved, found = update(placed, found, placed)
        assert_close(moved, updates, 1e-6)
        assert {name: leaf.sharding.spec for name, leaf in moved.items()} == specs
        assert_close(cut(found, expected)[0].nu, expected[0].nu, 1e-6)
        assert found[0].mu["kernel"].sharding.shard_shape((8, 9)) == (2, 9)
        assert found[0].mu["bias"].sharding.shard_shape((12,)) == (3,)


@pytest.mark.parametrize("name", ["ekfac", "kfac_tridiagonal"])
def test_bytes_a_device_fall_as_one_over_their_number(name):
    """Measured on the shards, of a state that no device ever holds as a whole, before and after a step."""
    made, layers = problem((100, 60, 11), 8)
    plain = jax.eval_shape(METHODS[name](layers).init, made.params)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plain)]
    small = sum(size for size in sizes if size < 4 * 256)
    for devices in (1, 2, 4, 8):
        tx = shard_state(METHODS[name](layers), mesh_of(devices), min_size=256)
        state = tx.init(made.params)
        measured = dict.fromkeys(jax.devices()[:devices], 0)
        for leaf in jax.tree.leaves(state):
            for shard in leaf.addressable_shards:
                measured[shard.device] += shard.data.nbytes
        assert state_bytes_per_device(state) == measured
        assert len(set(measured.values())) == 1
        expected = (sum(sizes) - small) / devices + small
        assert expected <= measured[jax.devices()[0]] <= 1.05 * expected


def test_factors_are_gathered_on_refreshes_alone():
    """Outside the branches of conditionals no more than one square matrix a layer is gathered: the inverse of one side."""
    made, layers = problem((22, 17, 9), 8)
    mesh = mesh_of(4)
    tx = shard_state(kfe.scale_by_kfac(layers, 0.1), mesh, min_size=1)
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    params, args = jax.device_put(made.params, everywhere), jax.device_put(made.args, split)
    lowered = step_of(tx, made.loss_fn, layers).lower(params, tx.init(params), *args, jax.random.key(0))
    gathers = [c for c in hlo.collectives(lowered.compile()) if c.kind in ("all-gather", "all-to-all")]
    sides = [{size, -(-size // 4) * 4} for layer in layers.values() for size in layer.sides]
    square = [c for c in gathers if any(set(shape[-2:]) <= side for side in sides for shape in c.results)]
    always = [c for c in square if not c.conditional]
    assert len(always) <= len(layers) < len(square)


def test_stacks_are_divided_along_the_stack():
    """The axis of the least padding, the first of several; small arrays stay whole."""
    params = {"stack": jnp.ones((8, 3, 16)), "rows": jnp.ones((3, 16, 9)), "odd": jnp.ones((9, 7, 5))}
    state = shard_state(optax.scale_by_adam(), mesh_of(8), min_size=100).init({**params, "bias": jnp.ones(9)})
    found = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in state.mu.items()}
    assert found == {"stack": (1, 3, 16), "rows": (3, 2, 9), "odd": (9, 1, 5), "bias": (9,)}


def test_the_least_size_is_that_of_an_array_that_is_divided():
    params = {"least": jnp.ones(16), "smaller": jnp.ones(15)}
    state = shard_state(optax.trace(0.9), mesh_of(2), min_size=16).init(params)
    found = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in state.trace.items()}
    assert found == {"least": (8,), "smaller": (15,)}


def test_two_axes_of_a_mesh():
    """All axes of the mesh, or some of them."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    params = {"kernel": jnp.ones((16, 3))}
    for names, shard in ((None, (2, 3)), ("data", (4, 3)), (("model",), (8, 3))):
        tx = shard_state(optax.adam(0.1), mesh, names, min_size=1)
        state = tx.init(params)
        assert state[0].mu["kernel"].sharding.shard_shape((16, 3)) == shard
        updates, state = tx.update(params, state)
        assert_close(updates, optax.adam(0.1).update(params, optax.adam(0.1).init(params))[0], 1e-6)
        assert state[0].nu["kernel"].sharding.shard_shape((16, 3)) == shard


def test_checkpoint(tmp_path, x64):
    """Saved and restored on eight devices, and on two, whose padding is another."""
    made, layers = problem()
    state = run("kfac", 8).state
    manager = ocp.CheckpointManager(tmp_path)
    manager.save(0, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    for devices in (8, 2):
        like = shard_state(METHODS["kfac"](layers), mesh_of(devices), min_size=1).init(made.params)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = manager.restore(0, args=ocp.args.StandardRestore(abstract, strict=False))
        plain = run("kfac", 0).state
        chex.assert_trees_all_equal(cut(restored, plain), cut(state, plain))
        assert jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, like) == jax.tree.map(
            lambda _: True, like
        )
    manager.close()


def test_errors():
    """Each says what to do."""
    mesh, params = mesh_of(8), {"kernel": jnp.ones((9, 9))}
    with pytest.raises(TypeError, match="inner must be an Optax transformation"):
        shard_state(mesh, optax.adam(0.1))
    with pytest.raises(TypeError, match=r"must be a jax\.sharding\.Mesh"):
        shard_state(optax.adam(0.1), jax.devices())
    with pytest.raises(ValueError, match="no axis 'model'; its axes are data"):
        shard_state(optax.adam(0.1), mesh, "model")
    for names in ((), ("data", "data")):
        with pytest.raises(ValueError, match="one axis or several different ones"):
            shard_state(optax.adam(0.1), mesh, names)
    tx = shard_state(optax.adam(0.1), mesh, min_size=1)
    with pytest.raises(ValueError, match=r"shape \(9, 9\) instead of \(16, 9\), .* made without shard_state"):
        tx.update(params, optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="not that of this optimizer"):
        tx.update(params, optax.sgd(0.1).init(params))
    everywhere = PartitionSpec()
    inside = jax.shard_map(tx.update, mesh=mesh, in_specs=(everywhere, everywhere), out_specs=everywhere)
    with pytest.raises(
        ValueError, match="inside shard_map or pmap over 'data'.*update the optimizer outside"
    ):
        inside(params, tx.init(params))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda state: state_bytes_per_device(state) and state)(tx.init(params))
