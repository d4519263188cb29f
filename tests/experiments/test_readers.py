"""Reading IDX folders and archives, whole and damaged."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kfe_optax.experiments import dataset as dataset_lib
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
        ({"x": np.zeros((4, 0), np.uint8)}, "at least one image and one pixel"),
        ({"x": IMAGES, "y": LABELS.astype(np.int64) - 1}, "labels from -1 to 8; number the classes from 0"),
        ({"x": IMAGES, "y": LABELS + np.int64(2**32)}, "labels from 4294967296 to 4294967305"),
        ({"x": IMAGES, "y": LABELS + np.uint64(2**63)}, "labels from 9223372036854775808 to"),
        ({"x": IMAGES, "y": LABELS.astype(np.int8) - 9}, "labels from -9 to 0"),
        ({"x": IMAGES, "y": LABELS.astype(np.uint32) * 2**28}, "labels from 0 to 2415919104"),
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


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.uint64])
def test_labels_of_every_whole_type_are_themselves(tmp_path, kind):
    np.savez(tmp_path / "data.npz", x_train=IMAGES, y_train=LABELS.astype(kind), x_test=IMAGES, y_test=LABELS)
    dataset = read_data_dir(str(tmp_path))
    np.testing.assert_array_equal(dataset.train_labels, LABELS)
    assert dataset.train_labels.dtype == np.int32


def test_idx_test_images_of_another_size_are_one_sentence(tmp_path):
    write_idx_folder(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES[:, :4]))
    with pytest.raises(
        ExperimentError, match=r"images of 64 pixels and test images of 32, of shapes \(8, 8\) and"
    ):
        read_data_dir(str(tmp_path))


def npz_bytes(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def member_of(content: bytes, **info: int) -> bytes:
    """An ``.npz`` whose one member 'x.npy' has these bytes, with fields of its directory entry set afterwards."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
        for field, value in info.items():
            setattr(archive.filelist[0], field, value)
    return file.getvalue()


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode()


def announced(shape: object) -> bytes:
    return header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (member_of(announced((2, 8)) + bytes(16), flag_bits=1), "encrypted"),
        (member_of(announced((2, 8)) + bytes(16), compress_type=99), "not a readable"),
        (member_of(announced((2, 8)) + bytes(16), CRC=1), "Bad CRC-32"),
        (member_of(announced((2, 8)) + bytes(15)), "'x' announces 16 bytes and holds 15"),
        (member_of(announced((2, 8)) + bytes(17)), "'x' announces 16 bytes and holds 17"),
        (member_of(announced((-2, -8)) + bytes(16)), r"'x' has shape \(-2, -8\)"),
        (member_of(announced("(2, 'a')")), "not a readable"),
        (member_of(announced("(" * 5000)), "not a readable"),
        (member_of(header("{'descr': 'z9'}")), "not a readable"),
        (member_of(header("", b"\x07\x00")), "not a readable"),
        (member_of(b""), "not a readable"),
        (member_of(announced((2**40, 2**40))), "would take .* GiB in memory, and at most 4 are read"),
        (member_of(announced((10**5, 10**5)), file_size=10**10 + 74), "would take .* GiB in memory"),
    ],
)
def test_malformed_members_are_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=sentence) as caught:
        read_data_dir(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [npz_bytes(x=IMAGES, y=LABELS), gzip.compress(idx_bytes(IMAGES))])
def test_a_changed_byte_gives_images_or_a_sentence(tmp_path, content):
    write_idx_folder(tmp_path)
    path = tmp_path / ("data.npz" if content[:2] == b"PK" else "train-images-idx3-ubyte")
    place = path if path.suffix else tmp_path
    refused = 0
    for index in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[index] ^= 0x41
        path.write_bytes(damaged)
        try:
            read_data_dir(str(place))
        except ExperimentError:
            refused += 1
    assert refused > len(content) / 20


def test_nothing_is_unpacked_beyond_what_is_admitted(tmp_path, monkeypatch):
    """A few kilobytes that unpack to 50 MB; neither an array, nor what no array is made of, is unpacked."""
    zeros, limit = np.zeros((50, 2**20), np.uint8), 2**20
    bombs = {
        "large.npz": npz_bytes(x=zeros),
        "unused.npz": npz_bytes(x=IMAGES, y=LABELS, other=zeros),
        "short_header.npz": member_of(announced((2, 8)) + zeros.tobytes()),
        "idx": gzip.compress(idx_bytes(zeros[None])),
        "tail": gzip.compress(idx_bytes(IMAGES) + zeros.tobytes()),
    }
    del zeros
    monkeypatch.setattr(dataset_lib, "LARGEST", limit)
    for name, content in bombs.items():
        path = tmp_path / name
        path.write_bytes(content)
        tracemalloc.start()
        if name == "unused.npz":
            assert len(read_data_dir(str(path)).train_images) == 18
        else:
            sentence = r"announces 1,280 .* or more" if name == "tail" else "would take"
            with pytest.raises(ExperimentError, match=sentence):
                read_data_dir(str(path)) if path.suffix else read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 2 * limit
        tracemalloc.stop()
    # Of bytes there will be four times as many: what is admitted is what they become.
    monkeypatch.setattr(dataset_lib, "LARGEST", 4 * IMAGES.size + 1000)
    np.savez(tmp_path / "just.npz", x=IMAGES)
    assert len(read_data_dir(str(tmp_path / "just.npz")).train_images) == 18
    monkeypatch.setattr(dataset_lib, "LARGEST", 4 * IMAGES.size - 1)
    with pytest.raises(ExperimentError, match="would take"):
        read_data_dir(str(tmp_path / "just.npz"))
    (tmp_path / "large.txt").write_text("a" * 5000)
    with pytest.raises(ExperimentError, match="would take"):
        read_data_dir(str(tmp_path / "large.txt"))


@pytest.mark.parametrize("place", ["x" * 5000, "~no_such_user/data", "a\0b", "/dev/null"])
def test_absurd_places_are_one_sentence(place):
    with pytest.raises(ExperimentError, match="config.data_dir"):
        read_data_dir(place)
