"""Convolutional networks for small images, with or without batch norm: VGG, and residual networks."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen as nn

from kfe_optax.experiments.errors import chosen, require
from kfe_optax.experiments.models.dense import normalized, scaled_normal

# The channels of each stack of convolutions, by the number of layers of the original network.
_STACKS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}
# Blocks a stage of the residual networks with four stages, by depth.
_FOUR_STAGES: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def _convolution(
    channels: int, name: str, batch_norm: bool, *, numerator: float = 2.0, **options: Any
) -> nn.Conv:
    """A convolution that keeps the image's size, but for a stride; it has a bias where no norm follows."""
    options = {"kernel_size": (3, 3), "kernel_init": scaled_normal(numerator), **options}
    return nn.Conv(channels, use_bias=not batch_norm, name=name, **options)


def _scaled(width: float, channels: int) -> int:
    return max(1, round(width * channels))


class VGG(nn.Module):
    """VGG11 or VGG16 in its form for 32x32 images; the outputs are logits.

    Five stacks of convolutions, each before a 2x2 max pooling, leave one position of a 32x32 image, and no
    dense layers follow but the last.
    """

    image_shape: tuple[int, int, int]
    classes: int = 10
    depth: int = 16
    width: float = 1.0
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(-1, *self.image_shape)
        number = 0
        for stack in chosen("config.model.depth", self.depth, _STACKS):
            for channels in stack:
                number += 1
                numerator = 1.0 if number == 1 else 2.0
                channels = _scaled(self.width, channels)
                x = _convolution(channels, f"conv_{number}", self.batch_norm, numerator=numerator)(x)
                x = jax.nn.relu(normalized(x, f"norm_{number}", batch_norm=self.batch_norm, train=train))
            # Padded, so that images of another size than 32 do not vanish.
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        x = x.reshape(len(x), -1)
        return nn.Dense(self.classes, kernel_init=scaled_normal(2.0), name="logits")(x)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    channels: int
    stride: int
    batch_norm: bool
    pre_activation: bool
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(normalized, batch_norm=self.batch_norm, train=self.train)
        convolved = functools.partial(_convolution, self.channels, batch_norm=self.batch_norm)
        first, second = ("norm_1", "norm_2") if self.pre_activation else ("", "norm_1")
        branch = jax.nn.relu(norm(x, first)) if first else x
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.channels:
            shortcut = convolved("projection", kernel_size=(1, 1), strides=self.stride)(branch)
            if not self.pre_activation:
                shortcut = norm(shortcut, "projection_norm")
        branch = jax.nn.relu(norm(convolved("conv_1", strides=self.stride)(branch), second))
        # The branch's last kernel is small where no norm would undo it.
        branch = convolved("conv_2", numerator=2.0 if self.batch_norm else 0.2)(branch)
        return shortcut + branch if self.pre_activation else jax.nn.relu(shortcut + norm(branch, "norm_2"))


class ResNet(nn.Module):
    """A residual network of basic blocks behind a 3x3 convolution; the outputs are logits.

    Depths 18 and 34 have four stages of 64 to 512 channels; 6k + 2 (20, 32, 56, 110, ...) three stages of 16,
    32 and 64 channels with k blocks each. ``pre_activation`` puts norm and ReLU before the convolutions
    instead of behind them (He et al. 2016). Without batch norm every convolution has a bias, and the
    initial kernels are those of George et al. (2018, appendix B).
    """

    image_shape: tuple[int, int, int]
    classes: int = 10
    depth: int = 20
    width: float = 1.0
    batch_norm: bool = True
    pre_activation: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        small = self.depth >= 8 and self.depth % 6 == 2
        words = f"config.model.depth is {self.depth}; a residual network has 18, 34, or 6k + 2 (20, 32, 110)."
        require(small or self.depth in _FOUR_STAGES, words)
        stages = (self.depth // 6,) * 3 if small else _FOUR_STAGES[self.depth]
        norm = functools.partial(normalized, batch_norm=self.batch_norm, train=train)
        channels = _scaled(self.width, 16 if small else 64)
        x = images.reshape(-1, *self.image_shape)
        x = _convolution(channels, "stem", self.batch_norm, numerator=1.0)(x)
        if not self.pre_activation:
            x = jax.nn.relu(norm(x, "stem_norm"))
        for stage, blocks in enumerate(stages):
            channels = _scaled(self.width, (16 if small else 64) * 2**stage)
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                name = f"stage_{stage + 1}_block_{block + 1}"
                x = Block(channels, stride, self.batch_norm, self.pre_activation, train, name=name)(x)
        if self.pre_activation:
            x = jax.nn.relu(norm(x, "last_norm"))
        return nn.Dense(self.classes, kernel_init=scaled_normal(2.0), name="logits")(x.mean((1, 2)))
