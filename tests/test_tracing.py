"""Layers that no module marks: any container, any orientation, every call of JAX's, from the loss's program alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfe_optax as kfe

from .dense import assert_close
from .problems import assert_gradients_and_rows

N, D = 6, 4


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


X, LABELS = matrix(0, N, D), jnp.arange(N) % 3


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Affine:
    weight: Any
    shift: Any


def affine(weight, shift, x):
    return x @ weight + shift


def two(seed, *shapes):
    return [matrix(seed + i, *shape) for i, shape in enumerate(shapes)]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(matrix(3, D, 3))

    def __call__(self, x):
        return x @ self.kernel[...]


def split_and_merged():
    graph, state = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    return state, lambda state, x: nnx.merge(graph, state)(x)


def over_layers(params, x):
    def layer(h, p):
        return jnp.tanh(h @ p["w"] + p["b"]), None

    return jax.lax.scan(jax.checkpoint(layer), x, params["stack"])[0] @ params["last"]


def over_time(params, x):
    steps = jax.lax.scan(
        lambda h, _: (jnp.tanh(h @ params["h"] + x), None), jnp.zeros((N, D)), None, length=3
    )
    return steps[0] @ params["o"]


def chosen(params, x):
    return jax.lax.cond(x[0, 0] > 5, lambda w: jnp.zeros((N, 3)), lambda w: x @ w, params["w"])


def features_first(params, x):
    maps = jax.lax.conv_general_dilated(x.reshape(N, 1, 2, 2), params["w"], (1, 1), "SAME")
    return jnp.tanh(maps + params["b"]).mean((2, 3)) @ params["o"]


CASES = {
    "NamedTuple": (
        Pair(*two(1, (D, 5), (5, 3))),
        lambda p, x: jnp.tanh(x @ p.first) @ p.second,
        {"first": (D, 5), "second": (5, 3)},
    ),
    "dataclass": (
        Affine(*two(1, (D, 3), (3,))),
        lambda p, x: affine(p.weight, p.shift, x),
        {"weight": (D + 1, 3)},
    ),
    "keywords": (
        {"out": {"weight": matrix(1, D, 3), "shift": matrix(2, 3)}},
        lambda p, x: affine(x=x, **p["out"]),
        {"out": (D + 1, 3)},
    ),
    "list, kernels (out, in)": (
        two(1, (5, D), (5,), (3, 5)),
        lambda p, x: jnp.tanh(x @ p[0].T + p[1]) @ p[2].T,
        {"0": (D + 1, 5), "2": (5, 3)},
    ),
    "kernel first": ({"w": matrix(1, 3, D)}, lambda p, x: (p["w"] @ x.T).T, {"w": (D, 3)}),
    "vmap over examples": (
        {"w": matrix(1, 3, D), "b": matrix(2, 3)},
        lambda p, x: jax.vmap(lambda x: p["w"] @ x + p["b"])(x),
        {"w": (D + 1, 3)},
    ),
    "inside jit": ({"w": matrix(1, D, 3)}, jax.jit(lambda p, x: x @ p["w"]), {"w": (D, 3)}),
    "einsum, axes of heads": (
        {"w": matrix(1, D, 2, 5), "b": matrix(2, 2, 5), "o": matrix(3, 2, 5, 3)},
        lambda p, x: jnp.einsum(
            "nhk,hko->no", jnp.tanh(jnp.einsum("nd,dhk->nhk", x, p["w"]) + p["b"]), p["o"]
        ),
        {"w": (D + 1, 10), "o": (10, 3)},
    ),
    "blocks": (
        {"w": matrix(1, 2, 2, 5), "o": matrix(2, 10, 3)},
        lambda p, x: jnp.tanh(jnp.einsum("nbi,bio->nbo", x.reshape(N, 2, 2), p["w"])).reshape(N, 10) @ p["o"],
        {"w": (2, 2, 5), "o": (10, 3)},
    ),
    "a kernel that is reshaped": (
        {"w": matrix(1, 2, 2, 3), "b": matrix(2, 3)},
        lambda p, x: x @ p["w"].reshape(D, 3) + p["b"],
        {"w": (D + 1, 3)},
    ),
    "a convolution, features first": (
        {"w": matrix(1, 5, 1, 2, 2), "b": matrix(2, 5, 1, 1), "o": matrix(3, 5, 3)},
        features_first,
        {"w": (5, 5), "o": (5, 3)},
    ),
    "a table that is read by tokens": (
        {"table": matrix(1, 7, 5), "o": matrix(3, 5, 3)},
        lambda p, x: jnp.tanh(p["table"][jnp.argsort(x, -1)]).mean(1) @ p["o"],
        {"table": (7, 5), "o": (5, 3)},
    ),
    "scale and shift": (
        {"scale": matrix(1, D), "shift": matrix(2, D), "o": matrix(3, D, 3)},
        lambda p, x: jnp.tanh(x * (1 + p["scale"]) + p["shift"]) @ p["o"],
        {"scale": (D, 1, 2), "o": (D, 3)},
    ),
    "kernels that are scaled": (
        {"w": matrix(1, D, 5), "b": matrix(2, 5), "s": matrix(3, 5), "o": matrix(4, 3, 5)},
        lambda p, x: (1 - p["s"]) * jnp.tanh(x @ (p["w"] / np.sqrt(D)) + p["b"]) @ -(jnp.sqrt(2) * p["o"].T),
        {"w": (D + 1, 5), "s": (5, 1, 1), "o": (5, 3)},
    ),
    "nnx.split and merge": (*split_and_merged(), {"kernel": (D, 3)}),
    "a scan over layers, rematerialized": (
        {"stack": {"w": matrix(1, 2, D, D), "b": matrix(2, 2, D)}, "last": matrix(3, D, 3)},
        over_layers,
        {"stack": (2, D + 1, D), "last": (D, 3)},
    ),
    "a loop over time": (
        {"h": matrix(1, D, D), "o": matrix(2, D, 3)},
        over_time,
        {"h": (D, D), "o": (D, 3)},
    ),
    "a branch": ({"w": matrix(1, D, 3)}, chosen, {"w": (D, 3)}),
    "an output that is also read without its bias": (
        {"w": matrix(1, D, 3), "b": matrix(2, 3), "o": matrix(4, 3, 3)},
        lambda p, x: (lambda z: jnp.tanh(z + p["b"]) @ p["o"] + z)(x @ p["w"]),
        {"w": (D, 3), "o": (3, 3)},
    ),
    "a stopped second use": (
        {"w": matrix(1, D, 3)},
        lambda p, x: x @ p["w"] + jax.lax.stop_gradient(2 * x) @ jax.lax.stop_gradient(p["w"]),
        {"w": (D, 3)},
    ),
    "an output that is stopped": (
        {"w": matrix(1, D, 3)},
        lambda p, x: x @ p["w"] + jax.lax.stop_gradient((2 * x) @ p["w"]),
        {"w": (D, 3)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_and_the_law_of_rows(name):
    """Gradients are JAX's; Σ_t ā gᵀ of the empirical rows is the gradient of each example."""
    params, apply, shapes = CASES[name]

    def loss_fn(params, x, labels):
        return kfe.losses.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()

    layers = kfe.find_layers(loss_fn, params, X, LABELS)
    assert {name: layer.shape for name, layer in layers.items()} == shapes
    assert layers.rest == ((("b",),) if name == "an output that is also read without its bias" else ())
    assert_gradients_and_rows(loss_fn, layers, params, X, LABELS, tolerance=1e-6)


