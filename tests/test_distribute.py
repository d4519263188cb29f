"""`distribute=`: linear algebra divided among devices gives what one device computes, and is divided."""

from __future__ import annotations

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfe_optax as kfe
from benchmarks.programs import inner_jaxprs
from kfe_optax._linalg import devices as devices_lib
from kfe_optax._linalg import kronecker

from . import hlo, problems, several_devices
from .dense import assert_close

pytestmark = pytest.mark.usefixtures("x64")  # problems are made once, in one precision

BOTH = ("inverses", "inverses_and_apply")
# Factors of 4, 5, 5 and 4, 4, 2: stacks that four devices cannot divide evenly, and shapes that occur once.
SIZES = (3, 4, 4, 2)
EVERY = {"damping": 0.1, "factor_update_period": 1}


def in_adam(layers, **options):
    return kfe.in_kfe(optax.scale_by_adam(), layers, factor_update_period=1, basis_update_period=1, **options)


METHODS = {
    "kfac": functools.partial(kfe.scale_by_kfac, inverse_update_period=1, **EVERY),
    "kfac exact": functools.partial(
        kfe.scale_by_kfac, damping_type="exact", inverse_update_period=1, **EVERY
    ),
    "diagonal sides": functools.partial(kfe.scale_by_kfac, inverse_update_period=1, max_dim=4, **EVERY),
    "ekfac": functools.partial(kfe.scale_by_ekfac, basis_update_period=1, **EVERY),
    "tekfac": functools.partial(kfe.scale_by_tekfac, basis_update_period=1, refresh="qr", **EVERY),
    "deflation": functools.partial(kfe.scale_by_deflation, inverse_update_period=1, **EVERY),
    "tridiagonal": functools.partial(kfe.scale_by_block_tridiagonal, inverse_update_period=1, **EVERY),
    "two-level": functools.partial(
        kfe.scale_by_two_level_kfac, inverse_update_period=1, coarse="eigenvectors", **EVERY
    ),
    "in_kfe": in_adam,
}


@functools.cache
def problem(sizes=SIZES):
    """A network whose factors have no null spaces, and their layers."""
    found = problems.make("plain", "gaussian", sizes=sizes, examples=16)
    return found, found.layers()


def make_step(name, axis_name, distribute, sizes=SIZES):
    """Two steps, the second from bases that are no identity."""
    found, layers = problem(sizes)
    tx = METHODS[name](layers, distribute=distribute)
    one = several_devices.train_step(
        found.loss_fn, layers, tx, axis_name, size=0.01, fisher="exact" if name != "two-level" else "sampled"
    )

    def both(params, opt_state, batch, key):
        def step(carry, _):
            *carry, loss = one(*carry, batch, key)
            return tuple(carry), loss

        carry, losses = jax.lax.scan(step, (params, opt_state), length=2)
        return *carry, losses

    return both, tx


def given(name, sizes=SIZES):
    found, layers = problem(sizes)
    state = jax.jit(METHODS[name](layers).init)(found.params)
    return found.params, state, found.args, jax.random.key(0)


@functools.cache
def alone(name, sizes=SIZES):
    """What one device makes of it that was told nothing."""
    return jax.device_get(jax.jit(make_step(name, None, "none", sizes)[0])(*given(name, sizes)))


QUICK = {("kfac", "jit", 8, "inverses_and_apply")}
# Every method in one of the modes, and one method in all of them.
CASES = [(name, several_devices.MODES[i % 3], 4, "inverses_and_apply") for i, name in enumerate(METHODS)]
CASES += [("kfac", mode, 8, "inverses") for mode in several_devices.MODES]
CASES += [("kfac", "jit", 8, "inverses_and_apply")]
# Chains couple the layers that the devices divide among themselves.
CASES += [("tridiagonal", "pmap", 2, "inverses_and_apply"), ("tridiagonal", "jit", 4, "inverses_and_apply")]
AGREEMENT = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.nightly) for case in CASES]


@pytest.mark.parametrize(("name", "mode", "devices", "distribute"), AGREEMENT)
def test_agreement(name, mode, devices, distribute):
    """Parameters after two steps, loss and counters are those of one device."""
    step = several_devices.divided(mode, devices, lambda axis_name: make_step(name, axis_name, distribute)[0])
    with jax.set_mesh(several_devices.mesh_of(devices)) if mode == "jit" else contextlib.nullcontext():
        found = step(*given(name))
    (params, state, loss), (expected, expected_state, expected_loss) = found, alone(name)
    start = problem()[0].params
    assert several_devices.difference(params, expected, start) < 1e-10
    assert_close(loss, expected_loss, 1e-10)
    assert_close(kfe.info(state), kfe.info(expected_state), 1e-10)


