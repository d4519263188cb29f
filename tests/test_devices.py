"""The same training on 1, 2, 4 and 8 devices: every method, under pmap, shard_map and jit."""

from __future__ import annotations

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._jax import explicit_axes, varying_axes

from . import methods, several_devices
from .dense import assert_close
from .several_devices import AXIS, DIVIDED, EVERYWHERE, MODES

pytestmark = pytest.mark.release

STEPS = 20
QUICK = {("kfac", "shard_map", 4), ("ekfac", "pmap", 2), ("kfac", "jit", 8)}
# Every method in one of the modes, two of them in all; `benchmarks/agreement.py` runs the whole grid.
CASES = [(name, MODES[i % 3], 8) for i, name in enumerate(kfe.METHODS)]
CASES += [(name, mode, devices) for name in ("kfac", "ekfac") for mode in MODES for devices in (2, 4)]
CASES += [("kfac", mode, devices) for mode in MODES for devices in (1, 8)]
METHODS = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.nightly) for case in dict.fromkeys(CASES)
]


@functools.cache
def problem():
    base = methods.make_problem(dtype=jnp.result_type(float))
    return base, lambda params, x, y: base.loss_fn(params, x, y, 1.0)


def make_step(name, axis_name):
    base, loss_fn = problem()
    layers = kfe.find_layers(loss_fn, base.params, base.x, base.y)
    # The length of this method's update does not fall with the gradient's.
    rate = 1e-3 if name == "spectral_kfac" else 0.02
    tx = optax.chain(methods.CASES[name].having(decay=0.95).make(layers), optax.scale_by_learning_rate(rate))
    return several_devices.train_step(loss_fn, layers, tx, axis_name), tx


@functools.cache
def alone(name):
    """(parameters at the start, what follows) on one device without a word about devices."""
    base, _ = problem()
    step, tx = make_step(name, None)
    batches = several_devices.batches_of(base.x, base.y)
    return several_devices.run(jax.jit(step), base.params, tx.init(base.params), batches, STEPS)


@pytest.fixture
def fresh_problem(x64):
    """The cached runs are of one precision."""
    return problem()[0]


@pytest.mark.parametrize(("name", "mode", "devices"), METHODS)
def test_agreement(name, mode, devices, fresh_problem):
    """One step agrees with one device to 1e-10, twenty to 1e-8, sampled targets included."""
    base = fresh_problem
    step = several_devices.divided(mode, devices, lambda axis_name: make_step(name, axis_name)[0])
    state = make_step(name, None)[1].init(base.params)
    batches = several_devices.batches_of(base.x, base.y)
    # Where the first step leaves them: arrays of one device would be a compilation of their own.
    everywhere = jax.sharding.NamedSharding(several_devices.mesh_of(devices), EVERYWHERE)
    placed = jax.device_put((base.params, state), everywhere)
    found = several_devices.run(step, *placed, batches, STEPS)
    expected = alone(name)
    for steps, tolerance in ((1, 1e-10), (STEPS, 1e-8)):
        (params, loss), (theirs, their_loss) = found[steps - 1], expected[steps - 1]
        assert several_devices.difference(params, theirs, base.params) < tolerance, steps
        assert_close(loss, their_loss, tolerance)


# Losses that use the axis themselves.


def normalized(params, x, y, axis_name):
    """Two dense layers with a batch norm between them, over the whole batch."""
    hidden = kfe.tag_dense(x, x @ params["in"]["kernel"], params["in"])

    def mean(v):
        v = v.mean(0)
        return v if axis_name is None else jax.lax.pmean(v, axis_name)

    centered = hidden - mean(hidden)
    hidden = jnp.tanh(centered * jax.lax.rsqrt(mean(jnp.square(centered)) + 1e-3))
    logits = kfe.tag_dense(hidden, hidden @ params["out"]["kernel"], params["out"])
    return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def averaged(params, x, y, axis_name):
    """A loss that is one number on all devices: averaged over them inside."""
    loss = normalized(params, x, y, axis_name)
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def weighted(params, x, y, axis_name):
    """Examples weighted by a softmax over the whole batch: local sums whose mean over the devices is the loss."""
    scores = x.sum(-1)
    hidden = jnp.tanh(kfe.tag_dense(x, x @ params["in"]["kernel"], params["in"]))
    logits = kfe.tag_dense(hidden, hidden @ params["out"]["kernel"], params["out"])
    losses = kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y)
    total, devices = jnp.exp(scores).sum(), 1
    if axis_name is not None:
        total, devices = jax.lax.psum((total, 1), axis_name)
    return devices * (jnp.exp(scores) / total * losses).sum()