def network(params, x):
    return jnp.tanh(x @ params["in"]["w"] + params["in"]["b"]) @ params["out"]["w"] + params["out"]["b"]


def second_derivatives(params, x):
    """∂²u/∂x_i², by forward mode over forward mode."""

    def along(e):
        first = lambda x: jax.jvp(lambda x: network(params, x), (x,), (e,))[1]
        return jax.jvp(first, (x,), (e,))[1]

    return [along(jnp.broadcast_to(e, x.shape)) for e in jnp.eye(2, dtype=x.dtype)]


def by_hand(params, x, added):
    """(Laplacian, value, {layer: rows [input; 1 or 0]}) carried forward, with `added` on each product of a kernel.

    The value is one position of the layers, and each derivative one more, without the bias.
    """
    rows = {"in": [], "out": []}

    def product(layer, h, one):
        rows[layer].append(jnp.concatenate([h, jnp.full((len(h), 1), float(one))], 1))
        shift = params[layer]["b"] if one else 0
        return h @ params[layer]["w"] + shift + added[layer][len(rows[layer]) - 1]

    h = jnp.tanh(product("in", x, 1))
    bent = -2 * h * (1 - h**2)
    slopes = [product("in", jnp.broadcast_to(e, x.shape), 0) for e in jnp.eye(2, dtype=x.dtype)]
    total = sum(product("out", bent * slope**2, 0) for slope in slopes)
    return total, product("out", h, 1), rows


