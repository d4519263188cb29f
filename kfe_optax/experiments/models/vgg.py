"""VGG for small images: stacks of 3x3 convolutions between poolings, and a dense head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from kfe_optax.experiments.models.parts import convolution, normalized, scaled, scaled_normal

# The channels of each stack of convolutions, by the number of layers of the original network.
STACKS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class VGG(nn.Module):
    """VGG11 or VGG16 in its form for 32x32 images; the outputs are logits.

    Five stacks of convolutions, each before a 2x2 max pooling, leave one position of a 32x32 image.
    ``head`` are the sizes of the dense layers between it and the logits; the CIFAR form has none.

    Example::

        model = VGG(image_shape=(32, 32, 3), depth=11, batch_norm=False)
        params = model.init(key, flat_images)["params"]  # flat_images (n, 3072)
    """

    image_shape: tuple[int, int, int]
    classes: int = 10
    depth: int = 16
    width: float = 1.0
    head: Sequence[int] = ()
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(-1, *self.image_shape)
        number = 0
        for stack in STACKS[self.depth]:
            for channels in stack:
                number += 1
                x = convolution(
                    scaled(self.width, channels),
                    f"conv_{number}",
                    numerator=1.0 if number == 1 else 2.0,
                    batch_norm=self.batch_norm,
                )(x)
                x = normalized(x, f"norm_{number}", batch_norm=self.batch_norm, train=train)
                x = jax.nn.relu(x)
            # Padded, so that images of another size than 32 do not vanish.
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        x = x.reshape(len(x), -1)
        for index, size in enumerate(self.head, start=1):
            size = scaled(self.width, size)
            x = jax.nn.relu(nn.Dense(size, kernel_init=scaled_normal(2.0), name=f"dense_{index}")(x))
        return nn.Dense(self.classes, kernel_init=scaled_normal(2.0), name="logits")(x)