def own_problem():
    base, _ = problem()
    keys = jax.random.split(jax.random.key(5))
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (3, 4))},
        "out": {"kernel": jax.random.normal(keys[1], (4, 2))},
    }
    return params, base.x, base.y


@pytest.mark.parametrize(
    ("loss", "mode", "check_vma"),
    [
        (normalized, "shard_map", True),
        (averaged, "pmap", True),
        pytest.param(weighted, "shard_map", True, marks=pytest.mark.slow),
        pytest.param(averaged, "shard_map", False, marks=pytest.mark.slow),
        pytest.param(normalized, "pmap", True, marks=pytest.mark.nightly),
        pytest.param(normalized, "shard_map", False, marks=pytest.mark.nightly),
        pytest.param(averaged, "shard_map", True, marks=pytest.mark.nightly),
        pytest.param(weighted, "pmap", True, marks=pytest.mark.nightly),
        pytest.param(weighted, "shard_map", False, marks=pytest.mark.nightly),
    ],
)
def test_losses_that_name_the_axis(loss, mode, check_vma, fresh_problem):
    """Found with `axis_name`; gradients and curvature are those of the same loss on one device."""
    params, x, y = own_problem()

    def make(axis_name):
        def loss_fn(params, x, y):
            return loss(params, x, y, axis_name)

        layers = kfe.find_layers(loss_fn, params, x, y, axis_name=axis_name)
        assert list(layers) == ["in", "out"]
        return several_devices.train_step(loss_fn, layers, kfe.scale_by_kfac(layers, 0.1), axis_name)

    layers = kfe.find_layers(functools.partial(loss, axis_name=None), params, x, y)
    state = kfe.scale_by_kfac(layers, 0.1).init(params)
    key = jax.random.key(0)
    expected = jax.jit(make(None))(params, state, (x, y), key)
    found = several_devices.divided(mode, 4, make, check_vma)(params, state, (x, y), key)
    assert several_devices.difference(found[0], expected[0], params) < 1e-10
    assert_close(found[2], expected[2], 1e-12)


def test_a_loss_that_is_averaged_inside(x64):
    """Typed as one number on all devices, it has their gradients' mean for its gradient, as any other loss."""
    params, x = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.array([[1.0, 2.0], [3.0, 5.0]])

    def local(params, x):
        return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"], params)).mean()

    def loss_fn(params, x):
        return jax.lax.pmean(local(params, x), AXIS)

    layers = kfe.find_layers(loss_fn, params, x, axis_name=AXIS)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical", axis_name=AXIS)
    mapped = jax.shard_map(
        lambda params, x: jax.lax.pmean(differentiate(params, x)[1], AXIS),
        mesh=several_devices.mesh_of(2),
        in_specs=(EVERYWHERE, DIVIDED),
        out_specs=EVERYWHERE,
    )
    assert_close(jax.jit(mapped)(params, x), jax.grad(local)(params, x), 1e-12)


def of_means(params, x, y, axis_name):
    """A loss of outputs that are the same on all devices: averages over the batch's parts."""
    hidden = jnp.tanh(kfe.tag_dense(x, x @ params["in"]["kernel"], params["in"]))
    logits = kfe.tag_dense(hidden, hidden @ params["out"]["kernel"], params["out"])
    parts = logits.reshape(-1, 2, 2) if axis_name is None else logits[None]
    mean = parts.mean(0) if axis_name is None else jax.lax.pmean(parts[0], axis_name)
    labels = jnp.arange(2)
    return kfe.losses.softmax_cross_entropy_with_integer_labels(mean, labels).mean()


