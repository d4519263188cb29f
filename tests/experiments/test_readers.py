"""Reading IDX folders and archives, whole and damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.readers import read_data_dir, read_idx

from .conftest import blob_images

IMAGES = blob_images(20, seed=3)
LABELS = (np.arange(20) % 10).astype(np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_folder(folder: Path, suffix: str = "", separator: str = "-") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        for kind, array in (("images", IMAGES), ("labels", LABELS)):
            content = idx_bytes(array)
            name = f"{prefix}-{kind}{separator}idx{array.ndim}-ubyte{suffix}"
            (folder / name).write_bytes(gzip.compress(content) if suffix else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("subfolder", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_folders(tmp_path, suffix, subfolder, separator):
    write_idx_folder(tmp_path / subfolder, suffix, separator)
    dataset = read_data_dir(str(tmp_path))
    assert dataset.train_images.shape == (20, 64)
    assert dataset.train_images.dtype == np.float32
    np.testing.assert_array_equal(dataset.test_images, IMAGES.reshape(20, 64) / np.float32(255))
    np.testing.assert_array_equal(dataset.train_labels, LABELS)


def test_a_gzip_stream_without_its_suffix_is_read(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(read_idx(path, 3), IMAGES)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not an IDX file"),
        (b"<html>not found</html>", "is not an IDX file"),
        (idx_bytes(IMAGES)[:6], "ends within its header"),
        (idx_bytes(IMAGES)[:-1], "announces 1,280 values and holds 1,279"),
        (idx_bytes(IMAGES) + b"x", "announces 1,280 values and holds 1,281"),
        (idx_bytes(LABELS), "with 1 axes; expected unsigned bytes"),
        (b"\0\0\x0d\x03" + bytes(12), "type 0x0d"),
        (gzip.compress(idx_bytes(IMAGES))[:-20], "cannot be read or unpacked"),
        (b"\x1f\x8bgarbage", "cannot be read or unpacked"),
    ],
)
def test_damaged_idx_files_are_one_sentence(tmp_path, content, sentence):
    write_idx_folder(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=sentence) as caught:
        read_data_dir(str(tmp_path))
    assert str(path) in str(caught.value)


def test_an_incomplete_folder_names_the_missing_file(tmp_path):
    write_idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ExperimentError, match="lacks 't10k-labels-idx1-ubyte'"):
        read_data_dir(str(tmp_path))


def test_images_and_labels_must_agree(tmp_path):
    write_idx_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:7]))
    with pytest.raises(ExperimentError, match=r"20 images need integer labels of shape \(20,\)"):
        read_data_dir(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_archives_of_four_arrays(tmp_path, names, as_folder):
    path = tmp_path / "digits.npz"
    np.savez(path, **dict(zip(names, (IMAGES, LABELS, IMAGES[:5], LABELS[:5]), strict=True)))
    dataset = read_data_dir(str(tmp_path if as_folder else path))
    np.testing.assert_array_equal(dataset.train_images, IMAGES.reshape(20, 64) / np.float32(255))
    np.testing.assert_array_equal(dataset.test_labels, LABELS[:5])


def test_shapes_of_images(tmp_path):
    write_idx_folder(tmp_path / "idx")
    assert read_data_dir(str(tmp_path / "idx")).image_shape == (8, 8)
    colors = np.stack([IMAGES, IMAGES // 2, IMAGES // 3], axis=-1)
    path = tmp_path / "images.npz"
    # Keras has CIFAR-10's labels in a column.
    np.savez(path, x_train=colors, y_train=LABELS[:, None], x_test=colors[:5], y_test=LABELS[:5])
    dataset = read_data_dir(str(path))
    assert dataset.image_shape == (8, 8, 3)
    np.testing.assert_array_equal(dataset.train_images[0].reshape(8, 8, 3) * np.float32(255), colors[0])
    np.testing.assert_array_equal(dataset.train_labels, LABELS)
    for array, shape in ((IMAGES, (8, 8)), (IMAGES[..., None], (8, 8, 1)), (IMAGES.reshape(20, 64), (64,))):
        np.savez(path, images=array)
        assert read_data_dir(str(path)).image_shape == shape


def test_an_undivided_archive_is_split_and_needs_no_labels(tmp_path):
    path = tmp_path / "faces.npz"
    np.savez(path, images=IMAGES / 255.0)
    dataset = read_data_dir(str(path))
    assert (len(dataset.train_images), len(dataset.test_images)) == (18, 2)
    together = np.concatenate([dataset.train_images, dataset.test_images])
    original = (IMAGES / 255.0).astype(np.float32).reshape(20, 64)
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(original, axis=0))
    assert not dataset.train_labels.any()


def test_floats_up_to_255_are_bytes(tmp_path):
    path = tmp_path / "floats.npz"
    np.savez(path, x=IMAGES.astype(np.float64))
    assert read_data_dir(str(path)).train_images.max() <= 1.0


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"weights": IMAGES}, "holds 'weights'; expected arrays 'x_train'"),
        ({"x_train": IMAGES}, "no test images"),
        ({"x_train": IMAGES, "x_test": IMAGES[:, :4]}, "64 pixels and test images of 32"),
        ({"x_train": IMAGES, "x_test": IMAGES.reshape(20, 4, 16)}, r"of shapes \(8, 8\) and \(4, 16\)"),
        ({"x": np.zeros((4, 3, 8, 8), np.uint8)}, r"shape \(4, 3, 8, 8\); .* with the channels last"),
        ({"x": np.zeros((4, 2, 2, 2, 2), np.uint8)}, "with the channels last"),
        ({"x": IMAGES / 255.0 - 0.5}, "pixel values from -0.5"),
        ({"x": np.full((4, 3), np.nan)}, "pixel values from nan"),
        ({"x": np.array(["a", "b"])[:, None]}, "values of type <U1"),
        ({"x": np.zeros(7)}, r"shape \(7,\)"),
        ({"x": IMAGES[:1]}, "holds one image"),
        ({"x": IMAGES, "y": LABELS / 2}, "need integer labels"),
        ({"x": np.array([None, {}])}, "not a readable .npz file of plain arrays"),
    ],
)
def test_unsuitable_archives_are_one_sentence(tmp_path, arrays, sentence):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(ExperimentError, match=sentence) as caught:
        read_data_dir(str(path))
    assert str(path) in str(caught.value)


def test_broken_archives_and_missing_places(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=IMAGES)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExperimentError, match=r"is not a readable \.npz file"):
        read_data_dir(str(path))
    path.write_bytes(b"not an archive")
    with pytest.raises(ExperimentError, match=r"is not a readable \.npz file"):
        read_data_dir(str(path))
    np.save(tmp_path / "single.npy", IMAGES)
    with pytest.raises(ExperimentError, match="is a single array"):
        read_data_dir(str(tmp_path / "single.npy"))
    with pytest.raises(ExperimentError, match="There is nothing at"):
        read_data_dir(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExperimentError, match="holds neither 'train-images"):
        read_data_dir(str(tmp_path / "empty"))
    np.savez(tmp_path / "other.npz", x=IMAGES)
    with pytest.raises(ExperimentError, match=r"several \.npz files \(data\.npz, other\.npz\)"):
        read_data_dir(str(tmp_path))
