"""Batches as a pure function of the seed and the step, so that a resumed run sees the same ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from kfe_optax.experiments.data import data_seed
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import require
from kfe_optax.experiments.parallel import WHOLE, Share

Batch = dict[str, np.ndarray]


class Batches:
    """Shuffled batches of a data set; the last partial batch of an epoch is dropped.

    The order of an epoch is a permutation drawn from (seed, epoch) alone, and the augmentation of a
    batch is drawn from (seed, step): ``batches(step)`` is the same whether the run came to this step in
    one go or was stopped and resumed.

    ``augment`` has names of ``AUGMENTATIONS`` with commas between them, for which ``image_shape`` is (height, width) or
    (height, width, channels), and ``share`` says which rows of every batch are drawn, where several processes share it.

    Example::

        batches = Batches(images, labels, batch_size=512, seed=0)
        batches(980)["image"].shape                     # (512, 784)
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        augment: str = "",
        image_shape: tuple[int, ...] = (),
        share: Share = WHOLE,
    ):
        count = len(images)
        words = f"config.batch_size is {batch_size} and there are {count} training images"
        require(1 <= batch_size <= count, f"{words}; choose a batch size from 1 to {count}.")
        self.batch_size, self.steps_per_epoch = batch_size, count // batch_size
        self._images, self._labels, self._seed, self._share = images, labels, seed, share
        self._augmentations = _augmentations(augment, image_shape)
        self._image_shape = (*image_shape, 1)[:3]

    def indices(self, step: int) -> np.ndarray:
        """Which images form the batch of ``step``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self._seed, epoch, len(self._images))
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``, or this process's share: ``{"image": (batch, pixels), "label": (batch,)}``."""
        size = self.batch_size
        own = self._share.rows(size)
        chosen = self.indices(step)[own]
        rows = self._images[chosen]
        if self._augmentations:
            # numpy takes (seed, step, 0) for (seed, step), the key of an epoch's order: hence the 1.
            generator = np.random.default_rng((self._seed, step, 1))
            images = rows.reshape(-1, *self._image_shape)
            for augmentation in self._augmentations:
                images = augmentation(images, generator, size, own)
            rows = images.reshape(rows.shape)
        return {"image": rows, "label": self._labels[chosen]}


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def make_batches(
    config: ConfigDict, dataset: Dataset, seed: int | None = None, *, share: Share = WHOLE
) -> Batches:
    """The training batches that a config describes; ``seed`` stands for that of the config where it is given."""
    (images, labels), size = dataset.splits()["train"], config.batch_size
    seed, augment = data_seed(config) if seed is None else seed, config.data.augment
    return Batches(images, labels, size, seed, augment=augment, image_shape=dataset.image_shape, share=share)


# Of images (n, height, width, channels), a generator, the size of the batch, and the images' rows in it: each process
# draws for the whole batch, so that an image varies as it would in one process.
Augmentation = Callable[[np.ndarray, np.random.Generator, int, slice], np.ndarray]


def _crop(images: np.ndarray, generator: np.random.Generator, size: int, own: slice) -> np.ndarray:
    """Windows at random places of the images, padded by 4 zeros on every side.

    As in the papers on CIFAR-10, which pad after the normalization: by the mean color.
    """
    top, left = generator.integers(0, 9, (2, size))[:, own]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    return np.moveaxis(windows[np.arange(len(images)), top, left], 1, -1)


def _flip(images: np.ndarray, generator: np.random.Generator, size: int, own: slice) -> np.ndarray:
    """Half of the images with left and right exchanged."""
    mirrored = generator.random(size)[own] < 0.5
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


# In the order in which they are applied.
AUGMENTATIONS: dict[str, Augmentation] = {"crop": _crop, "flip": _flip}


def _augmentations(names: str, image_shape: tuple[int, ...]) -> list[Augmentation]:
    """Those that ``config.data.augment``, such as ``"crop,flip"``, names."""
    found = {name.strip() for name in names.split(",")} - {""}
    words = f"config.data.augment is '{names}'"
    require(
        found <= AUGMENTATIONS.keys(), f"{words}; choose from {', '.join(AUGMENTATIONS)}, or leave it empty."
    )
    fits = not found or len(image_shape) in (2, 3)
    require(fits, f"{words}, for images with height and width, and one example has shape {image_shape}.")
    return [augmentation for name, augmentation in AUGMENTATIONS.items() if name in found]
