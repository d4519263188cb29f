"""A `shard_map` inside the loss: layers whose parameters are whole on every device have the statistics of all of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import kfe_optax as kfe

from .dense import assert_close

pytestmark = pytest.mark.release

N, T, D, CLASSES = 8, 2, 3, 4


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2)


@functools.cache
def mesh():
    """Over the axis "model" nothing is divided."""
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=types, devices=jax.devices()[:4])


def divided(function, check_vma=True):
    """`function(params, x)` on each device's share of x."""
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    return jax.shard_map(function, mesh=mesh(), check_vma=check_vma, **specs)


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def stacked(params, x):
    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(layer, x @ params["w"], params["stack"])[0]


def tokens(params, x):
    return params["table"][jnp.int32(jnp.abs(x[..., 0]) * 3)] * params["scale"]


def marked(params, x):
    return kfe.tag_dense(x, dense(params, x), params, kernel="w", bias="b")


PROGRAMS = {
    "dense": (dense, lambda: {"w": matrix(1, D, D), "b": matrix(2, D)}),
    "stacked": (stacked, lambda: {"w": matrix(1, D, D), "stack": matrix(3, 2, D, D)}),
    "tokens": (tokens, lambda: {"table": matrix(1, 9, D), "scale": matrix(2, D)}),
    "marked": (marked, lambda: {"w": matrix(1, D, D), "b": matrix(2, D)}),
}


def loss_of(apply, also_outside=False):
    def loss_fn(params, x, labels):
        h = apply(params["inside"], x)
        h = dense(params["inside"], h) if also_outside else h
        logits = h @ params["out"]
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).sum(-1).mean()

    return loss_fn


def batch():
    return matrix(6, N, T, D), jnp.asarray(np.arange(N * T).reshape(N, T) % CLASSES)


def problem(name):
    apply, make = PROGRAMS[name]
    return apply, {"inside": make(), "out": matrix(5, D, CLASSES)}


def found(loss_fn, params):
    """The layers, (loss, gradients), and each layer's A and G."""
    layers = kfe.find_layers(loss_fn, params, *batch())

    @jax.jit
    def collect(params, x, labels):
        given = {"key": jax.random.key(0)}
        *found, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, **given)
        return found, {name: taps[name].covariances() for name in layers}

    return layers, *collect(params, *batch())


@pytest.mark.parametrize("name", PROGRAMS)
def test_statistics_are_those_without_it(name, x64):
    apply, params = problem(name)
    layers, gradient, factors = found(loss_of(divided(apply)), params)
    same, expected, others = found(loss_of(apply), params)
    assert list(layers) == list(same) and not layers.rest
    assert_close(gradient, expected, 1e-12)
    for layer in layers:
        if layers[layer].kind == same[layer].kind:
            assert_close(factors[layer], others[layer], 1e-12)
        else:  # a row a position, where the examples are not known
            assert name == "tokens" and layers[layer].kind.name == "norm"


def test_a_kernel_inside_and_outside(x64):
    apply, params = problem("dense")
    layers, gradient, factors = found(loss_of(divided(apply), also_outside=True), params)
    assert set(layers) == {"inside", "out"}
    _, *expected = found(loss_of(apply, also_outside=True), params)
    assert_close((gradient, factors), tuple(expected), 1e-12)


def columns(params, x):
    """Each device along "model" has a part of the hidden units."""

    def function(w, v, x):
        return jax.lax.psum(jnp.tanh(x @ w) @ v, "model")

    specs = P(None, "model"), P("model"), P("data")
    apply = jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=P("data"))
    return apply(params["w"], params["v"], x)


@pytest.mark.parametrize(
    ("apply", "params", "reason"),
    [
        (columns, {"w": matrix(1, D, 4), "v": matrix(2, 4, D)}, "divided over devices by a shard_map"),
        (
            divided(dense, check_vma=False),
            {"w": matrix(1, D, D), "b": matrix(2, D)},
            "inside a shard_map, then",
        ),
    ],
)
def test_what_is_no_layer(apply, params, reason):
    params = {"inside": params, "out": matrix(5, D, CLASSES)}
    loss_fn = loss_of(apply)
    layers, gradient, _ = found(loss_fn, params)
    assert list(layers) == ["out"] and all(reason in own for own in layers.reasons)
    assert_close(tuple(gradient), jax.jit(jax.value_and_grad(loss_fn))(params, *batch()), 1e-6)


def test_without_a_registered_loss(x64):
    """Nobody knows how many examples there are."""
    apply, params = problem("dense")

    def loss_fn(params, x):
        return jnp.mean((divided(apply)(params["inside"], x) @ params["out"]) ** 2)

    layers = kfe.find_layers(loss_fn, params, batch()[0])
    assert "inside" not in layers and "no registered loss says how many" in layers.reasons[0]


def test_only_sampled_and_empirical_fishers(x64):
    apply, params = problem("dense")
    loss_fn = loss_of(divided(apply))
    layers = kfe.find_layers(loss_fn, params, *batch())
    with pytest.raises(ValueError, match="takes a column of all examples at once"):
        kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, *batch())
    with pytest.raises(ValueError, match="has no rows"):
        kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, *batch())[2]["inside"].rows()


def test_a_registered_loss_inside(x64):
    """It stays as it is, so that no draw reaches it: there is no layer, and it is refused."""
    _, params = problem("dense")

    def loss_fn(params, x, labels):
        def function(params, x, labels):
            logits = dense(params["inside"], x) @ params["out"]
            losses = kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jax.lax.pmean(losses.mean(), "data")

        specs = P(), P("data"), P("data")
        return jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=P())(params, x, labels)

    layers = kfe.find_layers(loss_fn, params, *batch())
    assert not layers and all("inside a shard_map" in reason for reason in layers.reasons)
    for fisher in ("sampled", "empirical"):
        collect = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher)
        with pytest.raises(
            ValueError, match="could not be reached.* a shard_map of the loss's own.* outside of that"
        ):
            collect(params, *batch(), key=jax.random.key(0))
