"""Equal equations of a loss count as one use: a value that forward mode traces again for each direction is one position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import kfe_optax as kfe
from kfe_optax._tracing import merging

from .dense import assert_close
from .problems import assert_gradients_and_rows

N, D, H = 6, 2, 4
KEYS = jax.random.split(jax.random.key(0))


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2)


def problem():
    """Float64, as the caller has turned on: parameters and a batch."""
    shapes = {"in": (D, H), "mid": (H, H), "out": (H, 1)}
    params = {
        name: {"kernel": matrix(i, *shape), "bias": matrix(i + 9, shape[1])}
        for i, (name, shape) in enumerate(shapes.items())
    }
    return params, matrix(5, N, D)


class Network(nn.Module):
    activation: object

    @nn.compact
    def __call__(self, x):
        x = self.activation(nn.Dense(H, name="in", param_dtype=x.dtype)(x))
        x = self.activation(nn.Dense(H, name="mid", param_dtype=x.dtype)(x))
        return nn.Dense(1, name="out", param_dtype=x.dtype)(x)


def plain(params, x, activation):
    h = activation(x @ params["in"]["kernel"] + params["in"]["bias"])
    h = activation(h @ params["mid"]["kernel"] + params["mid"]["bias"])
    return h @ params["out"]["kernel"] + params["out"]["bias"]


def flax(params, x, activation):
    return Network(activation).apply({"params": params}, x)


def directions(x):
    return [jnp.broadcast_to(e, x.shape) for e in jnp.eye(D, dtype=x.dtype)]


def along(apply, x, e):
    return jax.jvp(lambda x: jax.jvp(apply, (x,), (e,))[1], (x,), (e,))[1]


def one_by_one(apply, x):
    return apply(x), sum(along(apply, x, e) for e in directions(x))


def all_at_once(apply, x):
    return apply(x), jax.vmap(lambda e: along(apply, x, e))(jnp.stack(directions(x))).sum(0)


def each_example(apply, x):
    return jax.vmap(lambda x: one_by_one(lambda x: apply(x[None])[0], x))(x)


def carried(kernels, x, activation):
    """(value, Laplacian), carried forward by hand.

    `kernels` hold the bias as their last row, which the value alone meets. Positions are the value, the first derivatives and
    those second ones that are not zero; of the last layer those that the loss reads.
    """
    slope_of, bend_of = jax.grad(activation), jax.grad(jax.grad(activation))
    slope_of, bend_of = jnp.vectorize(slope_of), jnp.vectorize(bend_of)

    def product(kernel, *positions):
        h = jnp.stack(positions, 1)
        unit = jnp.zeros((len(positions), 1)).at[0].set(1)
        h = jnp.concatenate([h, jnp.broadcast_to(unit, (*h.shape[:2], 1))], -1) @ kernel
        return [h[:, i] for i in range(len(positions))]

    def nonlinear(z, slopes, bends):
        first, second = slope_of(z), bend_of(z)
        bends = [first * bend + second * slope**2 for bend, slope in zip(bends, slopes, strict=True)]
        return activation(z), [first * slope for slope in slopes], bends

    z, *slopes = product(kernels["in"], x, *directions(x))
    h, slopes, bends = nonlinear(z, slopes, [0.0] * D)
    z, *rest = product(kernels["mid"], h, *slopes, *bends)
    h, _, bends = nonlinear(z, rest[:D], rest[D:])
    value, *bends = product(kernels["out"], h, *bends)
    return value, sum(bends)


ACTIVATIONS = {
    "tanh": jnp.tanh,
    "jitted, with a jit inside": jax.jit(lambda z: z + jax.nn.silu(z) * jnp.sin(z)),
}
CASES = [
    ("tanh", plain, one_by_one),
    pytest.param("tanh", plain, all_at_once, marks=pytest.mark.nightly),
    ("tanh", plain, each_example),
    pytest.param("tanh", flax, one_by_one, marks=pytest.mark.nightly),
    pytest.param("jitted, with a jit inside", plain, one_by_one, marks=pytest.mark.nightly),
    ("jitted, with a jit inside", flax, all_at_once),
]


def both(value, laplacian):
    return kfe.losses.squared_error(laplacian + 1).mean() + kfe.losses.squared_error(value).mean()


@pytest.mark.parametrize(("activation", "apply", "laplacian"), CASES)
def test_a_laplacian_has_the_factors_of_one_that_is_carried_forward(activation, apply, laplacian, x64):
    """Dangel, Müller & Zeinhofer 2024: the value once, and each derivative once."""
    (params, x), own = problem(), ACTIVATIONS[activation]

    def loss_fn(params, x):
        network = lambda x: apply(params, x, own)
        return both(*laplacian(network, x))

    def by_hand(kernels, x):
        return both(*carried(kernels, x, own))

    kernels = {name: jnp.asarray(np.vstack([p["kernel"], p["bias"]])) for name, p in params.items()}
    found = []
    for function, given in ((loss_fn, params), (by_hand, kernels)):
        layers = kfe.find_layers(function, given, x)
        assert set(layers) == set(params) and not layers.rest
        # Of single examples the first layer's derivatives are the same, and one row for all of them.
        names = [name for name in layers if laplacian is not each_example or name != "in"]

        @jax.jit
        def read(given, x, function=function, layers=layers, names=names):
            *gradients, taps = kfe.value_grad_and_taps(function, layers, fisher="exact")(given, x)
            factors = {name: taps[name].covariances() for name in names}
            return gradients, [*jax.value_and_grad(function)(given, x)], factors

        gradients, expected, factors = read(given, x)
        assert_close(gradients, expected, 1e-10)
        found.append((gradients[0], factors))
    assert_close(*found, 1e-10)


def uses_of(apply, params, x):
    """The number of uses of each layer; gradients and the law of rows are tested on the way."""

    def loss_fn(params, x):
        return kfe.losses.squared_error(apply(params, x)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert all(layer.per_example for layer in layers.values())
    assert_gradients_and_rows(loss_fn, layers, params, x)
    return {name: len(layer.uses) for name, layer in layers.items()}


@jax.custom_jvp
def doubled_slope(y):
    return jnp.sin(y)


doubled_slope.defjvp(lambda y, dy: (jnp.sin(y[0]), 2 * jnp.cos(y[0]) * dy[0]))


@jax.custom_jvp
def tripled_slope(y):
    return jnp.sin(y)


tripled_slope.defjvp(lambda y, dy: (jnp.sin(y[0]), 3 * jnp.cos(y[0]) * dy[0]))


def dropped(key, h):
    return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0)


def in_a_loop(p, x):
    def body(c, _):
        return c + jnp.tanh(c * (x @ p["w"])) * jnp.sin(x @ p["w"]), None

    return jax.lax.scan(body, jnp.ones((N, H), x.dtype), None, length=3)[0]


TWICE = {
    "the same product": (lambda p, x: jnp.tanh(x @ p["w"]) + jnp.sin(x @ p["w"]), {"w": 1}),
    "the same product, the other way round": (
        lambda p, x: jnp.sin(jnp.exp(x) * x @ p["w"]) + jnp.tanh(x * jnp.exp(x) @ p["w"]),
        {"w": 1},
    ),
    "the same product, with something that is no bias added once": (
        lambda p, x: jnp.tanh(x @ p["w"] + x[:, :1]) + jnp.sin(x @ p["w"]),
        {"w": 1},
    ),
    "inputs that differ": (lambda p, x: jnp.tanh(x @ p["w"]) + jnp.sin((x + 1) @ p["w"]), {"w": 2}),
    "a product with its bias and one without": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) + jnp.sin(x @ p["w"]),
        {"w": 2},
    ),
    "one that is stopped": (
        lambda p, x: jnp.tanh(x @ p["w"]) + jax.lax.stop_gradient(jnp.sin(x @ p["w"])),
        {"w": 1},
    ),
    "two calls": (
        lambda p, x: (lambda f: f(p["w"], x) + jnp.sin(f(p["w"], x)))(jax.jit(lambda w, x: jnp.tanh(x @ w))),
        {"w": 1},
    ),
    "a call whose two operands are the same": (
        lambda p, x: jax.jit(lambda a, b: jnp.tanh(a @ p["w"]) + jnp.sin(b @ p["w"]))(x, x),
        {"w": 1},
    ),
    "in a checkpoint": (
        jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]) + jnp.sin(x @ p["w"])),
        {"w": 1},
    ),
    "in a branch": (
        lambda p, x: jax.lax.cond(
            x[0, 0] < 9, lambda: jnp.tanh(x @ p["w"]) + jnp.sin(x @ p["w"]), lambda: jnp.zeros((N, H))
        ),
        {"w": 1},
    ),
    "in a loop": (in_a_loop, {"w": 1}),
    "behind the same mask": (
        lambda p, x: dropped(KEYS[0], jnp.sin(x)) @ p["w"] + jnp.sin(dropped(KEYS[0], jnp.sin(x)) @ p["w"]),
        {"w": 1},
    ),
    "behind masks of two keys": (
        lambda p, x: dropped(KEYS[0], jnp.sin(x)) @ p["w"] + jnp.sin(dropped(KEYS[1], jnp.sin(x)) @ p["w"]),
        {"w": 2},
    ),
    "behind functions with derivatives of their own": (
        lambda p, x: (doubled_slope(x @ p["w"]) + 1) @ p["v"] + (tripled_slope(x @ p["w"]) + 1) @ p["v"],
        {"w": 1, "v": 2},
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_use_that_is_repeated(name, x64):
    apply, expected = TWICE[name]
    params = {"w": matrix(1, D, H), "b": matrix(2, H), "v": matrix(3, H, H)}
    params = {
        own: params[own] for own in sorted(params) if own in {*expected, "b" if "bias and" in name else "w"}
    }
    assert uses_of(apply, params, matrix(5, N, D)) == expected


def test_a_module_that_is_called_twice_on_the_same_input(x64):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(H, param_dtype=x.dtype)
            return jnp.tanh(dense(x)) + jnp.sin(dense(x))

    model, x = Twice(), matrix(5, N, D)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    assert uses_of(lambda params, x: model.apply({"params": params}, x), params, x) == {"Dense_0": 1}


def test_a_program_without_equal_equations_stays_as_it_is():
    def loss(params, x):
        layer = jax.checkpoint(lambda h, w: (jax.nn.gelu(h @ w), None))
        h = jax.lax.scan(layer, jnp.tanh(x @ params["in"]), params["stack"])[0]
        return jax.nn.log_softmax(jax.jit(jnp.matmul)(h, params["out"])).mean()

    params = {"in": jnp.ones((D, H)), "stack": jnp.ones((2, H, H)), "out": jnp.ones((H, 3))}
    leaves, tree = jax.tree.flatten(params)
    program = jax.make_jaxpr(lambda leaves, x: loss(jax.tree.unflatten(tree, leaves), x))(
        leaves, jnp.ones((N, D))
    )
    assert merging.merged(program, len(leaves)) is program


def test_what_is_called_outside_is_called_as_often():
    def function(x):
        draw = lambda: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), x.dtype), x)
        jax.debug.callback(print, x)
        jax.debug.callback(print, x)
        return draw() + draw()

    program = jax.make_jaxpr(function)(1.0)
    assert merging.merged(program) is program
