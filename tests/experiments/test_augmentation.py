"""Crop and flip against a loop over single images, and as part of the batches."""

from __future__ import annotations

import numpy as np
import pytest

from kfe_optax.experiments.augmentation import augment_images, augmentations
from kfe_optax.experiments.batches import Batches, make_batches
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError


def rows_of(shape, count=400, seed=0):
    """Images without a zero, so that padding can be told from content."""
    return np.random.default_rng(seed).uniform(0.5, 1.5, (count, int(np.prod(shape)))).astype(np.float32)


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
@pytest.mark.parametrize("names", [("crop",), ("flip",), ("crop", "flip")])
def test_every_image_is_one_of_its_own_variants_and_all_variants_occur(shape, names):
    rows = rows_of(shape)
    before = rows.copy()
    varied = augment_images(rows, shape, names, np.random.default_rng(1))
    assert varied.shape == rows.shape and varied.dtype == rows.dtype
    np.testing.assert_array_equal(rows, before)
    choices = []
    for original, result in zip(rows, varied, strict=True):
        known = {content: choice for choice, content in variants(original.reshape(shape), names)}
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


@pytest.mark.parametrize("names", ["rotate", "crop,,zoom"])
def test_unknown_names_are_one_sentence(names):
    with pytest.raises(
        ExperimentError, match="config.data.augment holds '(rotate|zoom)'; choose from crop, flip"
    ):
        augmentations(names, (8, 8))


def test_names_are_read_and_flat_images_are_refused():
    assert augmentations(" crop , flip", (8, 8)) == ("crop", "flip")
    assert augmentations("", (64,)) == ()
    with pytest.raises(ExperimentError, match=r"one example has shape \(64,\); only images"):
        augmentations("crop", (64,))


def test_augmented_batches_are_a_function_of_seed_and_step():
    rows, labels = rows_of((8, 8), count=40), np.arange(40)
    options = {"batch_size": 8, "augment": "crop,flip", "image_shape": (8, 8)}
    first, second = (Batches(rows, labels, seed=3, **options) for _ in range(2))
    for step in (7, 0, 12, 7):
        np.testing.assert_array_equal(first(step)["image"], second(step)["image"])
    plain = Batches(rows, labels, batch_size=8, seed=3)
    np.testing.assert_array_equal(first.indices(7), plain.indices(7))
    np.testing.assert_array_equal(first(7)["label"], plain(7)["label"])
    assert not np.array_equal(first(7)["image"], plain(7)["image"])
    # Another draw at every step and for every seed: the same image twice is varied twice.
    one = Batches(rows[:1], labels[:1], seed=3, **(options | {"batch_size": 1}))
    assert len({one(step)["image"].tobytes() for step in range(40)}) > 30
    other = Batches(rows[:1], labels[:1], seed=4, **(options | {"batch_size": 1}))
    assert sum(np.array_equal(one(step)["image"], other(step)["image"]) for step in range(40)) < 5


def test_the_draws_are_not_those_of_the_order():
    """numpy pads a seed with zeros: (seed, step, 0) would be the generator of epoch number ``step``."""
    rows = rows_of((8, 8), count=8)
    batches = Batches(rows, np.arange(8), 8, seed=3, augment="flip", image_shape=(8, 8))
    order = np.random.default_rng((3, 5)).random(8) < 0.5
    taken = rows[batches.indices(5)].reshape(-1, 8, 8)
    flipped = (batches(5)["image"].reshape(-1, 8, 8) != taken).any(axis=(1, 2))
    assert not np.array_equal(flipped, order)


def test_a_config_augments_its_batches_after_the_normalization(tiny_classifier):
    tiny_classifier.data.update(augment="crop", normalize=True)
    dataset = load(tiny_classifier)
    batch = make_batches(tiny_classifier, dataset)(0)["image"].reshape(-1, 8, 8)
    # Zeros are the mean, not black, which is now negative.
    assert dataset.train_images.min() < 0.0 and (dataset.train_images != 0.0).all()
    borders = (batch == 0.0).all(axis=2).any() or (batch == 0.0).all(axis=1).any()
    assert borders
    tiny_classifier.data.augment = ""
    plain = make_batches(tiny_classifier, dataset)(0)
    assert (plain["image"] != 0.0).all()
