"""Text as sequences of tokens: the windows, the vocabulary, the division, and files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from kfe_optax.experiments import settings
from kfe_optax.experiments.batches import make_batches
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.readers import read_data_dir
from kfe_optax.experiments.texts import text_dataset

TEXT = "the quick brown fox jumps over the lazy dog, " * 10  # 450 characters


def decoded(tokens: np.ndarray, characters: str) -> str:
    return "".join(characters[token] for token in tokens.ravel())


def test_windows_follow_each_other_and_labels_are_one_character_later():
    dataset = text_dataset(TEXT, 16, "it")
    characters = "".join(sorted(set(TEXT)))
    train, test = TEXT[:405], TEXT[405:]
    assert dataset.train_images.shape == dataset.train_labels.shape == (25, 16)
    assert dataset.test_images.shape == dataset.test_labels.shape == (2, 16)
    assert decoded(dataset.train_images, characters) == train[:400]
    assert decoded(dataset.train_labels, characters) == train[1:401]
    assert decoded(dataset.test_images, characters) == test[:32]
    assert decoded(dataset.test_labels, characters) == test[1:33]
    assert dataset.train_images.dtype == dataset.test_labels.dtype == np.int32
    assert dataset.image_shape == (16,) and dataset.pixels == 16
    assert dataset.vocabulary == len(characters) + 1
    assert dataset.summary() == (
        f"25 training and 2 test sequences of 16 tokens out of {dataset.vocabulary} (it)"
    )


def test_a_last_character_serves_as_a_label():
    # 36 characters for training: nine windows of 4 would have no label for the last character.
    dataset = text_dataset("abcd" * 10, 3, "it")
    assert dataset.train_images.shape == (11, 3)
    # 37 of 41 characters: twelve windows of 3 and one more as the last label.
    assert text_dataset("abcd" * 10 + "a", 3, "it").train_labels.shape == (12, 3)


def test_characters_that_only_the_test_part_has_are_the_replacement():
    text = "b" + "ac" * 43 + "dee" + "ae\N{SNOWMAN}abcadA!"  # the last ten are for testing
    assert len(text) == 100
    dataset = text_dataset(text, 9, "it")
    # a, b, c, d, e are 0 to 4, and all others 5.
    assert dataset.vocabulary == 6
    np.testing.assert_array_equal(dataset.test_images, [[0, 4, 5, 0, 1, 2, 0, 3, 5]])
    np.testing.assert_array_equal(dataset.test_labels, [[4, 5, 0, 1, 2, 0, 3, 5, 5]])


@pytest.mark.parametrize(
    ("text", "length", "sentence"),
    [
        (TEXT, 0, "config.data.length is 0"),
        (TEXT, 45, "has 450 characters.*sequences of 45 need at least 460"),
        ("", 8, "has 0 characters"),
    ],
)
def test_texts_that_cannot_be_cut_are_one_sentence(text, length, sentence):
    with pytest.raises(ExperimentError, match=sentence):
        text_dataset(text, length, "it")


def test_a_text_of_just_the_needed_length():
    assert text_dataset("a" * 460, 45, "it").test_images.shape == (1, 45)


def text_config(data_dir="", **data):
    config = settings.base_config("text")
    config.data_dir = str(data_dir)
    config.data.update(data)
    return config


def test_files_and_folders(tmp_path):
    path = tmp_path / "pangram.txt"
    path.write_text(TEXT + "é\N{SNOWMAN}", encoding="utf-8")
    for place in (path, tmp_path):
        dataset = load(text_config(place, length=20))
        assert dataset.train_images.shape == (20, 20)
        assert str(path) in dataset.source
    part = load(text_config(path, length=20, train_size=3))
    np.testing.assert_array_equal(part.train_labels, dataset.train_labels[:3])
    assert part.vocabulary == dataset.vocabulary
    # Images win: CIFAR-10's and other folders of images hold lists of names.
    np.savez(tmp_path / "images.npz", x=np.zeros((4, 2, 2), np.uint8))
    assert read_data_dir(str(tmp_path)).vocabulary == 0
    (tmp_path / "images.npz").unlink()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ExperimentError, match=r"several \.txt files \(notes\.txt, pangram\.txt\)"):
        read_data_dir(str(tmp_path))
    path.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(ExperimentError, match="cannot be read as text in UTF-8"):
        read_data_dir(str(path))


def test_the_embedded_topics():
    dataset = load(text_config(name="topics", length=64))
    assert dataset.image_shape == (64,)
    assert len(dataset.train_images) > 5000
    assert 90 < dataset.vocabulary < 130
    # English prose: half of all characters are among the nine most common ones.
    counts = np.sort(np.bincount(dataset.train_images.ravel()))[::-1]
    assert counts[:9].sum() > 0.5 * counts.sum()
    assert dataset.fingerprint() == load(text_config(name="topics", length=64)).fingerprint()


def test_without_the_topics_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ExperimentError, match=r"set config\.data_dir to a \.txt file"):
        load(text_config(name="topics"))


def test_batches_of_text_and_options_that_are_for_images():
    config = text_config(name="topics", length=32)
    config.batch_size = 7
    dataset = load(config)
    batch = make_batches(config, dataset)(3)
    assert batch["image"].shape == batch["label"].shape == (7, 32)
    assert batch["image"].dtype == batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 1:], batch["label"][:, :-1])
    config.data.augment = "flip"
    with pytest.raises(ExperimentError, match=r"one example has shape \(32,\)"):
        make_batches(config, dataset)
    config.data.normalize, config.loss = True, "softmax_cross_entropy"
    with pytest.raises(ExperimentError, match="are a text; leave it off"):
        load(config)
