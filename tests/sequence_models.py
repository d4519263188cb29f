"""Members of the zoo that go through time or layers: recurrent cells, Transformers, adapters of low rank (see `models`)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from .models import CLASSES, WIDTH, batch, case, linen, nnx_loss, nnx_model, tokens
from .nnx_models import linear

HEAD = (WIDTH + 1, CLASSES)
NORM = (WIDTH, 1, 2)
VOCABULARY = 5
# Of each gate: from the input without a bias, from the hidden state with one.
GATES = ((WIDTH, WIDTH), (WIDTH + 1, WIDTH))
# The new state of a GRU's cell has a bias on both sides, its gates on the input's.
GRU = (*((WIDTH + 1, WIDTH), (WIDTH, WIDTH)) * 2, (WIDTH + 1, WIDTH), (WIDTH + 1, WIDTH))


def recurrent(cell):
    """The last state of a cell over time, in a dense layer."""

    def make(dtype):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(CLASSES)(nn.RNN(cell(WIDTH, param_dtype=dtype))(x)[:, -1])

        return linen(Model(), dtype, *batch(dtype, 3, WIDTH))

    return make


@case(*GATES * 4, HEAD, shared=tuple(range(8)), tier="nightly")
def lstm(dtype):
    return recurrent(nn.LSTMCell)(dtype)


@case(*GATES * 4, HEAD, shared=tuple(range(8)))
def optimized_lstm(dtype):
    return recurrent(nn.OptimizedLSTMCell)(dtype)


@case(*GRU, HEAD, shared=tuple(range(6)), tier="nightly")
def gru(dtype):
    return recurrent(nn.GRUCell)(dtype)


class Block(nn.Module):
    """A Transformer's block, the body of a scan."""

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(jnp.ones((1, x.shape[1])))
        attention = nn.MultiHeadDotProductAttention(2, use_bias=False)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.tanh(nn.LayerNorm()(x))), None


BLOCK = (NORM, *((WIDTH, WIDTH),) * 4, NORM, (WIDTH + 1, WIDTH))


@case((VOCABULARY, WIDTH), *((2, *shape) for shape in BLOCK), (WIDTH + 1, VOCABULARY), tier="slow")
def gpt(dtype):
    """Tokens, blocks under scan and remat, a loss at every position; the positions' parameter is the rest."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            where = self.param("positions", nn.initializers.zeros, (x.shape[1], WIDTH))
            x = nn.Embed(VOCABULARY, WIDTH)(x) + where
            loop = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return nn.Dense(VOCABULARY)(loop()(x, None)[0])

    x, _ = tokens(VOCABULARY, 3)
    return linen(Model(), dtype, x, (x + 1) % VOCABULARY)


class NnxConv(nnx.Module):
    """Convolution and batch norm that moves its statistics, depthwise transposed convolution."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        options = {"param_dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(2, WIDTH, (3,), use_bias=False, **options)
        self.norm = nnx.BatchNorm(WIDTH, **options)
        self.transposed = nnx.ConvTranspose(WIDTH, WIDTH, (3,), strides=2, **options)
        self.depthwise = nnx.Conv(WIDTH, WIDTH, (2,), feature_group_count=WIDTH, **options)
        self.head = linear(WIDTH, CLASSES, dtype, rngs)

    def __call__(self, x):
        x = jnp.tanh(self.transposed(jnp.tanh(self.norm(self.conv(x)))))
        return self.head(jnp.tanh(self.depthwise(x)).mean(1))


@case((6, WIDTH), NORM, (3 * WIDTH + 1, WIDTH), (WIDTH, 3, 1), HEAD, independent=False, tier="slow")
def nnx_conv(dtype):
    return nnx_loss, nnx_model(NnxConv(dtype), dtype), batch(dtype, 4, 2)


def attend(query, key, value, **_):
    """Attention in the precision of its inputs; NNX's own computes in float32."""
    weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", query, key))
    return jnp.einsum("nhqk,nkhd->nqhd", weights, value)


class NnxBlock(nnx.Module):
    """A Transformer's block."""

    def __init__(self, dtype, rngs):
        options = {"param_dtype": dtype, "rngs": rngs}
        self.norm = nnx.LayerNorm(WIDTH, **options)
        options = {"use_bias": False, "decode": False, "attention_fn": attend, **options}
        self.attention = nnx.MultiHeadAttention(2, WIDTH, **options)
        self.dense = linear(WIDTH, WIDTH, dtype, rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(self.attention(self.norm(x))))


class NnxGpt(nnx.Module):
    """A tied embedding around blocks under scan and remat."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, param_dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return NnxBlock(dtype, rngs)

        self.blocks = make(rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.embed.attend(run(self.embed(tokens), self.blocks))


@case(
    (VOCABULARY, WIDTH),
    (2, *NORM),
    *((2, WIDTH, WIDTH),) * 4,
    (2, WIDTH + 1, WIDTH),
    shared=(0,),
    tier="nightly",
)
def nnx_gpt(dtype):
    x, _ = tokens(VOCABULARY, 3)
    return nnx_loss, nnx_model(NnxGpt(dtype), dtype), (x, (x + 1) % VOCABULARY)


class NnxRecurrent(nnx.Module):
    """An embedding, a cell over time, a dense layer."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        options = {"param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(VOCABULARY, WIDTH, **options)
        self.loop = nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, WIDTH, **options), rngs=rngs)
        self.head = linear(WIDTH, CLASSES, dtype, rngs)

    def __call__(self, tokens):
        return self.head(self.loop(self.embed(tokens))[:, -1])


@case((VOCABULARY, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH + 1, 4 * WIDTH), HEAD, shared=(1, 2), tier="nightly")
def nnx_lstm(dtype):
    return nnx_loss, nnx_model(NnxRecurrent(dtype), dtype), tokens(VOCABULARY, 3)


class Frozen(nnx.Variable):
    """What the optimizer does not see."""


class LowRank(nnx.Module):
    """A frozen linear layer with an adapter of low rank, one that trains with its own, an einsum."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        options = {"param_dtype": dtype, "rngs": rngs}
        base = linear(3, WIDTH, dtype, rngs, use_bias=False)
        base.kernel = Frozen(base.kernel[...])
        self.first = nnx.LoRA(3, 2, WIDTH, base_module=base, **options)
        self.second = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, lora_param_dtype=dtype, **options)
        self.general = nnx.LinearGeneral(WIDTH, (2, WIDTH), **options)
        self.last = nnx.Einsum("nhi,hio->nho", (2, WIDTH, CLASSES), **options)

    def __call__(self, x):
        x = jnp.tanh(self.second(jnp.tanh(self.first(x))))
        return self.last(jnp.tanh(self.general(x))).sum(1)


@case(
    (3, 2),
    (2, WIDTH),
    (WIDTH + 1, WIDTH),
    (WIDTH, 2),
    (2, WIDTH),
    (WIDTH + 1, 2 * WIDTH),
    (2, WIDTH, CLASSES),
    tier="slow",
)
def nnx_low_rank(dtype):
    model = nnx_model(LowRank(dtype), dtype)
    frozen = nnx.state(model, Frozen)
    nnx.update(model, jax.tree.map(lambda v: v.astype(dtype), frozen))
    return nnx_loss, model, batch(dtype)
