"""Whole networks: every parameter is in a layer, or in the rest with a reason; in Linen, in NNX and in half precision.

Only traced, so at full size.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import kfe_optax as kfe
from kfe_optax._layers.paths import leaves_by_path
from kfe_optax.experiments.models import VGG, CharacterTransformer, Recurrent, ResNet, VisionTransformer

from . import nnx_networks
from .methods import quick

pytestmark = pytest.mark.release

CIFAR = (32, 32, 3)
IMAGES = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
LABELS = jax.ShapeDtypeStruct((8,), jnp.int32)
TEXT = jax.ShapeDtypeStruct((8, 64), jnp.int32)

ADDED = "no supported layer reads it (add"

# name → (module, layers, parameters outside)
LINEN = {
    "resnet20": (ResNet(CIFAR, depth=20), 43, {}),
    "resnet20 without norms": (ResNet(CIFAR, depth=20, batch_norm=False, pre_activation=True), 22, {}),
    "resnet110": (ResNet(CIFAR, depth=110), 223, {}),
    "vgg16": (VGG(CIFAR, depth=16), 27, {}),
    "vit": (VisionTransformer(CIFAR, dropout=0.1), 51, {"positions": ADDED}),
    "gpt": (
        CharacterTransformer(vocabulary=96, length=64, scan=True, dropout=0.1),
        11,
        {"positions": ADDED},
    ),
    "tied gpt": (
        CharacterTransformer(vocabulary=96, length=64, scan=True, tied=True),
        10,
        {"positions": ADDED},
    ),
    "lstm": (Recurrent(vocabulary=96, depth=2), 18, {}),
    "gru": (Recurrent(vocabulary=96, cell="gru"), 8, {}),
}


def cross_entropy(logits, labels):
    losses = kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def linen_layers(model, x):
    """`find_layers` for a Linen model of which no parameter exists."""
    labels = TEXT if x is TEXT else LABELS
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params = variables["params"]
    state = {name: values for name, values in variables.items() if name != "params"}

    def loss_fn(params, x, labels, state):
        rngs = {"dropout": jax.random.key(1)}
        logits, state = model.apply(
            {"params": params, **state}, x, train=True, mutable=list(state), rngs=rngs
        )
        return cross_entropy(logits, labels), state

    return kfe.find_layers(loss_fn, params, x, labels, state, has_aux=True), params


def check(layers, params, count, outside):
    """Every parameter is accounted for once, and the table says so."""
    assert len(layers) == count
    reasons = dict(zip(["/".join(map(str, path)) for path in layers.rest], layers.reasons, strict=True))
    assert reasons.keys() == outside.keys()
    assert all(reasons[name].startswith(reason) for name, reason in outside.items())
    leaves = leaves_by_path(params)
    taken = [path for layer in layers.values() for _, path in layer.paths]
    assert sorted([*taken, *layers.rest], key=str) == sorted(leaves, key=str)
    sizes = sum(layer.size for layer in layers.values()) + sum(leaves[path].size for path in layers.rest)
    assert sizes == sum(leaf.size for leaf in leaves.values())
    table = str(layers)
    lines = [line.split()[0] for line in table.splitlines() if line]
    assert all(name in lines for name in [*layers, *reasons])
    assert all(reason in table for reason in outside.values())


@pytest.mark.parametrize("name", quick(*list(LINEN)[:3], slow=LINEN, of=LINEN))
def test_linen(name):
    model, count, outside = LINEN[name]
    x = IMAGES if hasattr(model, "image_shape") else TEXT
    layers, params = linen_layers(model, x)
    check(layers, params, count, outside)


@pytest.mark.parametrize("name", nnx_networks.NETWORKS)
def test_nnx(name):
    make, text, count, outside = nnx_networks.NETWORKS[name]
    model = nnx.eval_shape(make)
    x, labels = (TEXT, TEXT) if text else (IMAGES, LABELS)
    layers = kfe.find_layers(lambda model, x, labels: cross_entropy(model(x), labels), model, x, labels)
    check(layers, nnx.state(model, nnx.Param), count, outside)


class Mixed(nn.Module):
    """Every kind of layer, computing in `dtype`."""

    dtype: object = None

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.tanh(nn.BatchNorm(not train, dtype=self.dtype)(nn.Conv(8, (3, 3), dtype=self.dtype)(x)))
        x = nn.ConvTranspose(8, (2, 2), dtype=self.dtype)(x).reshape(len(x), -1, 8)
        x = nn.LayerNorm(dtype=self.dtype)(x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(x))
        tokens = jnp.argmax(x, -1)
        embed = nn.Embed(8, 8, dtype=self.dtype)
        x = embed.attend(nn.DenseGeneral(8, dtype=self.dtype)(x + embed(tokens)))
        x = nn.RNN(nn.OptimizedLSTMCell(8, dtype=self.dtype))(x[:, :4])
        return nn.Dense(10, dtype=self.dtype)(nn.PReLU()(x).mean(1)).astype(jnp.float32)


def test_half_precision_finds_the_same_layers():
    small = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
    full, params = linen_layers(Mixed(), small)
    half, _ = linen_layers(Mixed(jnp.bfloat16), small)
    assert full == half
    assert full.reasons == half.reasons
    check(half, params, 19, {"PReLU_0/negative_slope": "no supported layer reads it (mul at"})


def test_half_precision_finds_the_same_layers_in_nnx():
    def found(dtype):
        model = nnx.eval_shape(functools.partial(nnx_networks.Gpt, dtype=dtype))
        return kfe.find_layers(lambda model, x: cross_entropy(model(x), x), model, TEXT)

    assert found(None) == found(jnp.bfloat16)


def test_adapters_of_low_rank_on_a_frozen_base():
    """The base behind a stop_gradient: its parameters are the rest, the adapter's two layers are found."""
    model = nnx.eval_shape(lambda: nnx.LoRALinear(3, 10, lora_rank=2, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)

    def loss_fn(model, x, labels):
        for name in ("kernel", "bias"):
            variable = getattr(model, name)
            variable[...] = jax.lax.stop_gradient(variable[...])
        return cross_entropy(model(x), labels)

    layers = kfe.find_layers(loss_fn, model, x, LABELS)
    assert [layer.shape for layer in layers.values()] == [(3, 2), (2, 10)]
    assert layers.rest == (("bias",), ("kernel",))
    assert layers.reasons == ("frozen by stop_gradient",) * 2


def test_a_kernel_that_is_no_parameter():
    """A bias beside a kernel of another collection is a layer of its own."""

    class Frozen(nnx.Variable):
        """What is not trained."""

    def make():
        model = nnx.Linear(3, 10, rngs=nnx.Rngs(0))
        model.kernel = Frozen(model.kernel[...])
        return model

    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    layers = kfe.find_layers(
        lambda model, x, labels: cross_entropy(model(x), labels), nnx.eval_shape(make), x, LABELS
    )
    assert {name: layer.kind.name for name, layer in layers.items()} == {"bias": "norm"}
    assert not layers.rest


def test_the_program_grows_linearly_with_depth():
    """Twice the blocks, at most twice the equations of the program with taps."""

    def equations(blocks):
        model = ResNet((4, 4, 3), depth=6 * blocks + 2, width=0.25)
        x = jax.ShapeDtypeStruct((2, 48), jnp.float32)
        labels = jax.ShapeDtypeStruct((2,), jnp.int32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        params = variables["params"]

        def loss_fn(params, x, labels):
            statistics = jax.tree.map(lambda v: jnp.ones(v.shape), variables["batch_stats"])
            return cross_entropy(model.apply({"params": params, "batch_stats": statistics}, x), labels)

        layers = kfe.find_layers(loss_fn, params, x, labels)
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
        return len(jax.make_jaxpr(differentiate)(params, x, labels).eqns[-1].params["jaxpr"].eqns)

    assert equations(4) < 2.05 * equations(2)
