"""Normalization per channel: each color has mean 0 and standard deviation 1 on the training set."""

from __future__ import annotations

import numpy as np

from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError


def normalize(dataset: Dataset) -> Dataset:
    """Normalizes the images of ``dataset`` in place and returns it.

    x becomes (x - mean) / deviation with the mean and the deviation of its channel over all pixels
    of the training images; the test images take the same numbers. In place, because a copy of
    50,000 color images would cost another 600 MB.

    Raises:
      ExperimentError: the data are a text, or a channel is the same everywhere.
    """
    if dataset.vocabulary:
        raise ExperimentError(
            f"config.data.normalize is set and the data ({dataset.source}) are a text; leave it off."
        )
    channels = dataset.image_shape[2] if len(dataset.image_shape) == 3 else 1
    train = dataset.train_images.reshape(len(dataset.train_images), -1, channels)
    test = dataset.test_images.reshape(len(dataset.test_images), -1, channels)
    # Sums over one image in float32, sums over the images in float64: neither loses digits.
    mean = train.mean(axis=1).mean(axis=0, dtype=np.float64).astype(np.float32)
    train -= mean
    test -= mean
    variance = np.einsum("npc,npc->nc", train, train).mean(axis=0, dtype=np.float64) / train.shape[1]
    if not variance.min() > 1e-12:
        raise ExperimentError(
            f"Channel {variance.argmin()} of the training images ({dataset.source}) is the same everywhere; "
            "it cannot be normalized: set config.data.normalize to False."
        )
    deviation = np.sqrt(variance).astype(np.float32)
    train /= deviation
    test /= deviation
    return dataset
