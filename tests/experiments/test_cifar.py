"""CIFAR-10 in both of its published forms, whole and damaged."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.readers import read_data_dir

FILES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
COUNT = 4  # images a file


def part(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (4, 3, 32, 32) with the channels first, and labels."""
    generator = np.random.default_rng(number)
    images = generator.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8)
    return images, generator.integers(0, 10, COUNT)


def binary_content(number: int) -> bytes:
    images, labels = part(number)
    records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
    return b"".join(records)


def pickle_content(number: int, keys: type = str, protocol: int = 4) -> bytes:
    images, labels = part(number)
    content = {"batch_label": "one", "data": images.reshape(COUNT, -1), "labels": labels.tolist()}
    if keys is bytes:
        content = {key.encode(): value for key, value in content.items()}
    return pickle.dumps(content, protocol)


def write_folder(folder: Path, form: str, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(FILES):
        if form == "bin":
            (folder / f"{name}.bin").write_bytes(binary_content(number))
        else:
            (folder / name).write_bytes(pickle_content(number, **options))
    # Both archives hold a list of names too, and a page.
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n")
    (folder / "readme.html").write_text("<html></html>")


def expected(numbers) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*(part(number) for number in numbers), strict=True)
    last = np.moveaxis(np.concatenate(images), 1, -1)
    return last.reshape(len(last), -1) / np.float32(255), np.concatenate(labels)


@pytest.mark.parametrize("form", ["bin", "py"])
@pytest.mark.parametrize("below", [True, False])
def test_a_folder_is_read_with_its_colors_last(tmp_path, form, below):
    folder = tmp_path / (f"cifar-10-batches-{form}" if below else "mine")
    write_folder(folder, form)
    dataset = read_data_dir(str(tmp_path if below else folder))
    assert dataset.image_shape == (32, 32, 3)
    images, labels = expected(range(5))
    np.testing.assert_array_equal(dataset.train_images, images)
    np.testing.assert_array_equal(dataset.train_labels, labels)
    images, labels = expected([5])
    np.testing.assert_array_equal(dataset.test_images, images)
    np.testing.assert_array_equal(dataset.test_labels, labels)
    assert dataset.train_images.dtype == np.float32 and dataset.train_labels.dtype == np.int32
    # The green of the second line's first pixel.
    green = part(0)[0][0, 1, 1, 0] / np.float32(255)
    assert dataset.train_images[0].reshape(32, 32, 3)[1, 0, 1] == green


@pytest.mark.parametrize("keys", [str, bytes])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_either_python(tmp_path, keys, protocol):
    write_folder(tmp_path, "py", keys=keys, protocol=protocol)
    np.testing.assert_array_equal(read_data_dir(str(tmp_path)).train_images, expected(range(5))[0])


@pytest.mark.parametrize("form", ["bin", "py"])
def test_an_incomplete_folder_names_the_missing_file(tmp_path, form):
    write_folder(tmp_path, form)
    path = tmp_path / ("data_batch_4" + (".bin" if form == "bin" else ""))
    path.unlink()
    with pytest.raises(ExperimentError, match=f"lacks '{path.name}'; .* six files"):
        read_data_dir(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds 0 bytes, and CIFAR-10 comes in records of 3,073"),
        (binary_content(0)[:-1], "holds 12,291 bytes"),
        (b"\x0a" + binary_content(0)[1:], "labels from [0-9] to 10; CIFAR-10 has 0 to 9"),
    ],
)
def test_damaged_records_are_one_sentence(tmp_path, content, sentence):
    write_folder(tmp_path, "bin")
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=sentence) as caught:
        read_data_dir(str(tmp_path))
    assert str(path) in str(caught.value)


DATA = np.zeros((COUNT, 3072), np.uint8)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"labels": [0] * COUNT}, "holds no array 'data' of bytes"),
        ({"data": DATA.astype(np.int64), "labels": [0] * COUNT}, "holds no array 'data' of bytes"),
        ({"data": DATA[:, :-1], "labels": [0] * COUNT}, r"with shape \(images, 3072\)"),
        ({"data": DATA[:0], "labels": []}, "holds no array 'data' of bytes"),
        ({"data": DATA.tolist(), "labels": [0] * COUNT}, "holds no array 'data' of bytes"),
        ({"data": DATA}, "holds no list 'labels' of whole numbers"),
        ({"data": DATA, "labels": ["cat"] * COUNT}, "holds no list 'labels' of whole numbers"),
        ({"data": DATA, "labels": [0] * 3}, r"4 images need integer labels of shape \(4,\)"),
        ({"data": DATA, "labels": [2**70] * COUNT}, "need integer labels"),
        ({"data": DATA, "labels": [-1] * COUNT}, "labels from -1 to -1"),
        ([DATA], "is a pickle of a list; a dictionary"),
    ],
)
def test_unsuitable_pickles_are_one_sentence(tmp_path, found, sentence):
    write_folder(tmp_path, "py")
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(ExperimentError, match=sentence) as caught:
        read_data_dir(str(tmp_path))
    assert str(path) in str(caught.value)
