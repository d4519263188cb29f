"""Scales that are multiplied with data before the layer's input is: x (m γ) is (x m) γ, as norms have it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from .dense import assert_close

N, D = 5, 3


def deviation(x):
    return jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)


def scaled(x, scale):
    return x * (deviation(x) * scale)


def vector(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + 1)


# name: (parameters, the output)
FOUND = {
    "shift": ([(D,), (D,)], lambda p, x: scaled(x, p[0]) + p[1]),
    "row": ([(1, D)], lambda p, x: scaled(x, p[0])),
    "cast": ([(D,)], lambda p, x: x * (deviation(x) * p[0]).astype(jnp.float32).astype(x.dtype)),
    "number": ([(D,)], lambda p, x: x * (2 * (deviation(x) * p[0]))),
    "jit": ([(D,)], lambda p, x: jax.jit(jnp.multiply)(x, deviation(x) * p[0])),
    "checkpoint": ([(D,)], lambda p, x: jax.checkpoint(scaled)(x, p[0])),
    "loop": (
        [(D,)],
        lambda p, x: jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(scaled(h, p[0])), x),
    ),
    "stack": (
        [(2, D)],
        lambda p, x: jax.lax.scan(lambda h, own: (jnp.tanh(scaled(h, own)), None), x, p[0])[0],
    ),
    "members": (
        [(2, D)],
        lambda p, x: jax.vmap(scaled, (0, 0), 1)(jnp.stack([x, 2 * x**2]), p[0]).reshape(len(x), -1),
    ),
    "stack of members": (
        [(3, 2, D)],
        lambda p, x: jnp.moveaxis(
            jax.lax.scan(
                lambda h, own: (jnp.tanh(jax.vmap(scaled)(h, own)), None), jnp.stack([x, 2 * x**2]), p[0]
            )[0],
            0,
            1,
        ).reshape(len(x), -1),
    ),
    "each": ([(D,), (D,)], lambda p, x: jax.vmap(lambda x: scaled(x, p[0]) + p[1])(x)),
    "twice": ([(D,)], lambda p, x: scaled(x, p[0]) + jnp.square(x) * p[0]),
    "added": ([(D,)], lambda p, x: x[:, ::-1] + deviation(x) * p[0]),
}


@pytest.fixture(scope="module")
def found():
    """(layers, taps, each example's gradient) of all of them in one loss."""
    with jax.enable_x64(True):
        params = {
            name: [vector(i, *shape) for shape in shapes]
            for i, (name, (shapes, _)) in enumerate(FOUND.items())
        }
        x = vector(9, N, D)

        def loss_fn(params, x):
            outputs = (apply(params[name], x) for name, (_, apply) in FOUND.items())
            return sum(kfe.losses.squared_error(y).sum(-1) for y in outputs).mean()

        layers = kfe.find_layers(loss_fn, params, x)
        collect = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
        _, grads, taps = jax.jit(collect)(params, x)
        assert_close(grads, jax.jit(jax.grad(loss_fn))(params, x), 1e-12)
        each = jax.jit(jax.vmap(lambda x: jax.grad(loss_fn)(params, x[None])))(x)
        yield layers, taps, each


@pytest.mark.parametrize("name", FOUND)
def test_law_of_rows(name, found, x64):
    layers, taps, each = found
    (layer,) = (own for key, own in layers.items() if key.split("/")[0] == name)
    assert layer.kind.name == "norm"
    assert {path for _, path in layer.paths} == {(name, i) for i in range(len(FOUND[name][0]))}
    expected = jax.vmap(layer.to_matrix)(each)
    rows = jnp.moveaxis(taps[layer.name].example_gradients(), -3, 0)
    assert_close(rows.reshape(expected.shape), expected, 1e-6 if name == "cast" else 1e-12)


def test_a_number_for_each_example_is_no_layer(x64):
    """A vector that is indexed by classes."""
    params, x = {"w": vector(0, D, D), "t": vector(1, D)}, vector(9, N, D)

    def loss_fn(params, x):
        y = x @ params["w"] * params["t"][jnp.arange(N) % D][:, None]
        return kfe.losses.squared_error(y).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert list(layers) == ["w"]
    assert "no supported layer reads it (gather" in layers.reasons[0]


PRODUCTS = {
    "a temperature": lambda p, x: x * p["one"] * p["g"],
    "two scales": lambda p, x: x * p["g"] * p["h"],
    "a scale in a branch that starts at zero": lambda p, x: p["one"] * (x * p["g"]),
    "a mask behind it": lambda p, x: x * p["g"] * (x > 0),
    "numbers for the features behind it": lambda p, x: deviation(x) * p["g"] * jnp.arange(1.0, D + 1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_several(name, x64):
    """A scale that is multiplied once more, with whatever, keeps its own use; its rows are those of its examples."""
    params, x = {"g": vector(1, D), "h": vector(2, D), "one": vector(3)}, vector(9, N, D)

    def loss_fn(params, x):
        return kfe.losses.squared_error(PRODUCTS[name](params, x)).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert layers["g"].kind.name == "norm"
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)
    assert_close(grads, jax.jit(jax.grad(loss_fn))(params, x), 1e-12)
    each = jax.vmap(lambda x: jax.grad(loss_fn)(params, x[None])["g"])(x)
    assert_close(taps["g"].example_gradients().reshape(D, N).T, each, 1e-12)
