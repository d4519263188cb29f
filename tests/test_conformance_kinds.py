"""One suite for every kind of layer with every method: one step of a loss that holds them all."""

from __future__ import annotations

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._layers.kinds import KINDS

from .methods import CASES, REFRESH, Problem, of_layer, quick
from .test_conformance_methods import counts, described, finite, zero

N, CLASSES = 4, 3
# A step on which no period of a method falls.
BETWEEN = 7


class Tied(nn.Module):
    """A table that is an input and an output layer."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(4, 2, name="table")
        return table.attend(nn.tanh(table(tokens)).mean(1))


class Twice(nn.Module):
    """A layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(2, name="dense")
        return dense(nn.tanh(dense(x)))


class Loop(nn.Module):
    """A recurrent layer in a loop over time."""

    @nn.compact
    def __call__(self, x):
        def step(cell, carry, x):
            carry = nn.tanh(cell(x + carry))
            return carry, carry

        loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        return loop(nn.Dense(2, name="cell"), jnp.zeros((len(x), 2), x.dtype), x)[1]


# {part of the parameters: (module, which input)}; small and alike, so that they share factorizations.
PARTS = {
    "conv": (nn.Conv(2, (2, 1), strides=(2, 1)), "images"),
    "depthwise": (nn.Conv(2, (2, 1), feature_group_count=2, use_bias=False), "images"),
    "transposed": (nn.ConvTranspose(2, (2, 1), strides=(2, 1)), "images"),
    "local": (nn.ConvLocal(2, (2, 1), padding="VALID"), "images"),
    "embedding": (nn.Embed(4, 2), "tokens"),
    "tied": (Tied(), "tokens"),
    "heads": (nn.DenseGeneral((2, 2)), "rows"),
    "positions": (nn.Dense(2), "rows"),
    "twice": (Twice(), "rows"),
    "loop": (Loop(), "rows"),
    "norm": (nn.LayerNorm(), "rows"),
    "scale": (nn.RMSNorm(), "rows"),
    "pooled": (nn.Sequential([lambda x: x.mean(1), nn.Dense(2)]), "rows"),
}
# A layer that the loss uses only as much as a batch's weight says.
PARTS["idle"] = PARTS["positions"]
SHARED = {"tied/table", "twice/dense", "loop/cell"}


def inputs(dtype):
    generator = np.random.default_rng(0)
    return {
        "images": jnp.asarray(generator.normal(size=(N, 3, 2, 2)), dtype),
        "rows": jnp.asarray(generator.normal(size=(N, 3, 2)), dtype),
        "tokens": jnp.asarray(generator.integers(0, 4, (N, 3))),
    }


@functools.cache
def problem(dtype=jnp.float32) -> Problem:
    """A loss of all parts side by side, each through a head of its own that is no parameter."""
    x, generator = inputs(dtype), np.random.default_rng(1)

    def shapes():
        # In float32, as the parameters are initialized.
        x = inputs(jnp.float32)
        return {
            name: module.init(jax.random.key(0), x[which])["params"]
            for name, (module, which) in PARTS.items()
        }

    params = jax.tree.map(
        lambda s: jnp.asarray(generator.normal(size=s.shape) / 2, dtype), jax.eval_shape(shapes)
    )

    def outputs(params, x, name):
        module, which = PARTS[name]
        return jnp.tanh(module.apply({"params": params[name]}, x[which])).reshape(N, -1)

    sizes = jax.eval_shape(lambda: {name: outputs(params, x, name) for name in PARTS})
    heads = {k: jnp.asarray(generator.normal(size=(v.shape[1], CLASSES)), dtype) for k, v in sizes.items()}

    def loss_fn(params, x, y, weight):
        parts = {name: outputs(params, x, name) @ heads[name] for name in PARTS}
        parts["idle"] *= weight.astype(parts["idle"].dtype)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(sum(parts.values()), y).mean()

    y = jnp.arange(N) % CLASSES
    return Problem(params, loss_fn, kfe.find_layers(loss_fn, params, x, y, jnp.float32(1)), x, y)


