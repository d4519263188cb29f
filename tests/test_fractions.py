"""Curvature from a part of the batch: every k-th example, as if the others were like it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import several_devices
from .dense import assert_close
from .methods import CASES, quick

N, PARTS = 8, 4
KEY = jax.random.key(3)
# Which part this key chooses.
NUMBER = int(jax.random.bits(KEY, (2,), jnp.uint32)[0] % PARTS)


def loss_fn(params, x, labels, weight=0.3):
    """A mean of one loss and a sum of another: a part stands for all of both."""
    z = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]
    mean = kfe.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()
    return mean + weight * kfe.losses.l2_loss(z, jnp.ones_like(z)).sum()


@functools.cache
def given():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        kernel = jax.random.normal(keys[1], (3, 5), jnp.float64)
        params = {
            # Not weakly typed, which would compile each step twice.
            "in": {"kernel": kernel, "bias": jnp.full(5, 0.1, jnp.float64)},
            "out": {"kernel": jax.random.normal(keys[2], (5, 2), jnp.float64)},
        }
        batch = jax.random.normal(keys[0], (N, 3), jnp.float64), jnp.arange(N) % 2
        return params, batch, kfe.find_layers(loss_fn, params, *batch)


def taps_of(batch=None, row_mask=None, **options):
    params, whole, layers = given()
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, **options)
    return differentiate(params, *(whole if batch is None else batch), key=KEY, row_mask=row_mask)


@pytest.mark.parametrize("fisher", [pytest.param("sampled", marks=pytest.mark.release), "empirical", "exact"])
def test_rows_are_those_of_every_kth_example(x64, fisher):
    """With the draws that these examples have in the whole batch, and the weights that their losses have there."""
    *expected, whole = taps_of(fisher=fisher)
    *found, part = taps_of(fisher=fisher, statistics_fraction=1 / PARTS)
    assert_close(found, expected, 1e-14)
    assert_close(part.gradient_weight, whole.gradient_weight, 1e-14)
    for name in given()[2]:
        a, g = whole[name].rows()
        assert_close(part[name].rows(), (a[NUMBER::PARTS], g[..., NUMBER::PARTS, :, :]), 1e-12)
        assert part.layers[name].examples == N // PARTS
        assert_close(part.examples_of(name), N)


def test_another_key_takes_another_part(x64):
    params, (x, labels), layers = given()
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, statistics_fraction=1 / PARTS)
    found = set()
    for i in range(12):
        taps = differentiate(params, x, labels, key=jax.random.key(i))[2]
        first = np.asarray(taps["in"].rows()[0][0, 0, :3])
        found.add(int(np.argmin(np.abs(np.asarray(x) - first).sum(1))))
    assert found == set(range(PARTS))


def test_with_microbatches_and_row_masks(x64):
    """The gradient in two parts, the statistics from one of four, its padded examples left out."""
    mask = jnp.arange(N) % 3 > 0
    options = {"statistics_fraction": 1 / PARTS, "row_mask": mask}
    whole, parts = taps_of(**options), taps_of(microbatches=2, **options)
    live = mask[NUMBER::PARTS]
    a, _ = whole[2]["in"].rows()
    assert_close(a[~live], jnp.zeros_like(a[~live]))
    # The loss that microbatches take is the mean of theirs: of the sum it has half.
    params, batch, layers = given()
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, statistics_fraction=1 / PARTS)
    halved = differentiate(params, *batch, 0.15, key=KEY, row_mask=mask)
    assert_close(parts[0], halved[0], 1e-12)
    assert_close(parts[2]["in"].rows(), halved[2]["in"].rows(), 1e-12)


@pytest.mark.parametrize("statistics", [1, 2])
def test_products_with_the_fisher(x64, statistics):
    """vᵀF v of every k-th example, as many times as there are such parts in a sum; the loss elsewhere is that of all."""
    params, (x, labels), _ = given()
    v = jax.tree.map(jnp.cos, params)
    fractions = {"products_fraction": 0.5, "statistics_fraction": 1 / statistics}
    loss, _, taps = taps_of(quadratic_model=True, **fractions)
    number = int(jax.random.bits(KEY, (2,), jnp.uint32)[0] % 2)

    def outputs(params):
        own = x[number::2]
        return jnp.tanh(own @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]

    @jax.jit
    def expected(params, v):
        z, tangent = jax.jvp(outputs, (params,), (v,))
        p = jax.nn.softmax(z)
        curvature = (p * tangent**2).sum(-1) - (p * tangent).sum(-1) ** 2
        return curvature.mean() + 0.3 * 2 * (tangent**2).sum()

    @jax.jit
    def found(taps, v, moved):
        return taps.fisher_products(taps.tangent(v))[0, 0], taps.loss_at(moved)

    moved = jax.tree.map(lambda p: p + 0.1, params)
    product, elsewhere = found(taps, v, moved)
    assert_close(product, expected(params, v), 1e-12)
    assert_close(taps.loss, loss, 1e-14)
    assert_close(elsewhere, jax.jit(loss_fn)(moved, x, labels), 1e-12)
    assert taps.layers["in"].examples == N // statistics


def mean_loss(params, x, labels):
    z = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]
    return kfe.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()


@pytest.mark.parametrize("name", quick("kfac", "ekfac"))
def test_every_method_steps_as_with_all_examples(x64, name):
    """Where they are alike: a batch of copies, of which each part has one of each."""
    params, (x, labels), _ = given()
    batch = jnp.repeat(x[:4], 2, 0), jnp.repeat(labels[:4], 2)
    layers = kfe.find_layers(mean_loss, params, *batch)

    def steps(fraction):
        tx = optax.chain(CASES[name].make(layers), optax.scale(-0.1))
        differentiate = kfe.value_grad_and_taps(
            mean_loss, layers, fisher="exact", statistics_fraction=fraction
        )

        @jax.jit
        def step(params, state, key):
            _, grads, taps = differentiate(params, *batch, key=key)
            updates, state = tx.update(grads, state, params, taps=taps)
            return optax.apply_updates(params, updates), state

        now, state = params, tx.init(params)
        for i in range(3):
            now, state = step(now, state, jax.random.key(i))
        return now

    assert_close(steps(0.5), steps(1.0), 1e-8)


@pytest.mark.release
@pytest.mark.parametrize(
    "mode", [*several_devices.MODES[:1], pytest.param("shard_map", marks=pytest.mark.slow)]
)
def test_devices(mode):
    """Each of two devices takes its part of its examples: together those that one device takes."""
    params, (x, labels), _ = given()
    params, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, x))
    labels = jnp.asarray(labels, jnp.int32)
    layers = kfe.find_layers(mean_loss, params, x, labels)

    def make(axis_name):
        differentiate = kfe.value_grad_and_taps(
            mean_loss, layers, statistics_fraction=0.5, axis_name=axis_name
        )

        def read(params, state, batch, key):
            taps = differentiate(params, *batch, key=key)[2]
            return taps["in"].covariances(), state, jnp.zeros(())

        return read

    found = several_devices.divided(mode, 2, make)(params, (), (x, labels), KEY)[0]
    assert_close(found, jax.jit(make(None))(params, (), (x, labels), KEY)[0], 1e-5)


def test_adaptive_damping_trains_on_parts(x64):
    params, batch, _ = given()
    layers = kfe.find_layers(mean_loss, params, *batch)
    tx = kfe.kfac_adaptive(layers)
    differentiate = kfe.value_grad_and_taps(
        mean_loss, layers, quadratic_model=True, statistics_fraction=0.25, products_fraction=0.5
    )

    @jax.jit
    def step(params, state, key):
        loss, grads, taps = differentiate(params, *batch, key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for i in range(8):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics_fraction": 0.3}, "statistics_fraction is a part of the batch, 1/k"),
        ({"statistics_fraction": 2}, "such as 1/8, not 2"),
        ({"statistics_fraction": 0}, "not 0"),
        ({"statistics_fraction": True}, "not True"),
        (
            {"statistics_fraction": 1 / 3},
            "statistics_fraction=0.333333: a batch of 8 examples has no 3 equal parts",
        ),
        ({"products_fraction": 0.5}, "products_fraction is about the products"),
        ({"statistics_fraction": 0.5, "batch_arguments": "labels"}, "names 'labels', which is no argument"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        taps_of(**options)
