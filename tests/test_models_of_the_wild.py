"""Models as other people write them, in small: what Flax's examples, Equinox, Haiku, Hugging Face and FermiNet do, without them.

Each obeys the law of rows, has JAX's gradient, and trains.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import kfe_optax as kfe

from .dense import assert_close

N, T, D, C = 6, 4, 4, 3
LABELS = jnp.arange(N) % C


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


def matrices(**shapes):
    return {name: matrix(i + 1, *shape) for i, (name, shape) in enumerate(shapes.items())}


def cross_entropy(logits, labels):
    return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def normalized(x):
    """As Haiku writes it, the scale before the data."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return jax.lax.rsqrt(variance + 1e-5), x - mean


def haiku_norm(p, x):
    inverse, centered = normalized(x @ p["w"])
    return jnp.tanh(p["scale"] * inverse * centered + p["offset"]) @ p["o"]


def lstm(p, x):
    """Equinox's cell: one bias for the sum of two products."""

    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(p["ih"] @ x + p["hh"] @ h + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    def one(x):
        return jax.lax.scan(step, (jnp.zeros(2), jnp.zeros(2)), x)[0][0] @ p["o"]

    return jax.vmap(one)(x[:, None] * jnp.arange(1.0, 4)[:, None])


def residual(p, x):
    """A bias that is added behind the residual stream, which is read once more."""
    h = x + jnp.tanh(x @ p["w"])
    return (h + h @ p["v"] + p["b"]) @ p["o"]


def gates(p, x):
    """The reset gate multiplies a part of the product, with its own bias: Equinox's GRU."""
    h = jnp.tanh(x @ p["w"])
    r, n = jnp.split(h @ p["u"], 2, -1)
    return jnp.tanh(jax.nn.sigmoid(r) * (n + p["n"])) @ p["o"]


def ferminet(p, x):
    """`dense(x, **p)` for each electron, an envelope, and the logarithm of a determinant."""

    def dense(x, w, b):
        return x @ w + b

    def one(x):
        x = x.reshape(2, 2)
        radius = jnp.linalg.norm(x, axis=1, keepdims=True)
        h = jnp.tanh(dense(jnp.concatenate([x, radius], 1), **p["single"]))
        h = jnp.concatenate([h, jnp.broadcast_to(h.mean(0), h.shape)], 1)
        envelope = jnp.exp(-radius * p["envelope"]["sigma"]) * p["envelope"]["pi"]
        orbitals = (dense(h, **p["orbital"]) * envelope).reshape(2, 3, 2).transpose(1, 0, 2)
        return jnp.linalg.slogdet(orbitals)[1]

    return jax.vmap(one)(x)


FERMINET = {
    "single": matrices(w=(3, 4), b=(4,)),
    "orbital": matrices(w=(8, 6), b=(6,)),
    "envelope": {"sigma": jnp.ones(6), "pi": matrix(9, 6) + 1},
}

# name → (parameters, network, shapes of the layers)
MODELS = {
    "Haiku's LayerNorm": (
        matrices(w=(D, 5), scale=(5,), offset=(5,), o=(5, C)),
        haiku_norm,
        {"w": (D, 5), "scale": (5, 1, 2), "o": (5, C)},
    ),
    "one bias for two products": (
        matrices(ih=(8, D), hh=(8, 2), b=(8,), o=(2, C)),
        lstm,
        {"ih": (D, 8), "hh": (3, 8), "o": (2, C)},
    ),
    "a bias behind the residual": (
        matrices(w=(D, D), v=(D, D), b=(D,), o=(D, C)),
        residual,
        {"w": (D, D), "v": (D + 1, D), "o": (D, C)},
    ),
    "a bias of a part": (
        matrices(w=(D, 5), u=(5, 6), n=(3,), o=(3, C)),
        gates,
        {"w": (D, 5), "u": (5, 6), "n": (3, 1, 1), "o": (3, C)},
    ),
    "FermiNet": (
        FERMINET,
        ferminet,
        {"single": (4, 4), "orbital": (9, 6), "envelope/sigma": (6, 1, 1), "envelope/pi": (6, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_are_in_layers(name):
    params, apply, shapes = MODELS[name]
    x = matrix(0, N, D)

    def loss_fn(params, x, labels):
        z = apply(params, x)
        return kfe.losses.l2_loss(z).mean() if z.ndim == 1 else cross_entropy(z, labels)

    layers = kfe.find_layers(loss_fn, params, x, LABELS)
    assert not layers.rest, layers.reasons
    assert {name: layer.shape for name, layer in layers.items()} == shapes
    losses = trained(loss_fn, layers, params, x, LABELS)
    assert losses[-1] < losses[0]


def trained(loss_fn, layers, params, *batch, steps=5):
    """Losses of K-FAC's steps with the empirical Fisher; in each, gradients and the law of rows."""
    tx = kfe.kfac(0.02, layers)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, *batch)
        pairs = [(grads, jax.grad(loss_fn)(params, *batch))]
        for name, layer in layers.items():
            if layer.aligned:
                pairs.append((taps[name].example_gradients().mean(-3), layer.to_matrix(grads)))
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss, pairs

    losses = []
    for _ in range(steps):
        params, state, loss, pairs = step(params, state)
        losses.append(float(loss))
        for found, expected in pairs:
            assert_close(found, expected, 1e-5)
    return losses


def test_a_norm_of_the_nodes_of_graphs(x64):
    """G of its block is that of its nodes' own gradients, as a dense layer's is; no node is called an example."""
    owner, graphs = jnp.asarray([0, 0, 0, 1, 1, 2, 2, 2]), 3
    params = jax.tree.map(
        lambda leaf: leaf.astype(float), matrices(w=(D, 5), scale=(5,), shift=(5,), o=(5, C))
    )
    nodes = matrix(0, len(owner), D).astype(float)

    def normal(params, nodes):
        inverse, centered = normalized(nodes @ params["w"])
        return inverse * centered

    def loss_fn(params, nodes, added=0.0):
        h = normal(params, nodes) * params["scale"] + params["shift"] + added
        z = jax.ops.segment_sum(jnp.tanh(h), owner, graphs) @ params["o"]
        return kfe.losses.l2_loss(z).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, nodes)
    assert not layers.rest
    assert layers["scale"].shape == (5, 1, 2)
    assert not layers["scale"].aligned
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, nodes)

    @jax.jit
    def by_hand(params, nodes):
        own = jax.grad(loss_fn, 2)(params, nodes, jnp.zeros((len(owner), 5)))
        return jnp.stack([normal(params, nodes) * own, own], -1)

    rows = np.asarray(by_hand(params, nodes))
    assert_close(rows.sum(0)[:, None], layers["scale"].to_matrix(grads), 1e-10)
    a, g = taps["scale"].covariances()
    assert_close(a, jnp.ones((5, 1, 1)), 1e-12)
    assert_close(g, graphs * np.einsum("nfi,nfj->fij", rows, rows), 1e-10)
    for read in (taps["scale"].rows, taps["scale"].example_gradients):
        with pytest.raises(ValueError, match="leading axis that is not shown to be the batch"):
            read()
    assert not kfe.check_layers(loss_fn, layers, params, nodes)[1].errors


def test_a_dense_module_that_is_given_the_table_of_an_embedding():
    """As Hugging Face's GPT-2 ties its head: the transposed table is the kernel of a module of its own."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, D, name="embed")
            hidden = jnp.tanh(nn.Dense(D, name="dense")(embed(tokens)))
            table = self.variables["params"]["embed"]["embedding"]
            return nn.Dense(7, use_bias=False, parent=None).apply({"params": {"kernel": table.T}}, hidden)

    tokens = jnp.arange(N * T).reshape(N, T) % 7
    params = jax.jit(Model().init)(jax.random.key(0), tokens)["params"]

    def loss_fn(params, tokens):
        return cross_entropy(Model().apply({"params": params}, tokens), tokens)

    layers = kfe.find_layers(loss_fn, params, tokens)
    assert not layers.rest
    assert layers["embed"].mixed
    assert layers["embed"].kind.name == "embedding"
    losses = trained(loss_fn, layers, params, tokens)
    assert losses[-1] < losses[0]