def test_outputs_that_are_the_same_everywhere(fresh_problem):
    """A loss of an average over the devices has the gradient that it has on one."""
    params, x, y = own_problem()
    loss_fn = functools.partial(of_means, axis_name=AXIS)
    layers = kfe.find_layers(loss_fn, params, x[:2], y[:2], axis_name=AXIS)

    def gradient(params, x, y):
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, axis_name=AXIS)
        loss, grads, taps = differentiate(params, x, y, key=jax.random.key(0))
        return jax.lax.pmean((loss, grads), AXIS), taps["in"].covariances()

    specs = (EVERYWHERE, DIVIDED, DIVIDED)
    mapped = jax.shard_map(gradient, mesh=several_devices.mesh_of(4), in_specs=specs, out_specs=EVERYWHERE)
    found, factors = jax.jit(mapped)(params, x, y)
    assert_close(found, jax.jit(jax.value_and_grad(of_means))(params, x, y, None), 1e-12)
    assert all(jnp.isfinite(factor).all() and jnp.trace(factor) > 0 for factor in factors)


def test_rows_of_one_device_are_not_those_of_all(fresh_problem):
    """Where the statistics of devices are averaged, no reduction may take the rows at hand for the whole batch."""
    params, x, y = own_problem()
    loss_fn = functools.partial(normalized, axis_name=None)
    layers = kfe.find_layers(loss_fn, params, x, y)

    def rows(params, x, y, axis_name=None):
        collect = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical", axis_name=axis_name)
        found = collect(params, x, y)[2].pulled().rows("in")
        assert (found is None) == (axis_name is not None)
        return x.mean()

    jax.eval_shape(rows, params, x, y)
    mapped = functools.partial(rows, axis_name=AXIS)
    halves = [v.reshape(2, -1, *v.shape[1:]) for v in (x, y)]
    jax.eval_shape(jax.pmap(mapped, AXIS, in_axes=(None, 0, 0), devices=jax.devices()[:2]), params, *halves)