def test_derivatives_inside_the_loss():
    """K-FAC for PINNs (Dangel et al. 2024): the factors of derivatives that are positions of a layer, and it trains."""
    with jax.enable_x64(True):
        shapes = {"in": {"w": (2, 5), "b": (5,)}, "out": {"w": (5, 1), "b": (1,)}}
        params = jax.tree.map(
            lambda shape: jnp.asarray(matrix(sum(shape), *shape), jnp.float64),
            shapes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )
        x = jnp.asarray(matrix(5, N, 2), jnp.float64)

        def loss_fn(params, x):
            residual = sum(second_derivatives(params, x)) + 1
            edge = kfe.losses.squared_error(network(params, x)).mean()
            return kfe.losses.squared_error(residual).mean() + edge

        layers = kfe.find_layers(loss_fn, params, x)
        assert {name: layer.shape for name, layer in layers.items()} == {"in": (3, 5), "out": (6, 1)}
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")
        loss, grads, taps = differentiate(params, x)
        assert_close((loss, grads), jax.jit(jax.value_and_grad(loss_fn))(params, x), 1e-10)

        @jax.jit
        def expected(params, x):
            added = {"in": jnp.zeros((3, N, 5)), "out": jnp.zeros((3, N, 1))}
            by_output = jax.jacobian(lambda added: jnp.stack(by_hand(params, x, added)[:2]))(added)
            laplacian, _, rows = by_hand(params, x, added)
            factors = {}
            for name in layers:
                inputs = jnp.concatenate(rows[name])
                # −log p of each output has the second derivative 2.
                g = jnp.sqrt(2) * jnp.einsum("oncpnd->oncpd", by_output[name])
                factors[name] = inputs.T @ inputs / len(inputs), jnp.einsum("oncpd,oncpe->de", g, g) / N
            return factors, laplacian, sum(second_derivatives(params, x))

        factors, *laplacians = expected(params, x)
        assert_close(*laplacians, 1e-10)
        assert_close({name: taps[name].covariances() for name in layers}, factors, 1e-10)

        tx = kfe.kfac(0.5, layers, 1e-3)
        state, losses = tx.init(params), []

        @jax.jit
        def step(params, state):
            loss, grads, taps = differentiate(params, x)
            updates, state = tx.update(grads, state, params, taps=taps)
            return optax.apply_updates(params, updates), state, loss

        for _ in range(10):
            params, state, loss = step(params, state)
            losses.append(float(loss))
        assert losses[-1] < losses[0] / 2


def test_a_function_with_a_derivative_of_its_own_stays_as_it_is():
    """Its equations are not differentiated, so that no layer is inside; the gradient is that of its rule."""

    @jax.custom_vjp
    def straight(x, w):
        return jnp.round(x @ w)

    straight.defvjp(lambda x, w: (straight(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, 3 * kept[0].T @ g))
    params = {"inside": matrix(1, D, 5), "out": matrix(2, 5, 3)}

    def loss_fn(params, x, labels):
        logits = straight(x, params["inside"]) @ params["out"]
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    layers = kfe.find_layers(loss_fn, params, X, LABELS)
    assert list(layers) == ["out"]
    assert "inside a function with a derivative of its own" in layers.reasons[0]
    found = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, X, LABELS)[:2]
    assert_close(found, jax.jit(jax.value_and_grad(loss_fn))(params, X, LABELS), 1e-6)


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (
            lambda p, x: x @ p["w"] + p["b"] + jnp.maximum(p["b"], x[:, :3]) + 0 * p["w2"].sum(),
            "in another way (max at test_tracing.py:",
        ),
        (
            lambda p, x: (x @ p["w"] + p["b"]) * jnp.tanh(x @ p["w2"] + p["b"]),
            "b is also used by another layer",
        ),
    ],
)
def test_what_else_reads_a_parameter(apply, reason):
    """A gradient from the examples that no tag sees is no part of the curvature: the layer is none, and says why."""
    params = {"w": matrix(1, D, 3), "w2": matrix(2, D, 3), "b": matrix(3, 3)}

    def loss_fn(params, x, labels):
        return kfe.losses.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()

    layers = kfe.find_layers(loss_fn, params, X, LABELS)
    reasons = {path[0]: why for path, why in zip(layers.rest, layers.reasons, strict=True)}
    assert not layers and reason in reasons["w"]


