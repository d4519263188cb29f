"""What every data source returns: two sets of flat images in one numeric range, of texts, or of inputs and targets."""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import numpy as np

from kfe_optax.experiments.errors import ExperimentError

LARGEST = 2**32  # bytes of a data set as float32; CIFAR-10, the largest of the published ones, takes 740 MB
_LARGEST_LABEL = 2**31 - 1


def check_size(size: int, where: str) -> None:
    """Refuses ``size`` bytes of data, before they are read or made, where memory may not hold them."""
    if size > LARGEST:
        raise ExperimentError(
            f"{where} would take {size / 2**30:,.1f} GiB in memory, and at most {LARGEST / 2**30:g} are read; take fewer "
            "or smaller examples."
        )


class Dataset(NamedTuple):
    """Images as rows of pixels, with their labels (zeros where a source has none).

    The arrays stay on the host: a batch of 512 digits is 1.6 MB, which is copied to a device in far
    less time than any training step takes, and the full set never competes with the optimizer's
    state for device memory. CIFAR-10, the largest, takes 740 MB of the host's.

    A text (``vocabulary`` > 0) has sequences of tokens, (n, length) int32, for images, and for labels
    the tokens one place later, of the same shape. A regression has inputs (n, d) for images, and for
    labels the targets, (n, outputs) float32.
    """

    train_images: np.ndarray  # (n, pixels) float32
    train_labels: np.ndarray  # (n,) int32
    test_images: np.ndarray  # (m, pixels) float32
    test_labels: np.ndarray  # (m,) int32
    source: str  # a few words for the reader of a log
    image_shape: tuple[int, ...] = ()  # of one example: (28, 28), (32, 32, 3), (pixels,) or (length,)
    vocabulary: int = 0  # the number of different tokens of a text, 0 for images

    @property
    def pixels(self) -> int:
        """The number of pixels of one image, or of tokens of one sequence."""
        return self.train_images.shape[1]

    @property
    def outputs(self) -> int:
        """The number of targets of one example, 0 for labels."""
        return self.train_labels.shape[1] if self.train_labels.dtype.kind == "f" else 0

    def limited(self, train_size: int, test_size: int) -> Dataset:
        """The first ``train_size`` and ``test_size`` images; 0 keeps all of them."""
        return self._replace(
            train_images=self.train_images[: train_size or None],
            train_labels=self.train_labels[: train_size or None],
            test_images=self.test_images[: test_size or None],
            test_labels=self.test_labels[: test_size or None],
        )

    def fingerprint(self) -> int:
        """A checksum of the training set, by which a resumed run knows its data again."""
        labels = zlib.crc32(np.ascontiguousarray(self.train_labels).data)
        return zlib.crc32(np.ascontiguousarray(self.train_images).data, labels)

    def summary(self) -> str:
        """One line for a log."""
        counts = f"{len(self.train_images):,} training and {len(self.test_images):,} test"
        if self.vocabulary:
            return f"{counts} sequences of {self.pixels} tokens out of {self.vocabulary} ({self.source})"
        if self.outputs:
            return f"{counts} inputs of {self.pixels} numbers, {self.outputs} targets each ({self.source})"
        return f"{counts} images of {self.pixels} pixels ({self.source})"


def flat_images(array: np.ndarray, where: str) -> np.ndarray:
    """Pixels in [0, 1] as float32 rows, from bytes or from floats.

    Integers are taken as 0..255. Floats are kept when they lie in [0, 1], and divided by 255 when
    they are plainly bytes stored as floats; any other range is refused, because a cross-entropy
    on it would be meaningless and would not say so.
    """
    if array.ndim < 2 or array.size == 0:
        raise ExperimentError(
            f"{where} has shape {array.shape}; images need shape (count, height, width) or "
            "(count, pixels) with at least one image and one pixel."
        )
    if array.dtype.kind not in "uif":
        raise ExperimentError(
            f"{where} holds values of type {array.dtype}; images need integers 0 to 255 or floats 0 to 1."
        )
    flat = array.reshape(len(array), -1)
    # Bytes need no scan of the values: on 60,000 images it would cost as much as the conversion.
    low, high = (0.0, 255.0) if flat.dtype == np.uint8 else (float(flat.min()), float(flat.max()))
    if not (low >= 0.0 and high <= 255.0):  # also catches NaN
        raise ExperimentError(
            f"{where} holds pixel values from {low:g} to {high:g}; rescale them to 0 to 1 (floats) "
            "or 0 to 255 (integers)."
        )
    pixels = flat.astype(np.float32)
    if flat.dtype.kind != "f" or high > 1.0:
        pixels /= np.float32(255.0)
    return pixels


def shape_of_images(array: np.ndarray, where: str) -> tuple[int, ...]:
    """The shape of one image: (pixels,), (height, width) or (height, width, channels)."""
    shape = array.shape[1:]
    if len(shape) > 3 or (len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 2, 3, 4)):
        raise ExperimentError(
            f"{where} has shape {array.shape}; color images need shape (count, height, width, channels), "
            "with the channels last."
        )
    return shape


def check_same_shape(train: np.ndarray, test: np.ndarray, where: str) -> None:
    """Refuses training and test images of different sizes."""
    if train.shape[1:] != test.shape[1:]:
        sizes = [math.prod(array.shape[1:]) for array in (train, test)]
        raise ExperimentError(
            f"{where} holds training images of {sizes[0]} pixels and test images of {sizes[1]}, of shapes "
            f"{train.shape[1:]} and {test.shape[1:]}; they must agree."
        )


def flat_labels(array: np.ndarray | None, count: int, where: str) -> np.ndarray:
    """Labels as int32, or zeros when a source has none (an autoencoder needs none)."""
    if array is None:
        return np.zeros(count, np.int32)
    if array.shape == (count, 1):  # as Keras has them for CIFAR-10
        array = array[:, 0]
    if array.shape != (count,) or array.dtype.kind not in "ui":
        raise ExperimentError(
            f"{where} has shape {array.shape} and type {array.dtype}; {count} images need "
            f"integer labels of shape ({count},)."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > _LARGEST_LABEL:
        # As int32, 2**32 + 1 would be class 1.
        raise ExperimentError(
            f"{where} has labels from {low} to {high}; number the classes from 0, or leave the labels out."
        )
    return array.astype(np.int32)


def split_off_test(
    images: np.ndarray,
    labels: np.ndarray,
    test_size: int,
    source: str,
    seed: int = 0,
    image_shape: tuple[int, ...] = (),
) -> Dataset:
    """A dataset from one undivided set: a fixed shuffle, then the last ``test_size`` for testing.

    The shuffle does not depend on the run's seed, so that runs with different seeds are measured
    on the same test images.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[: len(order) - test_size], order[len(order) - test_size :]
    return Dataset(images[train], labels[train], images[test], labels[test], source, image_shape)
