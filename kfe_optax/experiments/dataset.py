"""What every data source returns: sets of flat images in one numeric range, of texts, or of inputs and targets."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from kfe_optax.experiments.errors import require

LARGEST = 2**32  # bytes of a data set as float32; CIFAR-10 takes 740 MB

Examples = tuple[np.ndarray, np.ndarray | None]  # images and labels, which an autoencoder can do without


def check_size(size: int, where: str) -> None:
    """Refuses ``size`` bytes of data where memory may not hold them."""
    require(size <= LARGEST, f"{where} would take {size / 2**30:,.1f} GiB in memory; take fewer examples.")


class Dataset(NamedTuple):
    """Images as rows of pixels, with their labels (zeros where a source has none), in the host's memory.

    A text (``vocabulary`` > 0) has sequences of tokens, (n, length) int32, for images, and for labels
    the tokens one place later, of the same shape. A regression has inputs (n, d) for images, and for
    labels the targets, (n, outputs) float32.
    """

    train_images: np.ndarray  # (n, pixels) float32
    train_labels: np.ndarray  # (n,) int32
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str  # a few words for the reader of a log
    image_shape: tuple[int, ...] = ()  # of one example: (28, 28), (32, 32, 3), (pixels,) or (length,)
    vocabulary: int = 0  # the number of different tokens of a text, 0 for images
    validation: tuple[np.ndarray, np.ndarray] | None = None  # images and labels

    @property
    def pixels(self) -> int:
        """The number of pixels of one image, or of tokens of one sequence."""
        return self.train_images.shape[1]

    @property
    def outputs(self) -> int:
        """The number of targets of one example, 0 for labels."""
        return self.train_labels.shape[1] if self.train_labels.dtype.kind == "f" else 0

    def splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Images and labels of ``"train"``, of ``"validation"`` where there is one, and of ``"test"``."""
        train, test = (self.train_images, self.train_labels), (self.test_images, self.test_labels)
        validation = {"validation": self.validation} if self.validation else {}
        return {"train": train, **validation, "test": test}

    def divided(self, train_size: int, test_size: int, validation: int, seed: int) -> Dataset:
        """The first examples of each set (0: all), ``validation`` of those for training, drawn with ``seed``, set apart."""
        images, labels = self.train_images[: train_size or None], self.train_labels[: train_size or None]
        words = f"config.data.validation is {validation} and there are {len(images)} training images"
        require(validation < len(images), f"{words}; leave some for training.")
        # Another key than those of the batches, (seed, epoch) and (seed, step, 1).
        order = np.random.default_rng((seed, 0, 2)).permutation(len(images))
        held, kept = order[:validation], order[validation:] if validation else slice(None)
        return self._replace(
            train_images=images[kept],
            train_labels=labels[kept],
            test_images=self.test_images[: test_size or None],
            test_labels=self.test_labels[: test_size or None],
            validation=(images[held], labels[held]) if validation else None,
        )

    def fingerprint(self) -> int:
        """A checksum of the training set, by which a resumed run knows its data again."""
        labels = zlib.crc32(np.ascontiguousarray(self.train_labels).data)
        return zlib.crc32(np.ascontiguousarray(self.train_images).data, labels)

    def summary(self) -> str:
        """One line for a log."""
        counts = {name: f"{len(images):,} {name}" for name, (images, _) in self.splits().items()}
        counts["train"] += "ing"
        what = f"images of {self.pixels} pixels"
        if self.vocabulary:
            what = f"sequences of {self.pixels} tokens out of {self.vocabulary}"
        elif self.outputs:
            what = f"inputs of {self.pixels} numbers, {self.outputs} targets each"
        return f"{' and '.join(counts.values())} {what} ({self.source})"


def image_dataset(train: Examples, test: Examples | None, source: str) -> Dataset:
    """A data set of any images, (n, pixels), (n, height, width) or (n, height, width, channels), and their labels.

    Without ``test`` a shuffled tenth is for testing: the same one for every seed of a run.
    """
    shape = train[0].shape[1:]
    images, labels = _flat(*train, f"The training set of '{source}'")
    if test is not None:
        words = f"'{source}' holds training images of shape {shape} and test images of shape"
        require(test[0].shape[1:] == shape, f"{words} {test[0].shape[1:]}; they must agree.")
        return Dataset(images, labels, *_flat(*test, f"The test set of '{source}'"), source, shape)
    require(len(images) > 1, f"'{source}' holds one image; training and testing need one each.")
    order = np.random.default_rng(0).permutation(len(images))
    kept, held = np.split(order, [len(order) - max(1, len(order) // 10)])
    return Dataset(images[kept], labels[kept], images[held], labels[held], source, shape)


def _flat(images: np.ndarray, labels: np.ndarray | None, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in [0, 1] as float32 rows, and labels as int32.

    Integers are taken for 0 to 255, as are floats above 1; a cross-entropy on any other range would be
    meaningless and would not say so.
    """
    count, shape = len(images), images.shape
    channels_first = images.ndim == 4 and shape[1] <= 4 < shape[3]
    fits = images.size > 0 and 2 <= images.ndim <= 4 and images.dtype.kind in "uif" and not channels_first
    words = f"{where} has images of shape {shape} and type {images.dtype}; numbers (count, height, width), (count, pixels)"
    require(fits, f"{words} or, channels last, (count, height, width, channels) are needed.")
    check_size(4 * images.size, where)
    low, high = images.min(), images.max()
    words = f"{where} has pixel values from {low:g} to {high:g}; rescale them to 0 to 1 (floats) or 255 (integers)."
    require(low >= 0 and high <= 255, words)  # NaN is neither
    pixels = images.reshape(count, -1).astype(np.float32)
    if images.dtype.kind != "f" or high > 1:
        pixels /= np.float32(255)
    labels = np.zeros(count, np.int32) if labels is None else labels.reshape(-1)  # Keras has a column of them
    fits = len(labels) == count and labels.dtype.kind in "ui" and labels.min() >= 0 and labels.max() < 2**31
    words = f"{where} has {count} images and labels of shape {labels.shape} and type {labels.dtype}"
    require(fits, f"{words}; as many whole numbers, counted from 0, or no labels are needed.")
    return pixels, labels.astype(np.int32)


def text_dataset(text: str, length: int, source: str) -> Dataset:
    """A text in sequences of ``length`` characters that do not overlap; its last tenth is for testing.

    Character number i of the sorted characters of the first nine tenths is token i; all others are one
    replacement token, the last of the vocabulary. The label of a character is the one that follows.
    """
    check_size(8 * len(text), f"'{source}'")
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    train, test = np.split(codes, [len(codes) - len(codes) // 10])
    words = f"The text ({source}) has {len(codes):,} characters, and its last tenth is for testing; sequences of {length}"
    require(len(test) > length, f"{words} need at least {10 * (length + 1):,}: change config.data.length.")
    characters = np.unique(train)

    def sequences(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.minimum(np.searchsorted(characters, part), len(characters) - 1)
        tokens = np.where(characters[places] == part, places, len(characters)).astype(np.int32)
        used = (len(tokens) - 1) // length * length
        return tokens[:used].reshape(-1, length), tokens[1 : used + 1].reshape(-1, length)

    return Dataset(*sequences(train), *sequences(test), source, (length,), len(characters) + 1)