def test_a_distance_to_other_parameters_excludes_nothing():
    params = {"w": matrix(1, D, 3), "b": matrix(3, 3)}

    def loss_fn(params, before, x, labels):
        logits = x @ params["w"] + params["b"]
        distance = sum(jnp.sum((params[name] - before[name]) ** 2) for name in params)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + distance

    assert kfe.find_layers(loss_fn, params, params, X, LABELS)["w"].shape == (D + 1, 3)


def test_a_penalty_in_the_loss_of_each_example_excludes_nothing():
    params = {"w": matrix(1, D, 3)}

    def loss_fn(params, x, labels):
        def of_one(x, label):
            loss = kfe.losses.softmax_cross_entropy_with_integer_labels(x @ params["w"], label)
            return loss + 1e-3 * jnp.sum(jnp.abs(params["w"]))

        return jax.vmap(of_one)(x, labels).mean()

    assert list(kfe.find_layers(loss_fn, params, X, LABELS)) == ["w"]


def test_what_is_left_as_it_is():
    """A fixed point that is not differentiated."""
    params = {"inside": matrix(1, D, D), "out": matrix(2, D, 3)}

    def loss_fn(params, x, labels):
        def layer(h):
            return jnp.tanh(h @ params["inside"] + x)

        fixed = jax.lax.while_loop(lambda h: jnp.abs(layer(h) - h).max() > 0.1, layer, jnp.zeros_like(x))
        h = layer(jax.lax.stop_gradient(fixed))
        return kfe.losses.softmax_cross_entropy_with_integer_labels(h @ params["out"], labels).mean()

    layers = kfe.find_layers(loss_fn, params, X, LABELS)
    assert list(layers) == ["inside", "out"]
    found = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, X, LABELS)[:2]
    assert_close(found, jax.jit(jax.value_and_grad(loss_fn))(params, X, LABELS), 1e-6)


def test_a_row_mask_of_the_batch():
    """It counts for a use by a rule as it does for a marked one."""
    params, mask = {"kernel": matrix(1, D, 3)}, jnp.arange(N) < 4
    found = []
    for marked in (False, True):

        def loss_fn(params, x, labels, marked=marked):
            logits = x @ params["kernel"]
            logits = kfe.tag_dense(x, logits, params) if marked else logits
            return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        layers = kfe.find_layers(loss_fn, params, X, LABELS)
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
        (name,) = layers
        found.append(differentiate(params, X, LABELS, row_mask=mask)[2][name].covariances())
    assert_close(found[0], found[1], 1e-6)
    assert_close(found[0][0], X[:4].T @ X[:4] / 4, 1e-6)


@pytest.mark.parametrize("flattened", [False, True])
def test_a_row_mask_where_time_comes_first(flattened):
    """Shapes do not say that it is transposed: as many steps as examples, or both in one axis."""
    params, x = {"w": matrix(3, D, D), "o": matrix(1, D, 3)}, matrix(5, N, N, D)

    def loss_fn(params, x, labels):
        by_time = x.swapaxes(0, 1)
        by_time = by_time.reshape(-1, D) if flattened else by_time
        h = jnp.tanh(by_time @ params["w"]).reshape(N, N, D).mean(0)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(h @ params["o"], labels).mean()

    layers = kfe.find_layers(loss_fn, params, x, LABELS)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    with pytest.raises(ValueError, match="not shown to be the batch: mark it"):
        differentiate(params, x, LABELS, row_mask=jnp.ones((N, N), bool))[2]["w"].covariances()


STEPS = jnp.stack([X, 2 * X, X[::-1]])
LIVE = jnp.arange(3 * N).reshape(3, N) % 5 < 3


def masked_call(call):
    def forward(dense, x):
        with kfe.row_mask(LIVE[0]):
            return call(dense)(x)

    return X, X[LIVE[0]], forward


def masked_step(dense, x, live):
    with kfe.row_mask(live):
        return dense(x)


def lifted(dense, x):
    with kfe.row_mask(LIVE[0]), kfe.row_mask(None):
        return dense(x)


def scanned(dense, x):
    return jax.lax.scan(lambda _, step: (None, masked_step(dense, *step)), None, (x, LIVE))[1].sum(0)


