"""Data sets in files, in every format, whole and damaged."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from kfe_optax.experiments import dataset as dataset_lib
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.files import read_files

from .conftest import blob_images

IMAGES = blob_images(20, seed=3)
LABELS = (np.arange(20) % 10).astype(np.uint8)
COLORS = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
ROWS = COLORS.transpose(0, 3, 1, 2).reshape(24, -1)  # as CIFAR's files have them
CLASSES = np.arange(24, dtype=np.uint8) % 10


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def idx(separator: str = "-", suffix: str = "") -> dict[str, bytes]:
    pack = gzip.compress if suffix else bytes
    return {
        f"{part}-{kind}{separator}idx{array.ndim}-ubyte{suffix}": pack(idx_bytes(array))
        for part in ("train", "t10k")
        for kind, array in (("images", IMAGES), ("labels", LABELS))
    }


def cifar(classes: int) -> dict[str, bytes]:
    """The files of 24 images: four in each of six files, or 20 and four."""
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    bounds = range(0, 28, 4)
    if classes == 100:
        names, bounds = ["train", "test"], (0, 20, 24)
    files = {"batches.meta.txt": b"airplane\nautomobile\n"}
    for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True):
        rows, labels = ROWS[first:last], CLASSES[first:last]
        columns = [99 - labels, labels] if classes == 100 else [labels]
        files[f"{name}.bin"] = np.column_stack([*columns, rows]).astype(np.uint8).tobytes()
    return files


def svhn() -> dict[str, bytes]:
    files = {}
    for name, rows in (("train", slice(20)), ("test", slice(20, None))):
        file = io.BytesIO()
        labels = np.where(CLASSES[rows] == 0, 10, CLASSES[rows])[:, None]
        savemat(file, {"X": COLORS[rows].transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
        files[f"{name}_32x32.mat"] = file.getvalue()
    return files


def keras(names: str = "x_train y_train x_test y_test") -> dict[str, bytes]:
    arrays = (COLORS[:20], CLASSES[:20, None], COLORS[20:], CLASSES[20:])
    return {"images.npz": npz_bytes(**dict(zip(names.split(), arrays, strict=True))), "notes.txt": b"a"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read(place: Path | str, length: int = 20) -> dataset_lib.Dataset:
    return read_files(str(place), length)


@pytest.mark.parametrize("subfolder", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize(("separator", "suffix"), [("-", ""), (".", ""), ("-", ".gz")])
def test_idx_folders(tmp_path, separator, suffix, subfolder):
    write(tmp_path / subfolder, idx(separator, suffix))
    dataset = read(tmp_path)
    assert dataset.train_images.dtype == np.float32 and dataset.image_shape == (8, 8)
    np.testing.assert_array_equal(dataset.test_images, IMAGES.reshape(20, 64) / np.float32(255))
    np.testing.assert_array_equal(dataset.train_labels, LABELS)


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("cifar-10-batches-bin", cifar(10)),
        ("cifar-100-binary", cifar(100)),
        ("", svhn()),
        ("", keras()),
        ("", keras("train_images train_labels test_images test_labels")),
    ],
)
def test_color_images(tmp_path, folder, files):
    write(tmp_path / folder, files)
    dataset = read(tmp_path)
    assert dataset.image_shape == (32, 32, 3)
    images = np.concatenate([dataset.train_images, dataset.test_images])
    np.testing.assert_array_equal(images, COLORS.reshape(24, -1) / np.float32(255))
    assert len(dataset.test_images) == 4
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    np.testing.assert_array_equal(labels, CLASSES)
    assert labels.dtype == np.int32


def test_undivided_archives_and_their_shapes(tmp_path):
    path = tmp_path / "faces.npz"
    for array, shape in ((IMAGES, (8, 8)), (IMAGES[..., None], (8, 8, 1)), (IMAGES.reshape(20, 64), (64,))):
        # Bytes, floats from 0 to 1, and bytes that are stored as floats.
        for content in (array, array / 255.0, array.astype(np.float64)):
            np.savez(path, images=content)
            dataset = read(path)
            assert dataset.image_shape == shape
            together = np.concatenate([dataset.train_images, dataset.test_images])
            assert (len(together), len(dataset.test_images)) == (20, 2)
            expected = IMAGES.reshape(20, 64) / np.float32(255)
            np.testing.assert_allclose(np.sort(together, axis=0), np.sort(expected, axis=0), atol=1e-7)
    assert not dataset.train_labels.any()


def test_texts(tmp_path):
    path = tmp_path / "pangram.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, " * 10 + "é\N{SNOWMAN}", encoding="utf-8")
    for place in (path, tmp_path):
        dataset = read(place)
        assert dataset.train_images.shape == (20, 20) and str(path) in dataset.source
    # Images win: folders of images hold lists of names.
    np.savez(tmp_path / "images.npz", x=IMAGES)
    assert read(tmp_path).vocabulary == 0


# --- Damage ----------------------------------------------------------------------------------------

IDX = "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("files", "name", "content", "sentence"),
    [
        (idx, IDX, b"", "cannot be read as an IDX file"),
        (idx, IDX, b"<html>not found</html>", "does not begin as 3 axes of unsigned bytes"),
        (idx, IDX, idx_bytes(IMAGES)[:6], "cannot be read as an IDX file"),
        (idx, IDX, idx_bytes(IMAGES)[:-1], "announces 1,280 values and holds 1,279"),
        (idx, IDX, idx_bytes(IMAGES) + b"x", "announces 1,280 values and holds 1,281"),
        (idx, IDX, idx_bytes(LABELS), "does not begin"),
        (idx, IDX, b"\0\0\x0d\x03" + bytes(12), "does not begin"),
        (idx, "t10k-labels-idx1-ubyte", None, "No such file"),
        (idx, "train-labels-idx1-ubyte", idx_bytes(LABELS[:7]), "has 20 images and labels of shape"),
        (idx, "t10k-images-idx3-ubyte", idx_bytes(IMAGES[:, :4]), r"shape \(8, 8\) and .* \(4, 8\)"),
        (lambda: idx("-", ".gz"), f"{IDX}.gz", gzip.compress(idx_bytes(IMAGES))[:-20], "EOFError"),
        (lambda: idx("-", ".gz"), f"{IDX}.gz", b"\x1f\x8bgarbage", "cannot be read as an IDX file"),
        (lambda: cifar(10), "data_batch_4.bin", None, "No such file"),
        (lambda: cifar(10), "data_batch_2.bin", b"abc", "cannot be read as a file of CIFAR-10"),
        (lambda: cifar(100), "test.bin", bytes(3073), "cannot be read as a file of CIFAR-100"),
        (svhn, "test_32x32.mat", b"abc", "cannot be read as a MATLAB file of SVHN"),
        (svhn, "test_32x32.mat", None, "No such file"),
        (keras, "images.npz", npz_bytes(x=IMAGES)[:100], "cannot be read as an .npz of arrays"),
        (keras, "images.npz", b"not an archive", "cannot be read as an .npz of arrays"),
        (dict, "text.txt", b"caf\xe9 " * 100, "cannot be read as a text in UTF-8"),
        (dict, "text.txt", b"short", "5 characters.*sequences of 20 need at least 210"),
    ],
)
def test_damaged_files_are_one_sentence(
    tmp_path, files: Callable[[], dict[str, bytes]], name, content, sentence
):
    folder = write(tmp_path, files())
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ExperimentError, match=sentence) as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"weights": IMAGES}, "it holds weights, and not 'x_train'"),
        ({"x_train": IMAGES}, "it holds x_train, and not 'x_train', 'y_train', 'x_test'"),
        ({"x_train": IMAGES, "x_test": IMAGES[:, :4]}, r"shape \(8, 8\) and test images of shape \(4, 8\)"),
        ({"x": np.zeros((4, 3, 8, 8), np.uint8)}, r"shape \(4, 3, 8, 8\) .* channels last"),
        ({"x": np.zeros((4, 2, 2, 2, 2), np.uint8)}, "channels last"),
        ({"x": IMAGES / 255.0 - 0.5}, "pixel values from -0.5"),
        ({"x": np.full((4, 3), np.nan)}, "pixel values from nan"),
        ({"x": np.array(["a", "b"])[:, None]}, "type <U1; numbers"),
        ({"x": np.zeros(7)}, r"shape \(7,\)"),
        ({"x": IMAGES[:0]}, r"shape \(0, 8, 8\)"),
        ({"x": np.zeros((4, 0), np.uint8)}, r"shape \(4, 0\)"),
        ({"x": IMAGES[:1]}, "holds one image"),
        ({"x": np.array([None, {}])}, "cannot be read as an .npz of arrays .*allow_pickle"),
        ({"x": IMAGES, "y": LABELS / 2}, "type float64; as many whole numbers"),
        ({"x": IMAGES, "y": LABELS[1:]}, r"20 images and labels of shape \(19,\)"),
        ({"x": IMAGES, "y": LABELS.astype(np.int64) - 1}, "counted from 0"),
        ({"x": IMAGES, "y": LABELS + np.int64(2**32)}, "counted from 0"),
        ({"x": IMAGES, "y": LABELS + np.uint64(2**63)}, "counted from 0"),
    ],
)
def test_unsuitable_archives_are_one_sentence(tmp_path, arrays, sentence):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(ExperimentError, match=sentence) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_places_without_data_are_one_sentence(tmp_path):
    for place in (tmp_path / "absent", "a\0b", "~no_such_user/data", "x" * 5000, "/dev/null", tmp_path):
        with pytest.raises(ExperimentError, match="set config.data_dir to"):
            read(place)
    np.save(tmp_path / "single.npy", IMAGES)
    with pytest.raises(ExperimentError, match="There is no data set of a known name in"):
        read(tmp_path / "single.npy")
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", x=IMAGES)
    with pytest.raises(ExperimentError, match=r"several data sets \(a\.npz, b\.npz\)"):
        read(tmp_path)
    for name in ("MNIST", "FashionMNIST"):
        write(tmp_path / name / "raw", idx())
    with pytest.raises(ExperimentError, match="several data sets"):
        read(tmp_path)


@pytest.mark.parametrize("files", [idx("-", ".gz"), keras(), svhn()])
def test_a_changed_byte_gives_images_or_a_sentence(tmp_path, files):
    name = next(name for name in files if not name.endswith(".txt"))
    content, refused = files[name], 0
    write(tmp_path, files)
    step = max(1, len(content) // 150)
    # Most of a file's structure is in its first and last bytes.
    places = [*range(60), *range(0, len(content), step), *range(len(content) - 60, len(content))]
    for index in places:
        damaged = bytearray(content)
        damaged[index] ^= 0x41
        (tmp_path / name).write_bytes(damaged)
        try:
            read(tmp_path)
        except ExperimentError:
            refused += 1
    assert refused > 10


def test_nothing_is_unpacked_beyond_what_is_admitted(tmp_path, monkeypatch):
    """A few kilobytes that unpack to 50 MB; neither an array, nor what no array is made of, is unpacked."""
    zeros, limit = np.zeros((50, 2**20), np.uint8), 2**20
    bombs = {
        "npz": {"large.npz": npz_bytes(x=zeros)},
        "unused": {"unused.npz": npz_bytes(x=IMAGES, other=zeros)},
        "idx": idx("-", ".gz") | {f"{IDX}.gz": gzip.compress(idx_bytes(zeros[None]))},
        "tail": idx("-", ".gz") | {f"{IDX}.gz": gzip.compress(idx_bytes(IMAGES) + zeros.tobytes())},
    }
    del zeros
    monkeypatch.setattr(dataset_lib, "LARGEST", limit)
    for name, files in bombs.items():
        folder = write(tmp_path / name, files)
        tracemalloc.start()
        if name == "unused":
            assert len(read(folder).train_images) == 18
        else:
            with pytest.raises(ExperimentError, match="would take|announces 1,280 .* or more"):
                read(folder)
        assert tracemalloc.get_traced_memory()[1] < 2 * limit
        tracemalloc.stop()
    # Of bytes there will be four times as many: what is admitted is what they become.
    np.savez(tmp_path / "just.npz", x=IMAGES)
    (tmp_path / "large.txt").write_text("a" * 5000)
    write(tmp_path / "svhn", svhn())
    monkeypatch.setattr(dataset_lib, "LARGEST", 4 * IMAGES.size - 1)
    for place in ("just.npz", "large.txt", "svhn"):
        with pytest.raises(ExperimentError, match="would take"):
            read(tmp_path / place)
