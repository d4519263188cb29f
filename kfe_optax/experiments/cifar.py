"""Reads the two forms in which CIFAR-10 is published: records of bytes, and pickles.

Krizhevsky's page has both, as archives that unpack to the folders ``cifar-10-batches-bin`` and
``cifar-10-batches-py``. Either holds five files of 10,000 training images and one of test images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kfe_optax.experiments.dataset import Dataset, check_size, flat_images, flat_labels
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.safe_pickle import read_dictionary

_SUBFOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
_CHANNELS_ROWS_COLUMNS = (3, 32, 32)
_VALUES = 3 * 32 * 32
_CLASSES = 10
_FILES = 6

_Part = tuple[np.ndarray, np.ndarray]  # (n, 3072) bytes with the channels first, and n labels


def find_cifar(folder: Path) -> Path | None:
    """The folder at or below ``folder`` with CIFAR-10's files, or None."""
    for subfolder in _SUBFOLDERS:
        for name in ("data_batch_1.bin", "data_batch_1"):
            if (folder / subfolder / name).is_file():
                return folder / subfolder
    return None


def read_cifar_folder(folder: Path) -> Dataset:
    """Reads CIFAR-10 from a folder with all six files of either form; colors become the last axis.

    Example::

        dataset = read_cifar_folder(Path("/data/cifar-10-batches-bin"))
        dataset.train_images.shape, dataset.image_shape     # (50000, 3072), (32, 32, 3)
    """
    binary = (folder / "data_batch_1.bin").is_file()
    read, suffix = (_read_records, ".bin") if binary else (_read_pickle, "")
    train = [_read_part(folder / f"data_batch_{number}{suffix}", read) for number in range(1, 6)]
    test_images, test_labels = _read_part(folder / f"test_batch{suffix}", read)
    return Dataset(
        flat_images(np.concatenate([images for images, _ in train]), f"'{folder}'"),
        np.concatenate([labels for _, labels in train]),
        flat_images(test_images, f"'{folder}'"),
        test_labels,
        f"CIFAR-10 in {folder}",
        image_shape=(*_CHANNELS_ROWS_COLUMNS[1:], _CHANNELS_ROWS_COLUMNS[0]),
    )


def _read_part(path: Path, read: Callable[[bytes, str], _Part]) -> _Part:
    """The images (n, 32, 32, 3) of one file as bytes, and their labels."""
    where = f"'{path}'"
    if not path.is_file():
        raise ExperimentError(
            f"'{path.parent}' lacks '{path.name}'; the training job needs the six files of CIFAR-10."
        )
    try:
        check_size(4 * _FILES * path.stat().st_size, where)
        content = path.read_bytes()
    except OSError as error:
        raise ExperimentError(f"{where} cannot be read ({error}); fetch it again.") from error
    values, labels = read(content, where)
    labels = flat_labels(labels, len(values), f"The labels in {where}")
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise ExperimentError(
            f"{where} holds labels from {labels.min()} to {labels.max()}; CIFAR-10 has 0 to 9: fetch it again."
        )
    images = values.reshape(-1, *_CHANNELS_ROWS_COLUMNS).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _read_records(content: bytes, where: str) -> _Part:
    """Records of one label and 3072 bytes."""
    if not content or len(content) % (1 + _VALUES):
        raise ExperimentError(
            f"{where} holds {len(content):,} bytes, and CIFAR-10 comes in records of {1 + _VALUES:,}; "
            "fetch it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _VALUES)
    return records[:, 1:], records[:, 0]


def _read_pickle(content: bytes, where: str) -> _Part:
    """A dictionary with ``data`` (n, 3072) and the list ``labels``."""
    found = read_dictionary(content, where)
    values, labels = found.get("data"), found.get("labels")
    if (
        not isinstance(values, np.ndarray)
        or values.dtype != np.uint8
        or values.ndim != 2
        or values.shape[0] < 1
        or values.shape[1] != _VALUES
    ):
        raise ExperimentError(
            f"{where} holds no array 'data' of bytes with shape (images, {_VALUES}); fetch it again."
        )
    if isinstance(labels, list) and all(isinstance(label, int) for label in labels):
        labels = np.array(labels)
    if not isinstance(labels, np.ndarray):
        raise ExperimentError(f"{where} holds no list 'labels' of whole numbers; fetch it again.")
    return values, labels