@functools.cache
def compiled(dtype=jnp.float32):
    """Gradients and taps of a batch, one program for all methods."""
    collect = kfe.value_grad_and_taps(problem(dtype).loss_fn, problem(dtype).layers)
    return jax.jit(lambda params, b: collect(params, b.x, b.y, b.weight, key=b.key)[1:])


def leaf(tree, path):
    return functools.reduce(operator.getitem, path, tree)


def make(name, layers, **options):
    """The method, TKFAC's with the pairing and the two-level one's with the form that layers without rows have."""
    if name in ("tkfac", "tekfac"):
        options["pairing"] = "example"
    if name == "two_level_kfac":
        options["form"] = "exact"
    return CASES[name].having(**options).make(layers)


def train(tx, dtype=jnp.float32):
    """Donated steps, with and without refreshes: one trace, a state of one form, an update for every layer that is used."""
    params, layers = problem(dtype).params, problem(dtype).layers
    state = tx.init(params)
    start, structure = described(state), jax.tree.structure(state)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params, grads, taps):
        updates, state = tx.update(grads, state, params, taps=taps)
        return updates, optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates)), state

    for seed, (at, weight) in enumerate(((0, 0), (BETWEEN, 0), (REFRESH, 1))):
        state = state._replace(count=jnp.asarray(at, jnp.int32))
        grads, taps = compiled(dtype)(params, problem(dtype).batch(seed, weight=weight))
        updates, params, state = step(state, params, grads, taps)
        assert described(state) == start and jax.tree.structure(state) == structure
        assert counts(state) == (0, 0, 0 if at < REFRESH else REFRESH)
        assert finite((updates, state, params))
        ours, theirs = (jax.tree.map(lambda v: np.asarray(v, np.float64), t) for t in (updates, grads))
        for name, layer in layers.items():
            pairs = [(leaf(ours, path), leaf(theirs, path)) for _, path in layer.paths]
            if name == "idle" and not weight:
                assert zero(pairs)
            else:
                assert sum(np.vdot(*pair) for pair in pairs) > 0, name
                assert all(np.any(update) for update, _ in pairs), name
    assert step._cache_size() == 1
    return state


def test_every_kind():
    """Every line of `kfe_optax._layers.kinds` is a layer of the loss, and every parameter belongs to one."""
    layers = problem().layers
    assert {layer.kind.name for layer in layers.values()} == set(KINDS)
    assert not layers.rest
    assert {name for name, layer in layers.items() if layer.shared or layer.mixed} == SHARED
    assert (
        set(layers)
        == {"pooled/layers_1" if n == "pooled" else n for n in PARTS} - {"tied", "twice", "loop"} | SHARED
    )


@pytest.mark.parametrize("name", quick("ekfac batch", slow=["kfac"]))
def test_every_method(name):
    train(make(name, problem().layers))


@pytest.mark.parametrize("name", quick("ekfac batch"))
def test_diagonal_sides(name):
    """`max_dim=1`: every side but those of one element is kept as a diagonal."""
    layers = problem().layers
    state = train(make(name, layers, max_dim=1))
    for name, layer in layers.items():
        rank = len(layer.stack_shape) + 1
        for leaf in of_layer(state.method.factors, name):
            assert leaf.ndim <= rank or leaf.shape[rank - 1 :] == (1, 1)


@pytest.mark.nightly
def test_half_precision():
    """bfloat16 parameters and inputs: the curvature is float32."""
    layers = problem(jnp.bfloat16).layers
    state = train(make("ekfac batch", layers), jnp.bfloat16)
    for name in layers:
        kept = of_layer(state.method, name)
        assert kept and {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["tkfac", "tekfac"])
def test_pairing_of_positions(name):
    """As in the paper it needs the traces of single positions, which sums over uses do not hold."""
    ours = problem()
    tx = CASES[name].make(ours.layers)
    grads, taps = jax.eval_shape(compiled(), ours.params, ours.batch())
    with pytest.raises(ValueError, match="choose tkfac's pairing='example'"):
        jax.eval_shape(lambda g, t: tx.update(g, tx.init(ours.params), ours.params, taps=t), grads, taps)
