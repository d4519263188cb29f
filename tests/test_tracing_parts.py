"""Parts of parameters, one-hot inputs, loops without a derivative, flipped kernels: layers, or true reasons."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import kfe_optax as kfe

from .dense import assert_close
from .problems import assert_gradients_and_rows
from .test_tracing_merging import matrix

N, D = 6, 4


def image(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x.reshape(-1, 2, 2, 1), kernel, (1, 1), "SAME", dimension_numbers=numbers
    )


def critic(p, x):
    h = jnp.tanh(image(x, p["c"]) + p["b"]).reshape(len(x), -1)
    return h @ p["o"]


def with_its_slope(p, x):
    """What the gradient penalty of a Wasserstein critic reads."""
    slope = jax.grad(lambda x: critic(p, x).sum())(x)
    return jnp.concatenate([critic(p, x), jnp.linalg.norm(slope, axis=1, keepdims=True)], 1)


def gates(p, x):
    """One product of a kernel that holds two, as recurrent networks have it."""
    return jnp.tanh(jnp.split(x @ p["w"] + p["b"], 2, -1)[0]) * (x @ p["w"] + p["b"])[:, 3:]


def counted(p, x):
    """`fori_loop` between numbers is a scan."""
    return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x) @ p["o"]


def until(p, x):
    def more(carry):
        return carry[0] + 1, jnp.tanh(carry[1] @ p["w"])

    return jax.lax.stop_gradient(jax.lax.while_loop(lambda carry: carry[0] < 3, more, (0, x))[1])


W, SQUARE, OUT = (D, 6), (D, D), (D, 3)

# {name: (shapes of the parameters, network, the layers' shapes, {parameter outside: what its reason says})}
CASES = {
    "a convolution in reverse mode": (
        {"c": (2, 2, 1, 5), "b": (5,), "o": (20, 1)},
        with_its_slope,
        {"c": (5, 5), "o": (20, 1)},
        {},
    ),
    "one product of two concatenated kernels": ({"w": W, "b": (6,)}, gates, {"w": (D + 1, 6)}, {}),
    "columns of a kernel apart": (
        {"w": W, "o": OUT},
        lambda p, x: jnp.tanh(x @ p["w"][:, :3]) * jnp.sin(x @ p["w"][:, 3:]) * (x @ p["o"]),
        {"o": OUT},
        {"w": "no supported layer reads it (slice, then dot_general at test_tracing_parts.py:"},
    ),
    "rows of a kernel apart": (
        {"w": (2 * D, 3), "o": OUT},
        lambda p, x: jnp.tanh(x @ p["w"][:D]) * (jnp.sin(x) @ p["w"][D:]) + x @ p["o"],
        {"o": OUT},
        {"w": "no supported layer reads it (slice, then dot_general at test_tracing_parts.py:"},
    ),
    "a kernel and a part of it": (
        {"w": W, "o": OUT},
        lambda p, x: (x @ p["w"])[:, 3:] * (jnp.sin(x) @ p["w"][:, :3]) + x @ p["o"],
        {"o": OUT},
        {"w": "also used outside its layer, in another way (dot_general at test_tracing_parts.py:"},
    ),
    "kernels that are concatenated": (
        {"i": (D, 3), "j": (D, 3), "o": OUT},
        lambda p, x: (x @ jnp.concatenate([p["i"], p["j"]], 1))[:, 1:4] + x @ p["o"],
        {"o": OUT},
        {"i": "(concatenate, then dot_general at", "j": "(dot_general at test_tracing_parts.py:"},
    ),
    "one-hot inputs": (
        {"t": (7, 5), "o": (5, 3)},
        lambda p, x: jnp.tanh(jax.nn.one_hot(jnp.argsort(x, -1), 7) @ p["t"]).mean(1) @ p["o"],
        {"t": (7, 5), "o": (5, 3)},
        {},
    ),
    "a loop of fixed length": ({"w": SQUARE, "o": OUT}, counted, {"w": SQUARE, "o": OUT}, {}),
    "a while loop, which no derivative goes through": (
        {"w": SQUARE, "o": OUT},
        lambda p, x: (until(p, x) + x) @ p["o"],
        {"o": OUT},
        {"w": "no supported layer reads it (while at test_tracing_parts.py:"},
    ),
    "a while loop beside a use": (
        {"w": SQUARE, "o": OUT},
        lambda p, x: (until(p, x) + jnp.tanh(x @ p["w"])) @ p["o"],
        {"w": SQUARE, "o": OUT},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_or_reasons(name, x64):
    """Gradients are JAX's, and Σ_t ā gᵀ over the rows is that of each example, also beside what is left out."""
    shapes, apply, expected, reasons = CASES[name]
    params = {own: matrix(i, *shape) for i, (own, shape) in enumerate(shapes.items())}
    x = matrix(9, N, D)

    def loss_fn(params, x):
        return kfe.losses.squared_error(apply(params, x)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert {own: layer.shape for own, layer in layers.items()} == expected
    assert {path[-1] for path in layers.rest} == set(reasons)
    for (own,), reason in zip(layers.rest, layers.reasons, strict=True):
        assert reasons[own] in reason
    assert_gradients_and_rows(loss_fn, layers, params, x)
    if name == "one-hot inputs":
        # A row for each token, of which the input's factor counts how often each word is read.
        taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)[2]
        a, _ = taps["t"].covariances()
        words = jax.nn.one_hot(jnp.argsort(x, -1), 7).reshape(-1, 7)
        assert_close(a, words.T @ words / len(words), 1e-10)
