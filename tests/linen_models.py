"""Linen members of the zoo (see `models`)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

import kfe_optax as kfe

from .models import (
    CLASSES,
    INPUTS,
    WIDTH,
    batch,
    case,
    cross_entropy,
    linen,
    parameter_shapes,
    randomized,
)

IN, HID, OUT = (INPUTS + 1, WIDTH), (WIDTH + 1, WIDTH), (WIDTH + 1, CLASSES)
NORM = (WIDTH, 1, 2)


class Block(nn.Module):
    """tanh(Dense(x)), with the (carry, output) signature of a scan's body."""

    width: int = WIDTH

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(self.width, name="dense")(x)), None


class Stack(nn.Module):
    """Dense, then Blocks under a lifted transformation made by `lift`, then Dense."""

    lift: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(WIDTH, name="first")(x))
        x = self.lift(x)
        return nn.Dense(CLASSES, name="last")(x)


def stack(lift):
    return lambda dtype: linen(Stack(lift), dtype, *batch(dtype))


def scanned(axis, block=Block, length=2):
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)


@case(IN, HID, OUT)
def mlp(dtype):
    return linen(Stack(lambda x: Block(name="block")(x)[0]), dtype, *batch(dtype))


@case(IN, HID, OUT, tier="nightly")
def frozen_dict(dtype):
    return linen(Stack(lambda x: Block(name="block")(x)[0]), dtype, *batch(dtype), freeze_params=True)


@case((INPUTS, WIDTH), (WIDTH, CLASSES), tier="nightly")
def no_bias(dtype):
    layers = [nn.Dense(WIDTH, use_bias=False), nn.tanh, nn.Dense(CLASSES, use_bias=False)]
    return linen(nn.Sequential(layers), dtype, *batch(dtype))


@case(IN, HID, OUT, tier="nightly")
def remat(dtype):
    return stack(lambda x: nn.remat(Block)(name="block")(x)[0])(dtype)


@case(IN, HID, OUT, tier="nightly")
def linen_jit(dtype):
    return stack(lambda x: nn.jit(Block)(name="block")(x)[0])(dtype)


@case(IN, (2, *HID), OUT, tier="nightly")
def scan_axis_0(dtype):
    return stack(lambda x: scanned(0)(name="blocks")(x, None)[0])(dtype)


@case(IN, (2, *HID), OUT, tier="nightly")
def scan_axis_1(dtype):
    return stack(lambda x: scanned(1)(name="blocks")(x, None)[0])(dtype)


@case(IN, (2, *HID), OUT, tier="slow")
def scan_axis_last(dtype):
    return stack(lambda x: scanned(-1)(name="blocks")(x, None)[0])(dtype)


@case(IN, (2, *HID), OUT, tier="slow")
def remat_scan(dtype):
    return stack(lambda x: scanned(0, nn.remat(Block))(name="blocks")(x, None)[0])(dtype)


@case(IN, (3, 2, *HID), OUT, tier="slow")
def nested_scan(dtype):
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return scanned(0)(name="inner")(x, None)[0], None

    return stack(lambda x: scanned(0, Inner, 3)(name="outer")(x, None)[0])(dtype)


@case(IN, HID, OUT, tier="slow")
def warmed_jit(dtype):
    """The model and the loss inside one jit that was called, and so traced, before."""
    plain, params, args = mlp(dtype)
    inner = jax.jit(plain)
    inner(params, *args)

    def loss_fn(params, x, labels):
        return inner(params, x, labels)

    return loss_fn, params, args


@case(IN, HID, OUT, shared=(1,))
def called_twice(dtype):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(WIDTH)(x))
            middle = nn.Dense(WIDTH, name="middle")
            return nn.Dense(CLASSES)(nn.tanh(middle(nn.tanh(middle(x)))))

    return linen(Twice(), dtype, *batch(dtype))


class Cell(nn.Module):
    """A recurrent cell made of Dense."""

    @nn.compact
    def __call__(self, carry, x):
        new = nn.tanh(nn.Dense(WIDTH, name="in")(x) + nn.Dense(WIDTH, use_bias=False, name="hid")(carry))
        return new, new


@case(IN, (WIDTH, WIDTH), OUT, shared=(0, 1))
def over_time(dtype):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            loop = nn.scan(
                Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
            )
            start = jnp.zeros((x.shape[0], WIDTH), x.dtype)
            return nn.Dense(CLASSES)(loop(name="cell")(start, x)[0])

    return linen(Recurrent(), dtype, *batch(dtype, 4, INPUTS))


