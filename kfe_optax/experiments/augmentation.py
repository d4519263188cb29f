"""Random variations of a batch of images: the crop and the flip of the papers on CIFAR-10.

George et al. (2018) train their ResNet on images padded by 4 pixels of zeros on every side and
cropped back at a random place, half of them mirrored. Rows reach this file as the network sees
them, so that the padding is zero after a normalization: the training set's mean color. Without
one it is black.
"""

from __future__ import annotations

import numpy as np

from kfe_optax.experiments.errors import ExperimentError

_CHOICES = ("crop", "flip")
_PADDING = 4  # pixels on each side


def augmentations(names: str, image_shape: tuple[int, ...]) -> tuple[str, ...]:
    """The augmentations in ``config.data.augment``, such as ``"crop,flip"``, checked.

    Raises:
      ExperimentError: a name is unknown, or the data are not images of a known height and width.
    """
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    unknown = [name for name in found if name not in _CHOICES]
    if unknown:
        raise ExperimentError(
            f"config.data.augment holds '{unknown[0]}'; choose from {', '.join(_CHOICES)}, with commas "
            "between them, or leave it empty."
        )
    if found and len(image_shape) not in (2, 3):
        raise ExperimentError(
            f"config.data.augment is '{names}' and one example has shape {image_shape}; only images of "
            "shape (height, width) or (height, width, channels) can be augmented: leave it empty."
        )
    return found


def augment_images(
    rows: np.ndarray,
    image_shape: tuple[int, ...],
    names: tuple[str, ...],
    generator: np.random.Generator,
    *,
    batch: tuple[int, slice] | None = None,
) -> np.ndarray:
    """The images (n, pixels) with each one varied on its own, as rows again.

    ``"crop"`` pads with 4 zeros on every side and cuts a window of the image's size out at one of
    the 81 places; ``"flip"`` mirrors left and right with probability 1/2. Where the rows are a part of a
    batch, ``batch`` is its size and their place in it, and they vary as they do in the whole.

    Example::

        generator = np.random.default_rng((seed, step, 1))
        rows = augment_images(rows, (32, 32, 3), ("crop", "flip"), generator)
    """
    height, width, channels = (*image_shape, 1)[:3]
    images = rows.reshape(-1, height, width, channels)
    count, own = batch or (len(images), slice(None))
    if "crop" in names:
        images = _cropped(images, *generator.integers(0, 2 * _PADDING + 1, (2, count))[:, own])
    if "flip" in names:
        mirrored = generator.random(count)[own] < 0.5
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return images.reshape(rows.shape)


def _cropped(images: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The windows at ``top`` and ``left`` of the padded images (n, height, width, channels)."""
    count, height, width, channels = images.shape
    # A pixel's channels lie side by side, so that a line of a window is one piece of memory.
    lines = images.reshape(count, height, width * channels)
    padded = np.pad(lines, ((0, 0), (_PADDING, _PADDING), (_PADDING * channels, _PADDING * channels)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width * channels), axis=(1, 2))
    return windows[np.arange(count), top, left * channels].reshape(images.shape)