def test_types_of_two_axes():
    """What varies over one axis is typed as varying over a further one as well."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("member", "data"))

    def inside(x):
        assert varying_axes.axes_of(x) == {"member"}
        assert varying_axes.axes_of(varying_axes.over(frozenset({"member", "data"}), x)) == {"member", "data"}
        return x

    spec = jax.sharding.PartitionSpec("member")
    jax.eval_shape(jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec), jnp.ones(4))


@pytest.mark.slow
def test_two_axes(fresh_problem):
    """The batch over both axes of a mesh, named together."""
    base, loss_fn = problem()
    layers = kfe.find_layers(loss_fn, base.params, base.x, base.y)
    tx = kfe.scale_by_ekfac(layers, 0.1, scale="batch")
    state, key = tx.init(base.params), jax.random.key(0)
    expected = jax.jit(several_devices.train_step(loss_fn, layers, tx))(
        base.params, state, (base.x, base.y), key
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("host", "chip"))
    both = jax.sharding.PartitionSpec(("host", "chip"))
    step = jax.shard_map(
        several_devices.train_step(loss_fn, layers, tx, ("host", "chip")),
        mesh=mesh,
        in_specs=(EVERYWHERE, EVERYWHERE, both, EVERYWHERE),
        out_specs=EVERYWHERE,
    )
    found = jax.jit(step)(base.params, state, (base.x, base.y), key)
    assert several_devices.difference(found[0], expected[0], base.params) < 1e-10


def test_an_axis_that_is_not_named(fresh_problem):
    """Types know that the batch differs between the devices."""
    base, loss_fn = problem()
    layers = kfe.find_layers(loss_fn, base.params, base.x, base.y)

    def gradient(params, x, y):
        return kfe.value_grad_and_taps(loss_fn, layers)(params, x, y, key=jax.random.key(0))[1]

    mapped = jax.shard_map(
        gradient,
        mesh=several_devices.mesh_of(2),
        in_specs=(EVERYWHERE, DIVIDED, DIVIDED),
        out_specs=EVERYWHERE,
    )
    with pytest.raises(ValueError, match=f"axis_name='{AXIS}'"):
        jax.jit(mapped)(base.params, base.x, base.y)


@pytest.mark.parametrize(
    "spec",
    [
        (("data", "model"), None),
        pytest.param((None, "model"), marks=pytest.mark.nightly),
        pytest.param(("model", None), marks=pytest.mark.nightly),
    ],
)
def test_divided_kernels(spec, fresh_problem):
    """Kernels divided over devices, by columns, rows (tensor parallel) or among all (FSDP), keep their place and their steps."""
    base, _ = problem()
    keys = jax.random.split(jax.random.key(3))
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (8, 8))},
        "out": {"kernel": jax.random.normal(keys[1], (8, 8))},
    }
    x = jax.random.normal(jax.random.key(4), (8, 8))

    def loss_fn(params, x, y):
        hidden = jnp.tanh(kfe.tag_dense(x, x @ params["in"]["kernel"], params["in"]))
        logits = kfe.tag_dense(hidden, hidden @ params["out"]["kernel"], params["out"])
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    layers = kfe.find_layers(loss_fn, params, x, base.y)
    step = several_devices.train_step(loss_fn, layers, kfe.scale_by_kfac(layers, 0.1))
    state, key = kfe.scale_by_kfac(layers, 0.1).init(params), jax.random.key(0)
    expected, _, _ = jax.jit(step)(params, state, (x, base.y), key)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)

    def place(names):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

    divided = jax.device_put(params, place(spec))
    batch = jax.device_put((x, base.y), place(("data",)))
    found, _, _ = jax.jit(step, out_shardings=(place(spec), None, None))(divided, state, batch, key)
    assert several_devices.difference(found, expected, params) < 1e-10
    assert found["in"]["kernel"].sharding.spec == place(spec).spec


EXPLICIT = {
    "kfac": lambda layers, mesh: kfe.scale_by_kfac(layers, 0.1),
    "kfac divided": lambda layers, mesh: kfe.shard_state(kfe.scale_by_kfac(layers, 0.1), mesh, min_size=1),
    "ekfac": lambda layers, mesh: kfe.scale_by_ekfac(layers, 0.1, scale="batch"),
    "kpsvd": lambda layers, mesh: kfe.scale_by_kpsvd(layers, 0.1),
    "two-level": lambda layers, mesh: kfe.scale_by_two_level_kfac(layers, 0.1),
    "bounded": lambda layers, mesh: optax.chain(
        kfe.spectral_kfac(0.01, layers), kfe.clip_layers(layers, 1e-3)
    ),
}


@pytest.mark.parametrize(
    ("name", "in_context"),
    [
        pytest.param(name, True, marks=[] if name in ("kfac divided", "bounded") else pytest.mark.nightly)
        for name in EXPLICIT
    ]
    + [
        pytest.param(name, False, marks=pytest.mark.slow if name == "kfac" else pytest.mark.nightly)
        for name in EXPLICIT
    ],
)
def test_explicit_axes(name, in_context, fresh_problem):
    """A mesh whose axes are of type Explicit, where every array's type says how it is divided."""
    base, loss_fn = problem()
    layers = kfe.find_layers(loss_fn, base.params, base.x, base.y)
    key, batch = jax.random.key(0), (base.x, base.y)
    plain = EXPLICIT[name.removesuffix(" divided")](layers, None)
    expected = jax.jit(several_devices.train_step(loss_fn, layers, plain))(
        base.params, plain.init(base.params), batch, key
    )
    mesh = jax.make_mesh((4,), (AXIS,), (jax.sharding.AxisType.Explicit,))
    tx = EXPLICIT[name](layers, mesh)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        whole, split = (jax.sharding.NamedSharding(mesh, spec) for spec in (EVERYWHERE, DIVIDED))
        params = jax.device_put(base.params, whole)
        state = tx.init(params)
        state = state if "divided" in name else jax.device_put(state, whole)
        step = jax.jit(several_devices.train_step(loss_fn, layers, tx))
        found = step(params, state, jax.device_put(batch, split), jax.device_put(key, whole))
    assert several_devices.difference(found[0], expected[0], base.params) < 1e-10