@case(IN, OUT, tier="slow")
def example_vmap(dtype):
    """The model and the loss written for one example, mapped over the batch."""
    model = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(CLASSES)])
    x, labels = batch(dtype)
    params = randomized(parameter_shapes(model, x), dtype)

    def loss_fn(params, x, labels):
        def one(x, label):
            logits = model.apply({"params": params}, x)
            return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, label)

        return jax.vmap(one)(x, labels).mean()

    return loss_fn, params, (x, labels)


@case(IN, OUT)
def model_vmap(dtype):
    """The model mapped over the batch, the loss outside."""
    model = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(CLASSES)])
    x, labels = batch(dtype)
    params = randomized(parameter_shapes(model, x), dtype)

    def loss_fn(params, x, labels):
        return cross_entropy(jax.vmap(lambda x: model.apply({"params": params}, x))(x), labels)

    return loss_fn, params, (x, labels)


@case(IN, OUT, shared=(0, 1), independent=False, example_gradients=False, tier="slow")
def chunks(dtype):
    """Loss and model inside a lax.map over chunks of the batch."""
    model = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(CLASSES)])
    x, labels = batch(dtype)
    params = randomized(parameter_shapes(model, x), dtype)

    def loss_fn(params, x, labels):
        split = (x.reshape(2, -1, *x.shape[1:]), labels.reshape(2, -1))
        return jax.lax.map(lambda c: cross_entropy(model.apply({"params": params}, c[0]), c[1]), split).mean()

    return loss_fn, params, (x, labels)


@case((IN[0], 2 * IN[1]), (2, *OUT), tier="slow")
def ensemble(dtype):
    class Members(nn.Module):
        @nn.compact
        def __call__(self, x):
            kwargs = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
            x = nn.tanh(nn.vmap(nn.Dense, axis_size=2, **kwargs)(WIDTH, name="a")(x))
            kwargs["in_axes"] = 0
            return nn.vmap(nn.Dense, axis_size=2, **kwargs)(CLASSES, name="b")(x).mean(0)

    return linen(Members(), dtype, *batch(dtype))


@case(IN, HID, OUT, tier="slow")
def two_models(dtype):
    """An encoder and a head with their own parameter trees in one dict."""
    encoder = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(WIDTH)])
    head = nn.Dense(CLASSES)
    x, labels = batch(dtype)
    params = {
        "encoder": parameter_shapes(encoder, x),
        "head": parameter_shapes(head, jnp.zeros((1, WIDTH), dtype)),
    }

    def loss_fn(params, x, labels):
        hidden = encoder.apply({"params": params["encoder"]}, x)
        return cross_entropy(head.apply({"params": params["head"]}, nn.tanh(hidden)), labels)

    return loss_fn, randomized(params, dtype), (x, labels)


@case(OUT, tier="nightly")
def frozen_part(dtype):
    """The first layer behind a stop_gradient."""
    model = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(CLASSES)])
    x, labels = batch(dtype)
    params = randomized(parameter_shapes(model, x), dtype)

    def loss_fn(params, x, labels):
        params = {**params, "layers_0": jax.lax.stop_gradient(params["layers_0"])}
        return cross_entropy(model.apply({"params": params}, x), labels)

    return loss_fn, params, (x, labels)


@case(IN, NORM, OUT)
def norm_between(dtype):
    layers = [nn.Dense(WIDTH), nn.LayerNorm(), nn.tanh, nn.Dense(CLASSES)]
    return linen(nn.Sequential(layers), dtype, *batch(dtype))


@case(IN, OUT)
def positions(dtype):
    """An axis of shared positions, pooled before the last layer."""

    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(CLASSES)(nn.tanh(nn.Dense(WIDTH)(x)).mean(1))

    return linen(Pooled(), dtype, *batch(dtype, 2, INPUTS))


@case(IN, OUT)
def flattened_positions(dtype):
    """The positions flattened into the batch axis, as (n t, d)."""

    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            rows = nn.tanh(nn.Dense(WIDTH)(x.reshape(-1, x.shape[-1])))
            return nn.Dense(CLASSES)(rows.reshape(x.shape[0], -1, WIDTH).sum(1))

    return linen(Flat(), dtype, *batch(dtype, 2, INPUTS))


@case(IN, OUT)
def integer_inputs(dtype):
    """One-hot rows of integers."""
    x, labels = batch(dtype)
    layers = [nn.Dense(WIDTH, dtype=dtype), nn.tanh, nn.Dense(CLASSES)]
    return linen(nn.Sequential(layers), dtype, (x > 0).astype(int), labels)


@case(IN, OUT, has_aux=True, tier="nightly")
def with_aux(dtype):
    model = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(CLASSES)])
    x, labels = batch(dtype)
    params = randomized(parameter_shapes(model, x), dtype)

    def loss_fn(params, x, labels):
        logits = model.apply({"params": params}, x)
        return cross_entropy(logits, labels), {"logits": logits}

    return loss_fn, params, (x, labels)