def adaptive(layers, **options):
    """Searches for its damping on every step, which retries the preconditioner's."""
    return kfe.kfac_adaptive(layers, search_period=1, damping_period=1, inverse_update_period=1, **options)


def accumulating(layers, **options):
    return optax.MultiSteps(kfe.ekfac(0.1, layers, basis_update_period=1, **options), 2)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", several_devices.MODES)
@pytest.mark.parametrize("make", [adaptive, accumulating])
def test_wrappers(make, mode):
    """The devices reach the preconditioner through retries, quadratic model, adaptive damping, KL clip and MultiSteps."""
    found, layers = problem()
    results = {}
    for distribute in ("none", "inverses_and_apply"):
        tx = make(layers, distribute=distribute)
        one = lambda axis_name, tx=tx: several_devices.train_step(
            found.loss_fn, layers, tx, axis_name, fisher="exact", quadratic_model=make is adaptive
        )
        divide = distribute != "none"
        step = several_devices.divided(mode, 4, one) if divide else jax.jit(one(None))
        with (
            jax.set_mesh(several_devices.mesh_of(4)) if divide and mode == "jit" else contextlib.nullcontext()
        ):
            (*_, first), (params, loss) = several_devices.run(
                step, found.params, tx.init(found.params), lambda t: found.args, 3
            )[-2:]
        results[distribute] = params, first, loss
    expected = results["none"]
    assert_close(results["inverses_and_apply"], expected, 1e-9)
    assert several_devices.difference(results["inverses_and_apply"][0], expected[0], found.params) < 1e-9


# How much each device computes.


def work(jaxpr, name, cost):
    """Σ cost(d) over the matrices (d, d) that go into primitives of this name, on the device that has the most."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            *lead, d, _ = eqn.invars[0].aval.shape
            total += math.prod(lead) * cost(d)
        else:
            inner = [work(sub, name, cost) for sub in inner_jaxprs(eqn.params.values())]
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return total


EVEN = {4: 8, 5: 16}


@pytest.mark.parametrize("mode", several_devices.MODES)
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_each_device_has_its_share(mode, devices):
    """Of a stack of b each of n devices factorizes b / n."""
    stacks = [(jnp.zeros((many, d, d)),) for d, many in EVEN.items()]
    for function, name in ((kronecker.eigh, "eigh"), (kronecker.inverse, "cholesky")):
        program = sharing(mode, devices, function)(stacks)
        for d, many in EVEN.items():
            assert work(program.jaxpr, name, lambda size, d=d: size == d) == many / devices


def sharing(mode, devices, function):
    """Stacks → the program in which devices share them."""
    mesh, axis = several_devices.mesh_of(devices), several_devices.AXIS

    def shared(stacks, axis_name):
        return devices_lib.shared(devices_lib.present(axis_name), function, stacks)

    if mode == "jit":

        def meshed(stacks):
            with jax.set_mesh(mesh):
                return jax.make_jaxpr(lambda s: shared(s, None))(stacks)

        return meshed
    if mode == "pmap":
        mapped = jax.pmap(
            lambda _, s: shared(s, axis), axis, in_axes=(0, None), devices=jax.devices()[:devices]
        )
        return lambda stacks: jax.make_jaxpr(mapped)(jnp.arange(devices), stacks)
    everywhere = PartitionSpec()
    inside = lambda stacks: shared(stacks, axis)
    return jax.make_jaxpr(jax.shard_map(inside, mesh=mesh, in_specs=everywhere, out_specs=everywhere))


def test_shares_are_fair():
    """All rows are dealt out once; a network of different shapes is divided too, the costliest by itself."""
    costs = [float(d**3) for d in (9, 2, 7, 6, 5, 4, 3, 8, 1)]
    tables = devices_lib.rows_of(4, [(1, cost) for cost in costs])
    owners = [int(np.flatnonzero(table[:, 0] == 0)[0]) for table in tables]
    load = np.bincount(owners, costs, 4)
    assert load.max() == max(costs)
    assert load.min() > 0.4 * load.max()
    for length in (1, 5, 8, 21):
        for count in (2, 8):
            (table,) = devices_lib.rows_of(count, [(length, 1.0)])
            assert sorted(table[table >= 0]) == list(range(length))
            assert table.shape == (count, -(-length // count))


DIFFERENT = (2, 6, 4, 1)  # factors of 3, 7, 5 and 6, 4, 1


def test_different_shapes():
    """A network in which no two factors have one shape: on four devices none does more than the largest."""
    found = {}
    for distribute in ("none", "inverses"):
        step = several_devices.divided(
            "shard_map", 4, lambda axis, d=distribute: make_step("kfac exact", axis, d, DIFFERENT)[0]
        )
        program = jax.make_jaxpr(step)(*given("kfac exact", DIFFERENT))
        found[distribute] = work(program.jaxpr, "eigh", lambda d: d**3) / 2  # of two steps
    sizes = np.array([3, 7, 5, 6, 4, 1])
    assert found == {"none": np.sum(sizes**3), "inverses": 7**3}


@pytest.mark.nightly
def test_agreement_of_different_shapes():
    step = several_devices.divided(
        "shard_map", 4, lambda axis_name: make_step("kfac", axis_name, "inverses_and_apply", DIFFERENT)[0]
    )
    params, _, _ = step(*given("kfac", DIFFERENT))
    expected, _, _ = alone("kfac", DIFFERENT)
    assert several_devices.difference(params, expected, problem(DIFFERENT)[0].params) < 1e-10


# The linear algebra by itself.

STACKS = {4: 7, 5: 2, 3: 1}


@functools.cache
def random_stacks():
    generator = np.random.default_rng(0)

    def positive(many, d):
        m = generator.normal(size=(many, d, d))
        return m @ m.swapaxes(-1, -2) + np.eye(d)

    return [(positive(many, d),) for d, many in STACKS.items()]


@pytest.mark.parametrize("explicit", [False, True])
def test_axis_types(explicit):
    """Meshes of both types, of two axes, with a stack that is divided over them already."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:4])
    (four,), *others = random_stacks()
    stacks = [(four[:6],), *others]
    shardings = [
        (NamedSharding(mesh, PartitionSpec("data")),),
        *[(NamedSharding(mesh, PartitionSpec()),)] * 2,
    ]

    def run(stacks):
        by_key = dict(enumerate(stacks))
        here = devices_lib.present()
        assert here.count == 4
        return kronecker.by_shape(kronecker.eigh, by_key, here)

    with jax.set_mesh(mesh):
        found = jax.jit(run)(jax.device_put(stacks, shardings))
    expected = jax.jit(lambda stacks: {i: kronecker.eigh(*stack) for i, stack in enumerate(stacks)})(stacks)
    assert_close(found, expected, 1e-10)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))