def test_a_loss_that_names_its_shardings():
    """The passes that an update runs again, for statistics and for the loss elsewhere, have the types that the loss was given."""
    mesh = jax.make_mesh((4,), (AXIS,), (jax.sharding.AxisType.Explicit,))
    params, x = {"kernel": jnp.ones((3, 2))}, jax.random.normal(jax.random.key(0), (8, 3))

    def loss_of(spec):
        def loss_fn(params, x):
            z = jnp.einsum("ni,io->no", x, params["kernel"], out_sharding=spec)
            return kfe.losses.l2_loss(z, jnp.ones_like(z)).mean()

        return loss_fn

    def step(loss_fn, params, x):
        layers = kfe.find_layers(loss_fn, params, x)
        tx = kfe.kfac_adaptive(layers)
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True, recompute=True)
        _, grads, taps = differentiate(params, x, key=jax.random.key(1), loss_scale=2.0)
        return tx.update(grads, tx.init(params), params, taps=taps)[0]

    plain, typed = loss_of(None), loss_of(DIVIDED)
    expected = jax.jit(lambda *given: step(plain, *given))(params, x)
    with jax.set_mesh(mesh):
        given = jax.device_put(
            (params, x), tuple(jax.sharding.NamedSharding(mesh, s) for s in (EVERYWHERE, DIVIDED))
        )
        found = jax.jit(lambda *given: step(typed, *given))(*given)
    assert_close(np.asarray(found["kernel"]), np.asarray(expected["kernel"]), 1e-5)


def test_what_is_divided_stays_divided():
    """Updates and state of parameters that the devices of an Explicit mesh have in pieces keep their types."""
    mesh = jax.make_mesh((4,), (AXIS,), (jax.sharding.AxisType.Explicit,))
    pieces = jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, DIVIDED))
    update = explicit_axes.on_any_mesh(lambda updates, state, params: (2 * updates, state + updates))
    for found in jax.eval_shape(update, pieces, pieces, pieces):
        assert found.sharding.spec == DIVIDED


class Normalized(nn.Module):
    """A model with Flax's own batch norm, over the whole batch where an axis is named."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="in", param_dtype=x.dtype)(x)
        x = nn.BatchNorm(
            use_running_average=False, axis_name=self.axis_name, name="norm", param_dtype=x.dtype
        )(x)
        return nn.Dense(2, name="out", param_dtype=x.dtype)(jnp.tanh(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "check_vma"), [pytest.param("pmap", True, marks=pytest.mark.nightly), ("shard_map", True)]
)
def test_batch_norm_of_flax(mode, check_vma, fresh_problem):
    """`nn.BatchNorm(axis_name=...)`: found outside of the map, and the step of one device on the whole batch."""
    base, _ = problem()
    variables = Normalized(None).init(jax.random.key(0), base.x)

    def make(axis_name):
        def loss_fn(params, x, y):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, _ = Normalized(axis_name).apply(state, x, mutable=["batch_stats"])
            return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        layers = kfe.find_layers(loss_fn, variables["params"], base.x, base.y, axis_name=axis_name)
        assert list(layers) == ["in", "norm", "out"]
        return several_devices.train_step(loss_fn, layers, kfe.scale_by_kfac(layers, 0.1), axis_name), layers

    whole, layers = make(None)
    params = variables["params"]
    arguments = (params, kfe.scale_by_kfac(layers, 0.1).init(params), (base.x, base.y), jax.random.key(0))
    expected, _, _ = jax.jit(whole)(*arguments)
    found, _, _ = several_devices.divided(mode, 2, lambda name: make(name)[0], check_vma)(*arguments)
    assert several_devices.difference(found, expected, params) < 1e-6
