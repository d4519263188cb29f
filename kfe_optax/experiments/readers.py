"""Reads what lies at a place: IDX files (MNIST, Fashion-MNIST), CIFAR-10, an ``.npz``, or a text.

Nothing is downloaded: the files are the ones that the data sets' own pages, torchvision or Keras
leave on a disk. Every way in which such a file can be missing or damaged ends in one sentence.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from kfe_optax.experiments.archives import Archive
from kfe_optax.experiments.cifar import find_cifar, read_cifar_folder
from kfe_optax.experiments.dataset import (
    Dataset,
    check_same_shape,
    check_size,
    flat_images,
    flat_labels,
    shape_of_images,
    split_off_test,
)
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.texts import read_text

# Where torchvision puts the IDX files below its root.
_SUBFOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")
_UNSIGNED_BYTE = 0x08

# The names under which the usual archives hold their four arrays, and an undivided set its two.
_TRAIN_IMAGES = ("x_train", "train_images", "X_train", "train_x", "train_image")
_TRAIN_LABELS = ("y_train", "train_labels", "Y_train", "train_y", "train_label")
_TEST_IMAGES = ("x_test", "test_images", "X_test", "test_x", "test_image")
_TEST_LABELS = ("y_test", "test_labels", "Y_test", "test_y", "test_label")
_ALL_IMAGES = ("x", "X", "images", "image", "data", "faces", "arr_0")
_ALL_LABELS = ("y", "Y", "labels", "label", "target", "arr_1")


def read_data_dir(data_dir: str, text_length: int = 128) -> Dataset:
    """Reads the data set at ``data_dir``: an ``.npz`` or ``.txt`` file, or a folder.

    A folder is searched for IDX files, CIFAR-10's files, one ``.npz`` and one ``.txt``, in this
    order. A text is cut into sequences of ``text_length`` characters.

    Example::

        dataset = read_data_dir("/data/fashion-mnist")
        dataset.train_images.shape                      # (60000, 784)
    """
    try:
        return _read(Path(data_dir).expanduser(), text_length)
    except ExperimentError:
        raise
    # What a path, a file system and damaged bytes can raise has no end.
    except Exception as error:
        raise ExperimentError(
            f"'{data_dir}' cannot be read ({type(error).__name__}: {error}); set config.data_dir to readable data."
        ) from error


def _read(path: Path, text_length: int) -> Dataset:
    """The data set at ``path``."""
    if not path.exists():
        raise ExperimentError(
            f"There is nothing at '{path}'; set config.data_dir to a folder with the four IDX "
            "files of MNIST or Fashion-MNIST or the six files of CIFAR-10, or to an .npz or .txt file."
        )
    if path.is_file():
        return read_text(path, text_length) if path.suffix.lower() == ".txt" else read_npz(path)
    for subfolder in _SUBFOLDERS:
        if _find_idx(path / subfolder, "train-images", 3) is not None:
            return read_idx_folder(path / subfolder)
    cifar = find_cifar(path)
    if cifar is not None:
        return read_cifar_folder(cifar)
    archive = _only(path, ".npz")
    if archive is not None:
        return read_npz(archive)
    text = _only(path, ".txt")
    if text is not None:
        return read_text(text, text_length)
    raise ExperimentError(
        f"'{path}' holds neither 'train-images-idx3-ubyte' (with or without .gz) nor 'data_batch_1' (with or "
        "without .bin) nor an .npz or .txt file; set config.data_dir to a folder or a file that does."
    )


def read_idx_folder(folder: Path) -> Dataset:
    """Reads the four files of MNIST's distribution from ``folder``."""
    arrays = {}
    for prefix in ("train", "t10k"):
        for kind, rank in (("images", 3), ("labels", 1)):
            path = _find_idx(folder, f"{prefix}-{kind}", rank)
            if path is None:
                raise ExperimentError(
                    f"'{folder}' lacks '{prefix}-{kind}-idx{rank}-ubyte' (with or without .gz); "
                    "the training job needs the four files of the data set."
                )
            arrays[f"{prefix}-{kind}"] = read_idx(path, rank)
    check_same_shape(arrays["train-images"], arrays["t10k-images"], f"'{folder}'")
    train = flat_images(arrays["train-images"], f"'{folder}/train-images'")
    test = flat_images(arrays["t10k-images"], f"'{folder}/t10k-images'")
    return Dataset(
        train,
        flat_labels(arrays["train-labels"], len(train), f"'{folder}/train-labels'"),
        test,
        flat_labels(arrays["t10k-labels"], len(test), f"'{folder}/t10k-labels'"),
        f"IDX files in {folder}",
        image_shape=arrays["train-images"].shape[1:],
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes with ``rank`` axes, compressed or not.

    The format is two zero bytes, the type, the rank, the extents as big-endian 32-bit integers,
    and the values.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"  # whatever the file's name says
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            header = file.read(4 + 4 * rank)
            expected = math.prod(shape := _idx_shape(header, rank, path))
            check_size(4 * expected, f"'{path}'")
            content = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(f"'{path}' cannot be read or unpacked ({error}); fetch it again.") from error
    if len(content) != expected:
        more = " or more" if len(content) > expected else ""
        raise ExperimentError(
            f"'{path}' announces {expected:,} values and holds {len(content):,}{more}; fetch it again."
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _idx_shape(header: bytes, rank: int, path: Path) -> tuple[int, ...]:
    """The extents that the header of an IDX file announces."""
    if len(header) < 4 or header[0] != 0 or header[1] != 0:
        raise ExperimentError(f"'{path}' is not an IDX file; fetch it again.")
    if header[2] != _UNSIGNED_BYTE or header[3] != rank:
        raise ExperimentError(
            f"'{path}' is an IDX file of type 0x{header[2]:02x} with {header[3]} axes; "
            f"expected unsigned bytes (0x08) with {rank}."
        )
    if len(header) < 4 + 4 * rank:
        raise ExperimentError(f"'{path}' ends within its header; fetch it again.")
    return tuple(int(extent) for extent in np.frombuffer(header, ">u4", rank, 4))


def read_npz(path: Path) -> Dataset:
    """Reads an ``.npz`` of four arrays (Keras' ``x_train`` ...) or of one undivided set."""
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ExperimentError(f"'{path}' is a single array; save it with numpy.savez.")
        with Archive(path) as archive:
            return _of_archive(archive, path)
    except ExperimentError:
        raise
    # Damaged or encrypted members can raise whatever zipfile, its codecs and numpy's headers do.
    except Exception as error:
        raise ExperimentError(f"'{path}' is not a readable .npz file of plain arrays ({error}).") from error


def _of_archive(archive: Archive, path: Path) -> Dataset:
    """The data set in an open archive, whose arrays are read only where they are needed."""

    def read(names: tuple[str, ...]) -> np.ndarray | None:
        name = _first(archive.names, names)
        return None if name is None else archive.read(name)

    images = read(_TRAIN_IMAGES)
    if images is not None:
        test_images = read(_TEST_IMAGES)
        if test_images is None:
            raise ExperimentError(
                f"'{path}' holds training images and no test images; add an array 'x_test'."
            )
        check_same_shape(images, test_images, f"'{path}'")
        train = flat_images(images, f"The training images in '{path}'")
        test = flat_images(test_images, f"The test images in '{path}'")
        train_where, test_where = f"'y_train' of '{path}'", f"'y_test' of '{path}'"
        return Dataset(
            train,
            flat_labels(read(_TRAIN_LABELS), len(train), train_where),
            test,
            flat_labels(read(_TEST_LABELS), len(test), test_where),
            str(path),
            image_shape=shape_of_images(images, f"The array of training images in '{path}'"),
        )
    images = read(_ALL_IMAGES)
    if images is None:
        raise ExperimentError(
            f"'{path}' holds {', '.join(map(repr, archive.names)) or 'nothing'}; expected arrays "
            "'x_train', 'y_train', 'x_test' and 'y_test', or one array 'images'."
        )
    flat = flat_images(images, f"The images in '{path}'")
    labels = flat_labels(read(_ALL_LABELS), len(flat), f"The labels in '{path}'")
    if len(flat) < 2:
        raise ExperimentError(f"'{path}' holds one image; training and testing need one each.")
    shape = shape_of_images(images, f"The array of images in '{path}'")
    return split_off_test(flat, labels, max(1, len(flat) // 10), str(path), image_shape=shape)


def _only(folder: Path, suffix: str) -> Path | None:
    """The one file of ``folder`` that ends in ``suffix``, or None where there is none."""
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ExperimentError(
            f"'{folder}' holds several {suffix} files ({names}); name one of them in config.data_dir."
        )
    return found[0] if found else None


def _first(found: Collection[str], names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that the archive holds."""
    return next((name for name in names if name in found), None)


def _find_idx(folder: Path, stem: str, rank: int) -> Path | None:
    """The file of one IDX array; some distributions write a dot for the second hyphen."""
    for name in (f"{stem}-idx{rank}-ubyte", f"{stem}.idx{rank}-ubyte"):
        for suffix in ("", ".gz"):
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    return None