def test_products():
    """Layers of one form are taken apart, stacks and all; one whose blocks share a factor is not; sides may be diagonals."""
    generator = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(generator.normal(size=shape))
    basis = kronecker.Eigenbasis
    layers = {
        "plain": (array(3, 2), (array(3, 3), array(2, 2))),
        "stack": (array(5, 3, 2), (array(5, 3, 3), array(5, 2, 2))),
        "shared": (array(2, 3, 3, 2), (array(2, 1, 3, 3), array(2, 3, 2, 2))),
        "diagonal": (array(4, 3, 2), (array(4, 3), array(4, 2, 2))),
    }
    bases = {
        "pair": (array(2, 3, 2), (basis(array(2, 3), array(2, 3, 3)), basis(array(2, 2), None))),
        "other": (array(3, 2), (basis(array(3), array(3, 3)), basis(array(2), None))),
    }

    def run(devices):
        sides = lambda v, root: kronecker.right(kronecker.left(root[0], v, v.ndim - 2), root[1], v.ndim - 2)
        return (
            kronecker.each(sides, layers, devices),
            kronecker.each(lambda v, own: kronecker.to_basis(v, own, v.ndim - 2), bases, devices),
        )

    mesh = several_devices.mesh_of(4)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda: run(devices_lib.present()))()
    assert_close(found, jax.jit(lambda: run(devices_lib.ALONE))(), 1e-14)


@pytest.mark.parametrize("check_vma", [False, True])
def test_failure_on_one_device(check_vma):
    """A matrix that no device can factorize is known as such on all, and the others are what they were."""
    stacks = [tuple(v.copy() for v in stack) for stack in random_stacks()]
    stacks[0][0][6] = np.nan
    stacks[2][0][0] = -np.eye(3)
    mesh = several_devices.mesh_of(4)
    everywhere = PartitionSpec()
    found = jax.jit(
        jax.shard_map(
            lambda s: devices_lib.shared(devices_lib.present("devices"), kronecker.inverse, s),
            mesh=mesh,
            in_specs=everywhere,
            out_specs=everywhere,
            check_vma=check_vma,
        )
    )(stacks)
    finite = [np.asarray(good) for _, good in found]
    assert finite[0].tolist() == [True] * 6 + [False]
    assert finite[1].all()
    assert not finite[2].any()
    for (result, _), (stack,), good in zip(found, stacks, finite, strict=True):
        for i in np.flatnonzero(good):
            assert_close(result[i] @ stack[i], np.eye(stack.shape[-1]), 1e-10)
        per_device = [np.asarray(shard.data) for shard in result.addressable_shards]
        for other in per_device[1:]:
            np.testing.assert_array_equal(other, per_device[0])