# name: (input, the rows that count, outputs of a dense layer on it)
INSIDE = {
    "jit": masked_call(jax.jit),
    "checkpoint": masked_call(jax.checkpoint),
    "vmap": masked_call(jax.vmap),
    "lifted": (X, X, lifted),
    "scan": (STEPS, STEPS[LIVE], scanned),
    "vmap of each": (
        STEPS.swapaxes(0, 1),
        STEPS[LIVE],
        lambda dense, x: jax.vmap(functools.partial(masked_step, dense))(x, LIVE.T).sum(1),
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_mask_inside_the_loss(name, x64):
    """A counts its rows alone, with a tag and without one; a tag under a vmap sees one example, and refuses a mask of all."""
    given, rows, forward = INSIDE[name]
    params, x = {"kernel": matrix(1, D, 3)}, jnp.asarray(given, float)
    for tag in (lambda x, y, params: y, kfe.tag_dense)[: 1 if name == "vmap" else 2]:

        def loss_fn(params, x, tag=tag):
            y = forward(lambda x: tag(x, x @ params["kernel"], params), x)
            return kfe.losses.squared_error(y).sum(-1).mean()

        layers = kfe.find_layers(loss_fn, params, x)

        @jax.jit
        def read(params, x, loss_fn=loss_fn, layers=layers):
            _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)
            return grads, jax.grad(loss_fn)(params, x), taps["kernel"].covariances()[0]

        grads, expected, a = read(params, x)
        assert_close(grads, expected, 1e-12)
        counted = np.asarray(rows)
        assert_close(a, counted.T @ counted / len(counted), 1e-6)


def test_a_mask_that_a_derivative_leaves_behind():
    """JAX drops what nothing reads from the derivative of a call."""
    params = {"w": matrix(1, D, 3)}

    def loss_fn(params, x):
        @jax.jit
        def energy(x):
            with kfe.row_mask(LIVE[0]):
                return jnp.tanh(x @ params["w"]).sum()

        return kfe.losses.squared_error(jax.grad(energy)(x)).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, X)
    assert not layers and "a derivative inside the loss leaves behind" in layers.reasons[0]


def test_one_call_under_two_masks(x64):
    """Equal products are one use, but not under different masks."""
    params, x = {"w": matrix(1, D, 3)}, jnp.asarray(X, float)

    def loss_fn(params, x):
        @jax.jit
        def call(x, mask):
            with kfe.row_mask(mask):
                return x @ params["w"]

        return kfe.losses.squared_error(call(x, LIVE[0]) - call(x, LIVE[1])).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)
    rows = jnp.concatenate([x[LIVE[0]], x[LIVE[1]]])
    assert_close(taps["w"].covariances()[0], rows.T @ rows / len(rows), 1e-6)


def test_a_mask_under_a_vmap_over_models_is_refused():
    params = {"w": jnp.stack([matrix(1, D, 3), matrix(2, D, 3)])}

    def loss_fn(params, x):
        y = jax.vmap(lambda w, x, live: masked_step(lambda x: x @ w, x, live))(
            params["w"], STEPS[:2] + x, LIVE[:2]
        )
        return kfe.losses.squared_error(y.swapaxes(0, 1)).sum((-1, -2)).mean()

    layers = kfe.find_layers(loss_fn, params, X)
    with pytest.raises(ValueError, match="A vmap over models maps the row_mask"):
        kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, X)


def test_a_vector_that_is_wider_than_the_output_is_no_bias(x64):
    """One number an example, compared with thresholds (ordinal regression)."""
    params, x = {"w": matrix(1, D, 1), "b": matrix(2, 5)}, jnp.asarray(X, float)

    def loss_fn(params, x):
        return kfe.losses.squared_error(x @ params["w"] + params["b"]).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert {name: layer.shape for name, layer in layers.items()} == {"w": (D, 1), "b": (5, 1, 1)}
    _, grads, _ = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)
    assert_close(grads, jax.jit(jax.grad(loss_fn))(params, x), 1e-12)


def test_a_loss_of_the_output_without_its_bias():
    params = {"w": matrix(1, D, 3), "b": matrix(2, 3)}

    def loss_fn(params, x, labels):
        logits = x @ params["w"]
        losses = kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses + kfe.losses.l2_loss(logits + params["b"]).sum(-1)).mean()

    layers = kfe.find_layers(loss_fn, params, X, LABELS)
    assert layers["w"].shape == (D, 3)
    assert "which is also read without it" in layers.reasons[0]
