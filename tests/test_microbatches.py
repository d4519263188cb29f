"""A batch in parts: the same loss, gradients, statistics and steps, whatever their number."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfe_optax as kfe
from kfe_optax._jax import static_values
from kfe_optax._taps import microbatches

from . import problems, several_devices
from .dense import assert_close


@functools.cache
def base():
    problem = problems.make("plain")
    return problem, problem.layers()


@pytest.fixture
def given(x64):
    return base()


def collect(given, fisher="sampled", microbatches=1, **options):
    problem, layers = given
    options = {"num_samples": 2 if fisher == "sampled" else 1, **options}
    differentiate = kfe.value_grad_and_taps(
        problem.loss_fn, layers, fisher=fisher, microbatches=microbatches, **options
    )
    return differentiate(problem.params, *problem.args, key=jax.random.key(3))


@pytest.mark.release
@pytest.mark.parametrize(
    "fisher", ["sampled", *(pytest.param(f, marks=pytest.mark.nightly) for f in ("exact", "empirical"))]
)
def test_statistics(fisher, given):
    """Loss, gradients, A and G, S and the loss's weights are those of the whole batch, draws included."""
    _, layers = given
    loss, grads, taps = collect(given, fisher)
    for k in (4,):
        loss_k, grads_k, taps_k = collect(given, fisher, k)
        assert_close((loss_k, grads_k), (loss, grads), 1e-12)
        for name in layers:
            assert_close(taps_k[name].covariances(), taps[name].covariances(), 1e-12)
            assert_close(
                taps_k[name].second_moment_in(None, None), taps[name].second_moment_in(None, None), 1e-12
            )
        assert_close(taps_k.gradient_weight, taps.gradient_weight, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [pytest.param(kfe.scale_by_kpsvd, marks=pytest.mark.nightly), kfe.scale_by_ekfac]
)
def test_steps(make, given):
    """Whole steps, the refresh inside the transformation included."""
    problem, layers = given
    tx = make(layers, 0.1)
    state = tx.init(problem.params)
    batches = several_devices.batches_of(*problem.args)

    def steps(k):
        step = several_devices.train_step(problem.loss_fn, layers, tx, size=-0.02, microbatches=k)
        return several_devices.run(jax.jit(step), problem.params, state, batches, 3)

    whole, parts = steps(1), steps(4)
    assert several_devices.difference(parts[-1][0], whole[-1][0], problem.params) < 1e-9


@pytest.mark.release
@pytest.mark.parametrize("mode", ["shard_map", pytest.param("jit", marks=pytest.mark.nightly)])
def test_on_several_devices(mode, given):
    """Each device's share in parts; the draws follow the global example."""
    problem, layers = given
    tx = kfe.scale_by_kfac(layers, 0.1)
    arguments = (problem.params, tx.init(problem.params), problem.args, jax.random.key(1))
    expected = jax.jit(several_devices.train_step(problem.loss_fn, layers, tx))(*arguments)
    step = several_devices.divided(
        mode,
        2,
        lambda axis_name: several_devices.train_step(problem.loss_fn, layers, tx, axis_name, microbatches=2),
    )
    found = step(*arguments)
    assert several_devices.difference(found[0], expected[0], problem.params) < 1e-10


@pytest.mark.slow
def test_quadratic_model(given):
    """The loss elsewhere, and vᵀF v."""
    problem, _ = given
    _, grads, taps = collect(given, quadratic_model=True)
    _, _, parts = collect(given, quadratic_model=True, microbatches=4)
    there = jax.tree.map(lambda p, g: p - 0.3 * g, problem.params, grads)
    assert_close(parts.loss, taps.loss, 1e-12)
    assert_close(parts.loss_at(there), taps.loss_at(there), 1e-12)
    whole = taps.tangent(grads), taps.tangent(problem.params)
    split = parts.tangent(grads), parts.tangent(problem.params)
    assert_close(parts.fisher_products(*split), taps.fisher_products(*whole), 1e-10)


