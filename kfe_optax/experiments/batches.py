"""Batches as a pure function of the seed and the step, so that a resumed run sees the same ones."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from kfe_optax.experiments.augmentation import augment_images, augmentations
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError

Batch = dict[str, np.ndarray]


class Batches:
    """Shuffled batches of a data set; the last partial batch of an epoch is dropped.

    The order of an epoch is a permutation drawn from (seed, epoch) alone, and the augmentation of a
    batch is drawn from (seed, step). Nothing is consumed and nothing is carried along:
    ``batches(step)`` is the same whether the run came to this step in one go or was stopped and
    resumed.

    Args:
      images: the examples, one a row.
      labels: their labels, one a row.
      batch_size: examples a batch.
      seed: of the order and the augmentation.
      augment: ``""`` or names with commas between them, see ``augmentation.augment_images``.
      image_shape: (height, width) or (height, width, channels) of a row; augmentation needs it.

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
    ):
        if not 1 <= batch_size <= len(images):
            raise ExperimentError(
                f"config.batch_size is {batch_size} and there are {len(images)} training images; "
                f"choose a batch size from 1 to {len(images)}."
            )
        self._images = images
        self._labels = labels
        self._batch_size = batch_size
        self._seed = seed
        self._augmentations = augmentations(augment, image_shape)
        self._image_shape = image_shape
        self._order: tuple[int, np.ndarray] | None = None  # the last epoch and its permutation
        self.steps_per_epoch = len(images) // batch_size

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, to which a step belongs."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """Which images form the batch of ``step``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._order = (epoch, generator.permutation(len(self._images)))
        start = position * self._batch_size
        return self._order[1][start : start + self._batch_size]

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``: ``{"image": (batch, pixels), "label": (batch,)}``."""
        chosen = self.indices(step)
        images = self._images[chosen]
        if self._augmentations:
            # numpy takes (seed, step, 0) for (seed, step), the key of an epoch's order: hence the 1.
            generator = np.random.default_rng((self._seed, step, 1))
            images = augment_images(images, self._image_shape, self._augmentations, generator)
        return {"image": images, "label": self._labels[chosen]}


def make_batches(config: ConfigDict, dataset: Dataset) -> Batches:
    """The training batches that a config describes: ``batch_size``, ``seed`` and ``data.augment``.

    Example::

        batches = make_batches(config, load(config))
        batches(0)["image"].shape                       # (512, 784)
    """
    return Batches(
        dataset.train_images,
        dataset.train_labels,
        config.batch_size,
        config.seed,
        augment=config.data.augment,
        image_shape=dataset.image_shape,
    )
