"""What tags must see of a parameter: all of its gradient that comes from examples, each part with the right rows, or none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import kfe_optax as kfe

from .problems import assert_gradients_and_rows
from .test_tracing import LABELS, D, N, X, matrix

MASK = matrix(9, D, 3) > 0
TOKENS = jnp.argsort(X, -1) * 3 - 2  # some below 0, some above 6


@jax.custom_vjp
def reversed_gradient(y):
    return y


reversed_gradient.defvjp(lambda y: (y, None), lambda _, g: (-g,))


def image(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x.reshape(-1, 2, 2, 1), kernel, (1, 1), "SAME", dimension_numbers=numbers
    )


def read_by_a_loop(p, x):
    y = x @ p["w"]
    loop = jax.lax.scan(lambda h, _: (h + jnp.sin(y), None), jnp.zeros_like(y), None, length=2)
    return jnp.tanh(y + p["b"]) + loop[0]


def read_by_a_branch(p, x):
    y = x @ p["w"]
    return jax.lax.cond(x[0, 0] > -100, lambda: y, lambda: jnp.sin(x[:, :3])) + jnp.tanh(y + p["b"])


def read_behind_a_loop(p, x):
    def layer(h, w):
        y = h @ w[0]
        return jnp.tanh(y + w[1]), y

    h, before = jax.lax.scan(layer, x, (p["w"], p["b"]))
    return (h + before.sum(0)) @ p["o"]


def carried(p, x):
    steps = jax.lax.scan(lambda c, _: ((jnp.tanh(c[0]), 2 * c[1]), None), (x, p["w"]), None, length=2)[0]
    return steps[0] @ steps[1] + jnp.sin(x) @ p["w"]


def tied(p, x):
    h = jnp.tanh(p["t"][jnp.argsort(x, -1)]).mean(1)
    return (h @ p["t"].T + p["b"])[:, :3]


W, B, SQUARE, TABLE = matrix(1, D, 3), matrix(2, 3), matrix(3, D, D), matrix(4, 7, 5)
DEEP = {"w": matrix(1, 2, D, D), "b": matrix(2, 2, D), "o": W}

# {name: (parameters, network, the layers' shapes)}
CASES = {
    # A second use that no rule knows.
    "the kernel's sine": ({"w": W}, lambda p, x: x @ p["w"] + jnp.sin(x) @ jnp.sin(p["w"]), {}),
    "the second of a concatenation": (
        {"a": SQUARE, "w": W},
        lambda p, x: x @ p["w"] + (x @ jnp.concatenate([p["a"], p["w"]], 1))[:, -3:],
        {},
    ),
    "latents through the same kernel": (
        {"z": matrix(5, 2, D), "w": SQUARE, "o": W},
        lambda p, x: (jnp.tanh(x @ p["w"]) + jnp.tanh(p["z"] @ p["w"]).mean(0)) @ p["o"],
        {"o": (D, 3)},
    ),
    "a kernel that is masked": (
        {"w": W},
        lambda p, x: x @ jnp.where(MASK, p["w"], 0) + jnp.sin(x) @ p["w"],
        {},
    ),
    "a choice between two kernels": (
        {"w": W, "v": matrix(6, D, 3)},
        lambda p, x: x @ jax.lax.cond(x[0, 0] > 9, lambda: p["v"], lambda: p["w"]) + jnp.sin(x) @ p["w"],
        {},
    ),
    "a kernel in a carry": ({"w": W}, carried, {}),
    "a kernel as it is and divided by its norm": (
        {"w": W},
        lambda p, x: x @ p["w"] + jnp.sin(x) @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)),
        {},
    ),
    # What is no second use.
    "a kernel that is cut to whole numbers": (
        {"w": 9 * W},
        lambda p, x: x @ p["w"] + jnp.sin(x) @ p["w"].astype(int).astype(x.dtype),
        {"w": (D, 3)},
    ),
    "a metric that is stopped": (
        {"w": W, "b": B},
        lambda p, x: x @ p["w"] + p["b"] + 0 * jax.lax.stop_gradient(jnp.maximum(p["b"], x[:, :3]).sum()),
        {"w": (D + 1, 3)},
    ),
    # Signs, and rows out of bounds.
    "one minus the kernel": (
        {"w": W, "b": B},
        lambda p, x: x @ (1 - p["w"]) + jnp.sin(x) @ (2 * p["w"]) + p["b"],
        {"w": (D + 1, 3)},
    ),
    "axes that a reshape moves": (
        {"w": matrix(1, 5, D), "b": matrix(2, 5), "o": matrix(3, 5, 3)},
        lambda p, x: (
            jnp.tanh(jax.lax.reshape(x @ jax.lax.reshape(p["w"], (D, 5), (1, 0)), (5, N), (1, 0)).T + p["b"])
            @ p["o"]
        ),
        {"w": (D + 1, 5), "o": (5, 3)},
    ),
    "scales with axes of size 1": (
        {"s": matrix(1, 1, D), "b": matrix(2, 1, D), "t": matrix(3, 2, 1, 1), "o": W},
        lambda p, x: jnp.tanh((x * p["s"] + p["b"]).reshape(-1, 2, 2, 1) * p["t"]).reshape(-1, D) @ p["o"],
        {"s": (D, 1, 2), "t": (2, 1, 1), "o": (D, 3)},
    ),
    "a table that is read at its ends": (
        {"t": TABLE, "o": matrix(5, 5, 3)},
        lambda p, x: jnp.tanh(jnp.take(p["t"], TOKENS, axis=0, mode="clip")).mean(1) @ p["o"],
        {"t": (7, 5), "o": (5, 3)},
    ),
    "a table that is read one number at a time": (
        {"t": TABLE, "o": matrix(5, 5, 3)},
        lambda p, x: jnp.tanh(jax.vmap(jax.vmap(lambda i: p["t"][i]))(TOKENS)).mean(1) @ p["o"],
        {"t": (7, 5), "o": (5, 3)},
    ),
    # The homogeneous coordinate.
    "an output that a loop reads": ({"w": W, "b": B}, read_by_a_loop, {"w": (D, 3)}),
    "an output that a branch returns": ({"w": W, "b": B}, read_by_a_branch, {"w": (D, 3)}),
    "an output that a loop returns": (DEEP, read_behind_a_loop, {"w": (2, D, D), "o": (D, 3)}),
    "a bias behind a function with a derivative of its own": (
        {"w": SQUARE, "b": matrix(2, D), "o": W},
        lambda p, x: jnp.tanh(reversed_gradient(x @ p["w"]) + p["b"]) @ p["o"],
        {"w": (D, D), "b": (D, 1, 1), "o": (D, 3)},
    ),
    "a bias of a use and beside another one": (
        {"w": W, "b": B},
        lambda p, x: (lambda y: jnp.tanh(y + p["b"]) + y * (jnp.sin(x) @ p["w"] + p["b"]))(x @ p["w"]),
        {},
    ),
    "a bias beside a stopped kernel": (
        {"w": W, "b": B},
        lambda p, x: (x @ jax.lax.stop_gradient(p["w"]) + p["b"]) * jnp.tanh(jnp.sin(x) @ p["w"] + p["b"]),
        {},
    ),
    "a scale that is used twice, its shift once": (
        {"s": matrix(2, D), "b": matrix(3, D), "o": W},
        lambda p, x: jnp.tanh((x * p["s"] + p["b"]) * jnp.cos(jnp.sin(x) * p["s"])) @ p["o"],
        {"s": (D, 1, 2), "o": (D, 3)},
    ),
    "a convolution that is used twice, its bias once": (
        {"w": matrix(1, 2, 2, 1, 5), "b": matrix(2, 5), "o": matrix(3, 5, 3)},
        lambda p, x: (jnp.tanh(image(x, p["w"]) + p["b"]) * image(jnp.sin(x), p["w"])).mean((1, 2)) @ p["o"],
        {"w": (5, 5), "o": (5, 3)},
    ),
    "a tied table with a bias at the output": ({"t": TABLE, "b": matrix(2, 7)}, tied, {"t": (7, 5)}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_that_tags_see(name):
    params, apply, shapes = CASES[name]

    def loss_fn(params, x, labels):
        return kfe.losses.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()

    layers = kfe.find_layers(loss_fn, params, X, LABELS)
    assert {name: layer.shape for name, layer in layers.items()} == shapes
    assert all(layer.per_example for layer in layers.values())
    assert_gradients_and_rows(loss_fn, layers, params, X, LABELS, tolerance=1e-5)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda p, x, losses: losses.mean() + sum(jnp.sum(v**2) for v in p.values()),
        lambda p, x, losses: (losses + jnp.linalg.norm(p["w"])).mean(),
        lambda p, x, losses: jnp.array([losses.mean(), jnp.abs(p["w"]).sum()]).sum(),
        lambda p, x, losses: losses.mean() + x[0, 0] * jnp.sum((p["w"].T @ p["w"] - jnp.eye(3)) ** 2),
        lambda p, x, losses: losses.mean() + jnp.sum(x[:D, :3] ** 2 * (2 * p["w"] - x[:D, :3]) ** 2),
    ],
)
def test_penalties_exclude_nothing(penalty):
    params = {"w": W, "b": B}

    def loss_fn(params, x, labels):
        logits = x @ params["w"] + params["b"]
        losses = kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return penalty(params, x, losses)

    assert kfe.find_layers(loss_fn, params, X, LABELS)["w"].shape == (D + 1, 3)
