"""NNX and plain JAX members of the zoo (see `models`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import kfe_optax as kfe

from .models import CLASSES, INPUTS, WIDTH, batch, case, cross_entropy, nnx_loss, nnx_model, randomized

IN, HID, OUT = (INPUTS + 1, WIDTH), (WIDTH + 1, WIDTH), (WIDTH + 1, CLASSES)
NORM = (WIDTH, 1, 2)


def linear(d, d_out, dtype, rngs, **options):
    return nnx.Linear(d, d_out, param_dtype=dtype, rngs=rngs, **options)


class Mlp(nnx.Module):
    """Linear layers with tanh in between; `around` may wrap the call of the middle one."""

    def __init__(self, dtype, around=lambda f: f):
        rngs = nnx.Rngs(0)
        self.first = linear(INPUTS, WIDTH, dtype, rngs)
        self.middle = linear(WIDTH, WIDTH, dtype, rngs)
        self.last = linear(WIDTH, CLASSES, dtype, rngs)
        self.around = around

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        x = self.around(lambda layer, x: jnp.tanh(layer(x)))(self.middle, x)
        return self.last(x)


@case(IN, HID, OUT)
def nnx_mlp(dtype):
    return nnx_loss, nnx_model(Mlp(dtype), dtype), batch(dtype)


@case(IN, HID, OUT, tier="nightly")
def nnx_remat(dtype):
    return nnx_loss, nnx_model(Mlp(dtype, nnx.remat), dtype), batch(dtype)


@case(IN, HID, OUT, tier="slow")
def nnx_jit(dtype):
    return nnx_loss, nnx_model(Mlp(dtype, nnx.jit), dtype), batch(dtype)


class Scanned(nnx.Module):
    """nnx.scan over two stacked layers, optionally rematerialized."""

    def __init__(self, dtype, around=lambda f: f):
        rngs = nnx.Rngs(0)
        self.first = linear(INPUTS, WIDTH, dtype, rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return linear(WIDTH, WIDTH, dtype, rngs)

        self.blocks = make(rngs)
        self.last = linear(WIDTH, CLASSES, dtype, rngs)
        self.around = around

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @self.around
        def run(x, layer):
            return jnp.tanh(layer(x))

        return self.last(run(jnp.tanh(self.first(x)), self.blocks))


@case(IN, (2, *HID), OUT, tier="slow")
def nnx_scan(dtype):
    return nnx_loss, nnx_model(Scanned(dtype), dtype), batch(dtype)


@case(IN, (2, *HID), OUT, tier="nightly")
def nnx_remat_scan(dtype):
    return nnx_loss, nnx_model(Scanned(dtype, nnx.remat), dtype), batch(dtype)


class Regularized(nnx.Module):
    """Batch statistics and dropout between linear layers."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.first = linear(INPUTS, WIDTH, dtype, rngs)
        self.norm = nnx.BatchNorm(WIDTH, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = linear(WIDTH, CLASSES, dtype, rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


@case(IN, NORM, OUT, independent=False, tier="slow")
def batch_norm_dropout(dtype):
    return nnx_loss, nnx_model(Regularized(dtype), dtype), batch(dtype)


class Listed(nnx.Module):
    """Layers in an nnx.List, one of them without a bias."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(
            [linear(INPUTS, WIDTH, dtype, rngs), linear(WIDTH, CLASSES, dtype, rngs, use_bias=False)]
        )

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


@case(IN, (WIDTH, CLASSES), tier="slow")
def nnx_list(dtype):
    return nnx_loss, nnx_model(Listed(dtype), dtype), batch(dtype)


class Tied(nnx.Module):
    """One layer called twice, on an input with an axis of positions."""

    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.first = linear(INPUTS, WIDTH, dtype, rngs)
        self.middle = linear(WIDTH, WIDTH, dtype, rngs)
        self.last = linear(WIDTH, CLASSES, dtype, rngs)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        return self.last(jnp.tanh(self.middle(jnp.tanh(self.middle(x)))).sum(1))


@case(IN, HID, OUT, shared=(1,), tier="nightly")
def nnx_twice(dtype):
    return nnx_loss, nnx_model(Tied(dtype), dtype), batch(dtype, 2, INPUTS)


def dense(layer, x):
    """A tagged dense layer of plain JAX."""
    return kfe.tag_dense(x, x @ layer["kernel"] + layer["bias"], layer)


def dense_params(*sizes):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return [{"kernel": jnp.zeros((d, d_out)), "bias": jnp.zeros(d_out)} for d, d_out in pairs]


@case(IN, HID, OUT)
def plain_jax(dtype):
    """A list of layers, tagged by hand."""

    def loss_fn(params, x, labels):
        x = jnp.tanh(dense(params[0], x))
        return cross_entropy(dense(params[2], jnp.tanh(dense(params[1], x))), labels)

    return loss_fn, randomized(dense_params(INPUTS, WIDTH, WIDTH, CLASSES), dtype), batch(dtype)


@case(IN, (2, *HID), OUT, tier="slow")
def plain_scan(dtype):
    """jax.lax.scan over stacked layers under jax.checkpoint."""

    def loss_fn(params, x, labels):
        x = jnp.tanh(dense(params["first"], x))
        body = jax.checkpoint(lambda x, layer: (jnp.tanh(dense(layer, x)), None))
        x, _ = jax.lax.scan(body, x, params["blocks"])
        return cross_entropy(dense(params["last"], x), labels)

    first, middle, last = dense_params(INPUTS, WIDTH, WIDTH, CLASSES)
    params = {"first": first, "blocks": jax.tree.map(lambda v: jnp.stack([v, v]), middle), "last": last}
    return loss_fn, randomized(params, dtype), batch(dtype)