@pytest.mark.release
def test_memory():
    """The activations of a part alone: what a compiled step needs besides its arguments falls."""
    x = jnp.ones((1024, 16))
    params = [{"kernel": jnp.ones((16, 16))} for _ in range(6)]

    def loss_fn(params, x):
        for layer in params:
            x = jnp.tanh(kfe.tag_dense(x, x @ layer["kernel"], layer))
        return kfe.losses.l2_loss(x).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    tx = kfe.scale_by_kfac(layers, 0.1)

    def needed(k):
        step = several_devices.train_step(loss_fn, layers, tx, microbatches=k)
        lowered = jax.jit(step).lower(params, tx.init(params), (x,), jax.random.key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert needed(8) < needed(1) / 2


@pytest.mark.release
def test_half_precision():
    """Gradients in bfloat16 are added up in float32."""
    x = jnp.ones((64, 1), jnp.bfloat16)
    params = {"kernel": jnp.ones((1, 1), jnp.bfloat16)}

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.squared_error(z).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    _, grads, _ = kfe.value_grad_and_taps(loss_fn, layers, microbatches=64)(params, x, key=jax.random.key(0))
    assert grads["kernel"].dtype == jnp.bfloat16
    assert float(grads["kernel"][0, 0]) == 2.0


def test_aux_and_named_arguments(given):
    """`aux` is stacked; what holds no examples is named by leaving it out."""
    problem, _ = given
    shift = jnp.arange(3.0)

    def loss_fn(params, x, shift, labels):
        return problem.loss_fn(params, x, labels), shift.sum() + labels

    found = kfe.find_layers(loss_fn, problem.params, problem.args[0], shift, problem.args[1], has_aux=True)
    differentiate = functools.partial(kfe.value_grad_and_taps, loss_fn, found, has_aux=True, microbatches=2)
    x, y = problem.args
    with pytest.raises(ValueError, match=r"size 8 in argument 1 and 3 in argument 2.*batch_arguments=\(1,\)"):
        differentiate()(problem.params, x, shift, y, key=jax.random.key(0))
    (_, aux), *_ = differentiate(batch_arguments=(1, "labels"))(
        problem.params, x, shift, labels=y, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(aux, 3 + y.reshape(4, 2).T)


def test_flattened_outputs(given):
    """Draws follow the example where the loss sees examples and positions in one axis."""
    problem, _ = given
    x = jax.random.normal(jax.random.key(0), (8, 3, 3))
    labels = jnp.arange(24) % 2

    def loss_fn(params, x, labels):
        hidden = x.reshape(-1, 3)
        for layer in params:
            hidden = kfe.tag_dense(hidden, hidden @ layer["kernel"] + layer["bias"], layer)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(hidden, labels.reshape(-1)).mean()

    layers = kfe.find_layers(loss_fn, problem.params, x, labels.reshape(8, 3))

    def covariances(k):
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, microbatches=k)
        _, _, taps = differentiate(problem.params, x, labels.reshape(8, 3), key=jax.random.key(0))
        return taps[next(iter(layers))].covariances()

    assert_close(covariances(4), covariances(1), 1e-12)


def test_a_row_mask(given):
    """Every part has its rows of the mask."""
    problem, layers = given
    mask = jnp.array([1, 1, 0, 0, 1, 1, 0, 0])

    def covariances(k):
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, microbatches=k)
        _, _, taps = differentiate(problem.params, *problem.args, key=jax.random.key(0), row_mask=mask)
        return taps[next(iter(layers))].covariances()

    assert_close(covariances(2), covariances(1), 1e-12)


class Noisy(nnx.Module):
    """A model whose state moves in each call."""

    def __init__(self):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.dense(self.dropout(self.norm(x)))


class Sowing(Noisy):
    """A model that keeps its outputs."""

    def __call__(self, x):
        y = super().__call__(x)
        self.seen = nnx.Intermediate(y)
        return y