def test_last_good_roots():
    """A factor that cannot be inverted keeps its last good inverse on every device, and is counted once."""
    found, layers = problem()
    options = {"damping": 0.1, "inverse_update_period": 1, "initial_refreshes": 1, "distribute": "inverses"}
    tx = kfe.scale_by_kfac(layers, factor_update_period=1000, **options)

    def again(params, state, batch, key):
        differentiate = kfe.value_grad_and_taps(
            found.loss_fn, layers, axis_name=several_devices.AXIS, fisher="exact"
        )
        loss, grads, taps = differentiate(params, *batch, key=key)
        grads = jax.lax.pmean(grads, several_devices.AXIS)
        # A second step, which inverts the factors that it is given.
        _, state = tx.update(grads, state, params, taps=taps)
        return params, state, jax.lax.pmean(loss, several_devices.AXIS)

    params, state, batch, key = given("kfac")
    state = tx.init(params)
    factors = state.method.factors
    identity = lambda side: jnp.eye(len(side))
    good = factors._replace(
        input=jax.tree.map(identity, factors.input), output=jax.tree.map(identity, factors.output)
    )
    bad = good._replace(input={**good.input, "1": -3 * good.input["1"]})
    state = state._replace(method=state.method._replace(factors=bad), count=jnp.asarray(7, jnp.int32))
    _, new, _ = several_devices.divided("shard_map", 4, lambda _: again)(params, state, batch, key)
    assert int(new.method.failures.sum()) == 1
    for name, (side_in, side_out) in new.method.roots.items():
        before = state.method.roots[name]
        assert (np.abs(side_in - before[0]).max() == 0) == (name == "1")
        assert np.abs(side_out - before[1]).max() > 0


@functools.cache
def collectives(distribute):
    """How many collectives a compiled step has on every step, and how many more in branches."""
    found, layers = problem()
    tx = kfe.scale_by_kfac(layers, damping=0.1, distribute=distribute)
    step = several_devices.divided(
        "shard_map", 4, lambda axis_name: several_devices.train_step(found.loss_fn, layers, tx, axis_name)
    )
    compiled = step.lower(found.params, tx.init(found.params), found.args, jax.random.key(0)).compile()
    inside = [collective.conditional for collective in hlo.collectives(compiled)]
    return inside.count(False), inside.count(True)


@pytest.mark.parametrize("distribute", [BOTH[0], pytest.param(BOTH[1], marks=pytest.mark.nightly)])
def test_collectives_stay_in_the_refresh(distribute):
    """The gathers of a refresh are inside its branch; only "inverses_and_apply" has more on every step, for the updates."""
    always, refresh = collectives("none")
    own_always, own_refresh = collectives(distribute)
    assert own_refresh > refresh
    assert (own_always > always) == (distribute == "inverses_and_apply")
    assert own_always >= always


def test_alone_is_undivided():
    """Without a mesh and without an axis, with a mesh of one, and under a `shard_map` that the taps do not know of."""
    assert devices_lib.present() == devices_lib.ALONE
    with jax.set_mesh(several_devices.mesh_of(1)):
        assert devices_lib.present() == devices_lib.ALONE
    seen = []

    def inside(x):
        seen.append((devices_lib.present(), devices_lib.present("devices").count))
        return x

    with jax.set_mesh(several_devices.mesh_of(4)):
        assert devices_lib.present().count == 4
        jax.jit(jax.shard_map(inside, in_specs=PartitionSpec("devices"), out_specs=PartitionSpec("devices")))(
            jnp.zeros(4)
        )
    assert seen
    assert all(pair == (devices_lib.ALONE, 4) for pair in seen)


def test_gradient_factors_take_the_axis_from_the_taps():
    """Factors that read no taps are divided when the step has them all the same."""
    found, layers = problem()
    tx = kfe.in_kfe(optax.scale_by_adam(), layers, basis=kfe.factors.gradient(), distribute="inverses")
    counts = []
    for pass_taps in (True, False):

        def step(params, state, batch, key, pass_taps=pass_taps):
            differentiate = kfe.value_grad_and_taps(found.loss_fn, layers, axis_name=several_devices.AXIS)
            loss, grads, taps = differentiate(params, *batch, key=key)
            loss, grads = jax.lax.pmean((loss, grads), several_devices.AXIS)
            updates, state = tx.update(grads, state, params, **({"taps": taps} if pass_taps else {}))
            return updates, state, loss

        mapped = several_devices.divided("shard_map", 2, lambda _, step=step: step)
        program = jax.make_jaxpr(mapped)(found.params, tx.init(found.params), found.args, jax.random.key(0))
        counts.append(work(program.jaxpr, "eigh", lambda d: d == 4))
    assert counts == [2, 3]


def test_misuse():
    for make in METHODS.values():
        with pytest.raises(ValueError, match="distribute must be 'none'.*'all'"):
            make(problem()[1], distribute="all")
