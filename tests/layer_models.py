"""Members of the zoo for each kind of Linen layer: convolutions, linear maps, norms, embeddings (see `models`)."""

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
    tokens,
)

NORM = (WIDTH, 1, 2)
HEAD = (WIDTH + 1, CLASSES)
VOCABULARY = 5


class Pooled(nn.Module):
    """A layer made by `body`, tanh, the mean over positions, Dense."""

    body: object

    @nn.compact
    def __call__(self, x):
        y = nn.tanh(self.body(x))
        return nn.Dense(CLASSES)(y.mean(tuple(range(1, y.ndim - 1))))


def pooled(body, *shape):
    return lambda dtype: linen(Pooled(body), dtype, *batch(dtype, *shape))


def stacked(block, axis, length=2):
    """`block`, a function of x, in a scan over stacked layers."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return block(x), None

    return nn.scan(Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)


@case((9 * 2, WIDTH), NORM, (WIDTH, 1, 2), HEAD, independent=False, has_aux=True)
def conv_norm_pool(dtype):
    """Convolution, batch norm of a batch, pooling, layer norm; the loss returns the moved statistics."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(WIDTH, (3, 3), use_bias=False)(x)
            x = nn.tanh(nn.BatchNorm(use_running_average=False)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            return nn.Dense(CLASSES)(nn.tanh(nn.LayerNorm()(x.mean((1, 2)))))

    model, (x, labels) = Model(), batch(dtype, 4, 4, 2)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params = randomized(variables["params"], dtype)
    statistics = jax.tree.map(lambda v: jnp.ones(v.shape, dtype), variables["batch_stats"])

    def loss_fn(params, x, labels, statistics):
        variables = {"params": params, "batch_stats": statistics}
        logits, moved = model.apply(variables, x, mutable=["batch_stats"])
        return cross_entropy(logits, labels), moved

    return loss_fn, params, (x, labels, statistics)


@case((2, 2 * 3 * 2 + 1, WIDTH // 2), HEAD, tier="nightly")
def conv_groups_dilated(dtype):
    """Feature groups, kernel dilation, stride and padding on one side, on images that are not square."""

    def body(x):
        padding = [(2, 0), (0, 1)]
        options = {"feature_group_count": 2, "kernel_dilation": (2, 1), "strides": (2, 1), "padding": padding}
        return nn.Conv(WIDTH, (2, 3), **options)(x)

    return pooled(body, 5, 4, 4)(dtype)


@case((2 * 2 + 1, WIDTH), HEAD, tier="nightly")
def conv_causal(dtype):
    return pooled(lambda x: nn.Conv(WIDTH, (2,), padding="CAUSAL", kernel_dilation=2)(x), 5, 2)(dtype)


@case((3 * 2 + 1, WIDTH), (4 * WIDTH + 1, WIDTH), HEAD, tier="nightly")
def conv_transpose(dtype):
    """One that puts zeros between, one whose stored kernel is flipped."""

    def body(x):
        x = nn.tanh(nn.ConvTranspose(WIDTH, (3,), strides=(2,))(x))
        return nn.ConvTranspose(WIDTH, (4,), strides=(3,), padding="VALID", transpose_kernel=True)(x)

    return pooled(body, 3, 2)(dtype)


@case((3, 2 * 2 + 1, WIDTH), HEAD, tier="nightly")
def conv_local(dtype):
    return pooled(lambda x: nn.ConvLocal(WIDTH, (2,))(x), 3, 2)(dtype)


@case((2, 3 * WIDTH + 1, WIDTH), HEAD, tier="slow")
def conv_scan(dtype):
    def body(x):
        return stacked(lambda x: nn.tanh(nn.Conv(WIDTH, (3,))(x)), 0)()(x, None)[0]

    return pooled(body, 3, WIDTH)(dtype)


@case((3 * WIDTH + 1, WIDTH), HEAD, shared=(0,), tier="nightly")
def conv_repeated(dtype):
    """One convolution called twice, on images of different sizes."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(WIDTH, (3,), strides=2)
            return nn.Dense(CLASSES)(nn.tanh(conv(nn.tanh(conv(x)))).mean(1))

    return linen(Model(), dtype, *batch(dtype, 5, WIDTH))


@case((2 * 3 + 1, 2 * WIDTH), (2, WIDTH, WIDTH), (2 * WIDTH, WIDTH), HEAD, tier="nightly")
def linear_maps(dtype):
    """DenseGeneral over two axes, one with a batch axis, an einsum."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.DenseGeneral((2, WIDTH), axis=(-2, -1))(x))
            x = nn.DenseGeneral(WIDTH, axis=-1, batch_dims=(0,), use_bias=False)(x.swapaxes(0, 1))
            x = nn.tanh(nn.Einsum((2, WIDTH, WIDTH), "hni,hio->no", use_bias=False)(nn.tanh(x)))
            return nn.Dense(CLASSES)(x)

    return linen(Model(), dtype, *batch(dtype, 2, 3))


@case((WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), NORM, HEAD, tier="nightly")
def attention(dtype):
    """Query, key, value and out; without biases, since that of a key changes nothing."""

    def body(x):
        return nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2, use_bias=False)(x))

    return pooled(body, 3, WIDTH)(dtype)


@case(NORM, (WIDTH, 1, 1), NORM, (WIDTH, 1, 1), HEAD, tier="nightly")
def norms(dtype):
    """Group, RMS, instance and layer norm, the last without a scale."""

    def body(x):
        x = nn.tanh(nn.RMSNorm()(nn.tanh(nn.GroupNorm(2)(x))))
        x = nn.tanh(nn.InstanceNorm()(x))
        return nn.LayerNorm(use_scale=False)(x)

    return pooled(body, 3, WIDTH)(dtype)


@case((2, *NORM), HEAD, tier="slow")
def norm_scan_0(dtype):
    return pooled(lambda x: stacked(lambda x: nn.tanh(nn.LayerNorm()(x)), 0)()(x, None)[0], 3, WIDTH)(dtype)


@case((2, *NORM), HEAD, tier="nightly")
def norm_scan_last(dtype):
    return pooled(lambda x: stacked(lambda x: nn.tanh(nn.LayerNorm()(x)), -1)()(x, None)[0], 3, WIDTH)(dtype)


@case(NORM, HEAD, shared=(0,), tier="nightly")
def norm_repeated(dtype):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.LayerNorm()
            return nn.Dense(CLASSES)(nn.tanh(norm(nn.tanh(norm(x)))))

    return linen(Model(), dtype, *batch(dtype, WIDTH))


@case((4, 1, 2), HEAD, tier="nightly")
def norm_vmap(dtype):
    """A norm that sees one example at a time has a row an example."""
    model = nn.Sequential([nn.LayerNorm(), nn.tanh, nn.Dense(CLASSES)])
    x, labels = batch(dtype, WIDTH)
    params = randomized(parameter_shapes(model, x), dtype)

    def loss_fn(params, x, labels):
        return cross_entropy(jax.vmap(lambda x: model.apply({"params": params}, x))(x), labels)

    return loss_fn, params, (x, labels)


@case((VOCABULARY, WIDTH), HEAD)
def embedding(dtype):
    return linen(Pooled(nn.Embed(VOCABULARY, WIDTH, name="embed")), dtype, *tokens(VOCABULARY, 3))


@case((VOCABULARY, WIDTH), (WIDTH + 1, WIDTH), shared=(0,))
def tied_embedding(dtype):
    """A table that is the last layer as well, with a loss at every position."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            embed = nn.Embed(VOCABULARY, WIDTH)
            return embed.attend(nn.tanh(nn.Dense(WIDTH)(embed(x))))

    x, _ = tokens(VOCABULARY, 3)
    return linen(Model(), dtype, x, (x + 1) % VOCABULARY)


@case((WIDTH + 1, INPUTS), (INPUTS + 1, 2), (3, 1), shared=(1, 2))
def adversarial(dtype):
    """A generator, and a discriminator that sees its images and real ones; two trees, two losses."""
    generator, discriminator = nn.Dense(INPUTS), nn.Sequential([nn.Dense(2), nn.tanh, nn.Dense(1)])
    real, _ = batch(dtype)
    noise, _ = batch(dtype, WIDTH)
    shapes = {
        "generator": parameter_shapes(generator, noise),
        "discriminator": parameter_shapes(discriminator, real),
    }

    def loss_fn(params, real, noise):
        def judged(x, label):
            logits = discriminator.apply({"params": params["discriminator"]}, x)
            return kfe.losses.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, label)).mean()

        images = generator.apply({"params": params["generator"]}, noise)
        return judged(real, 1) + judged(jnp.tanh(images), 0)

    return loss_fn, randomized(shapes, dtype), (real, noise)