@pytest.mark.release
def test_an_nnx_module_that_gains_state():
    """Values that a call adds have no place in the next part's state."""
    x, y = problems.make("nnx").args

    def loss_fn(model, x, y):
        return kfe.losses.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    model = Sowing()
    layers = kfe.find_layers(loss_fn, model, x, y)
    with pytest.raises(ValueError, match="take such values out with has_aux"):
        kfe.value_grad_and_taps(loss_fn, layers, microbatches=2)(model, x, y, key=jax.random.key(0))


@pytest.mark.release
def test_the_state_of_an_nnx_module():
    """It moves from part to part, as in as many calls; the refresh meets each part with the state that it had."""
    x, y = problems.make("nnx").args

    def loss_fn(model, x, y):
        return kfe.losses.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    model, other = Noisy(), Noisy()
    layers = kfe.find_layers(loss_fn, model, x, y)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical", microbatches=2)(model, x, y)
    found = [
        kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(other, x[part::2], y[part::2])
        for part in (0, 1)
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, found[0][1], found[1][1])
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(mean), 1e-6)
    assert_close(
        jax.tree.leaves(nnx.state(model, nnx.BatchStat)),
        jax.tree.leaves(nnx.state(other, nnx.BatchStat)),
        1e-6,
    )
    pairs = [part[2]["dense"].covariances() for part in found]
    assert_close(
        taps["dense"].covariances(), jax.tree.map(lambda a, b: (a + b) / 2, pairs[0], pairs[1]), 1e-6
    )


@pytest.mark.release
def test_keywords_hold_examples_by_their_names():
    """Whatever the order of the call: JAX sorts keywords by name."""
    given = {"x": jnp.ones((4, 2)), "table": jnp.ones((3, 5))}
    flags = microbatches.flags({"microbatches=2": 2}, ("x",), None, (), given, None)
    arrays, _ = static_values.split_static((None, (), given))
    assert [a.shape for a, is_batch in zip(arrays, flags, strict=True) if is_batch] == [(4, 2)]


def test_misuse(given):
    """What cannot be split, and what parts do not keep."""
    _, layers = given
    name = next(iter(layers))
    with pytest.raises(ValueError, match="a batch of 8 examples has no 3 equal"):
        collect(given, microbatches=3)
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="positive whole number"):
            collect(given, microbatches=wrong)
    with pytest.raises(ValueError, match="names 'weigth', which is no argument"):
        collect(given, microbatches=2, batch_arguments=(1, "weigth"))
    problem, _ = given
    with pytest.raises(ValueError, match=r"row_mask has shape \(7,\), but the batch 8 examples"):
        kfe.value_grad_and_taps(problem.loss_fn, layers, microbatches=2)(
            problem.params, *problem.args, key=jax.random.key(0), row_mask=jnp.ones(7)
        )
    *_, taps = collect(given, "empirical", microbatches=2)
    with pytest.raises(ValueError, match="leave microbatches at 1"):
        taps[name].rows()


def test_multi_steps_count(given):
    """Under `optax.MultiSteps` the inner count stands still between real steps: one refresh a real step."""
    problem, layers = given
    tx = optax.MultiSteps(kfe.scale_by_kfac(layers, 0.1, inverse_update_period=2, initial_refreshes=0), 2)
    update = jax.jit(tx.update)
    state, seen = tx.init(problem.params), []
    for t in range(8):
        _, grads, taps = collect(given, "empirical", num_samples=1)
        grads = jax.tree.map(lambda g, t=t: g * (t + 1), grads)
        _, state = update(grads, state, problem.params, taps=taps)
        inner = state.inner_opt_state
        seen.append((int(inner.count), int(inner.method.last_refresh), int(inner.method.factors.updates)))
    assert seen == [(0, -1, 0), (1, 0, 1), (1, 0, 1), (2, 0, 1), (2, 0, 1), (3, 2, 1), (3, 2, 1), (4, 2, 1)]
