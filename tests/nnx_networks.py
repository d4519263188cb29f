"""NNX twins of the networks in `kfe_optax.experiments.models`, for discovery."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx


class ResidualBlock(nnx.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, channels, features, rngs):
        stride = 1 if channels == features else 2
        self.conv_1 = nnx.Conv(channels, features, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv_2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(features, rngs=rngs)
        self.shortcut = (
            nnx.Conv(channels, features, (1, 1), strides=stride, rngs=rngs) if stride > 1 else None
        )

    def __call__(self, x):
        branch = self.norm_2(self.conv_2(nnx.relu(self.norm_1(self.conv_1(x)))))
        return nnx.relu(branch + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """ResNet of depth 6 blocks + 2."""

    def __init__(self, blocks):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nnx.List([ResidualBlock(before, after, rngs) for before, after in pairs])
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Vgg(nnx.Module):
    """VGG16 with group norm."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        stacks = [(64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3]
        channels, layers = 3, []
        for stack in stacks:
            for features in stack:
                layers += [
                    nnx.Conv(channels, features, (3, 3), rngs=rngs),
                    nnx.GroupNorm(features, rngs=rngs),
                    nnx.relu,
                ]
                channels = features
            layers.append(functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)))
        self.body = nnx.Sequential(*layers)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(x).reshape(len(x), -1))


class Block(nnx.Module):
    """Attention and two linear layers, each on a layer norm's output and added to its input."""

    def __init__(self, width, rngs, causal=True, dtype=None):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, **options), nnx.LayerNorm(width, **options)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, **options)
        self.linear_1 = nnx.Linear(width, 4 * width, **options)
        self.linear_2 = nnx.Linear(4 * width, width, **options)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.causal = causal

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones((1, x.shape[1]))) if self.causal else None
        x = x + self.dropout(self.attention(self.norm_1(x), mask=mask))
        return x + self.dropout(self.linear_2(nnx.gelu(self.linear_1(self.norm_2(x)))))


class Gpt(nnx.Module):
    """Tokens to the logits of the next, the blocks under scan and remat."""

    def __init__(self, width=64, depth=4, tied=False, dtype=None):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(96, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((64, width)))

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(width, rngs, dtype=dtype)

        self.blocks = make(rngs)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = None if tied else nnx.Linear(width, 96, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        x = self.embed(tokens)
        x = self.norm(run(x + self.positions[...].astype(x.dtype), self.blocks))
        return self.embed.attend(x) if self.head is None else self.head(x)


class VisionTransformer(nnx.Module):
    """Patches of an image through blocks."""

    def __init__(self, width=64, depth=3):
        rngs = nnx.Rngs(0)
        self.patches = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((64, width)))
        self.blocks = nnx.List([Block(width, rngs, causal=False) for _ in range(depth)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images).reshape(len(images), -1, 64) + self.positions[...]
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(x.mean(1))


class Recurrent(nnx.Module):
    """Tokens to the logits of the next through a cell, or one in each direction."""

    def __init__(self, cell, both=False):
        rngs, width = nnx.Rngs(0), 32
        self.embed = nnx.Embed(96, width, rngs=rngs)
        loops = [nnx.RNN(cell(width, width, rngs=rngs), rngs=rngs) for _ in range(1 + both)]
        self.loop = nnx.Bidirectional(*loops, rngs=rngs) if both else loops[0]
        self.head = nnx.Linear((1 + both) * width, 96, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.loop(self.embed(tokens)))


def _partial(model, *args, **options):
    return functools.partial(model, *args, **options)


# name → (how to make it, whether it reads text, layers, parameters outside)
NETWORKS = {
    "resnet20": (_partial(ResNet, 3), False, 40, {}),
    "vgg16": (Vgg, False, 27, {}),
    "vit": (VisionTransformer, False, 26, {"positions": "no supported layer reads it ("}),
    "gpt": (Gpt, True, 11, {"positions": "no supported layer reads it ("}),
    "tied gpt": (_partial(Gpt, tied=True), True, 10, {"positions": "no supported layer reads it ("}),
    "lstm": (_partial(Recurrent, nnx.LSTMCell), True, 10, {}),
    "optimized lstm": (_partial(Recurrent, nnx.OptimizedLSTMCell), True, 4, {}),
    "gru": (_partial(Recurrent, nnx.GRUCell), True, 4, {}),
    "simple": (_partial(Recurrent, nnx.SimpleCell), True, 4, {}),
    "two directions": (_partial(Recurrent, nnx.LSTMCell, both=True), True, 18, {}),
}
