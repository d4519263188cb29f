"""Residual networks for small images, with or without batch norm, before or after activation."""

from __future__ import annotations

import functools

import jax
from flax import linen as nn

from kfe_optax.experiments.models.parts import convolution, normalized, scaled, scaled_normal

# Blocks a stage of the networks with four stages, by depth.
_FOUR_STAGES: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def stages(depth: int) -> tuple[tuple[int, int], ...] | None:
    """(blocks, channels) of each stage; None for a depth that no network has.

    18 and 34 are the four stages of 64 to 512 channels; 6k + 2 (20, 32, 56, 110, ...) is three stages
    of 16, 32 and 64 channels with k blocks each.
    """
    if depth in _FOUR_STAGES:
        return tuple(zip(_FOUR_STAGES[depth], (64, 128, 256, 512), strict=True))
    if depth >= 8 and depth % 6 == 2:
        return tuple((depth // 6, channels) for channels in (16, 32, 64))
    return None


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    channels: int
    stride: int
    batch_norm: bool
    pre_activation: bool
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # The branch's last kernel is small where no norm would undo it.
        end = 2.0 if self.batch_norm else 0.2
        convolved = functools.partial(convolution, self.channels, batch_norm=self.batch_norm)
        branch = self._active(x, "norm_1") if self.pre_activation else x
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.channels:
            shortcut = convolved("projection", size=1, stride=self.stride)(branch)
            if not self.pre_activation:
                shortcut = self._norm(shortcut, "projection_norm")
        branch = convolved("conv_1", stride=self.stride)(branch)
        branch = self._active(branch, "norm_2" if self.pre_activation else "norm_1")
        branch = convolved("conv_2", numerator=end)(branch)
        if self.pre_activation:
            return shortcut + branch
        return jax.nn.relu(shortcut + self._norm(branch, "norm_2"))

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return normalized(x, name, batch_norm=self.batch_norm, train=self.train)

    def _active(self, x: jax.Array, name: str) -> jax.Array:
        return jax.nn.relu(self._norm(x, name))


class ResNet(nn.Module):
    """A residual network of basic blocks behind a 3x3 convolution; the outputs are logits.

    ``pre_activation`` puts norm and ReLU before the convolutions instead of behind them (He et al.
    2016). Without batch norm every convolution has a bias, and the initial kernels are those of
    George et al. (2018, appendix B).

    Example::

        model = ResNet(image_shape=(32, 32, 3), depth=20)
        variables = model.init(key, flat_images)  # flat_images (n, 3072)
        logits, moved = model.apply(variables, flat_images, train=True, mutable=["batch_stats"])
    """

    image_shape: tuple[int, int, int]
    classes: int = 10
    depth: int = 20
    width: float = 1.0
    batch_norm: bool = True
    pre_activation: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(-1, *self.image_shape)
        plan = stages(self.depth)
        if plan is None:
            raise ValueError(f"There is no residual network of depth {self.depth}.")
        norm = functools.partial(normalized, batch_norm=self.batch_norm, train=train)
        channels = scaled(self.width, plan[0][1])
        x = convolution(channels, "stem", numerator=1.0, batch_norm=self.batch_norm)(x)
        if not self.pre_activation:
            x = jax.nn.relu(norm(x, "stem_norm"))
        for stage, (blocks, channels) in enumerate(plan, start=1):
            for block in range(1, blocks + 1):
                x = Block(
                    channels=scaled(self.width, channels),
                    stride=2 if block == 1 and stage > 1 else 1,
                    batch_norm=self.batch_norm,
                    pre_activation=self.pre_activation,
                    train=train,
                    name=f"stage_{stage}_block_{block}",
                )(x)
        if self.pre_activation:
            x = jax.nn.relu(norm(x, "last_norm"))
        x = x.mean((1, 2))
        return nn.Dense(self.classes, kernel_init=scaled_normal(2.0), name="logits")(x)
