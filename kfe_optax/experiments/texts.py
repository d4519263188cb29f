"""Character-level text: the prose of Python's own documentation, or a file.

A text becomes sequences of whole numbers, one a character, and the label of a character is the
one that follows it.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from kfe_optax.experiments.dataset import Dataset, check_size
from kfe_optax.experiments.errors import ExperimentError


def embedded_topics(length: int) -> Dataset:
    """The topics of Python's ``help()``: half a million characters of English prose with code in it.

    They are the standard library's ``pydoc_data.topics`` in the order of their titles, and differ
    a little between versions of Python.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ExperimentError(
            "This Python comes without the module 'pydoc_data.topics', which holds the embedded text; set "
            "config.data_dir to a .txt file."
        ) from error
    text = "\n\n".join(topics[title] for title in sorted(topics))
    return text_dataset(text, length, "the help topics of Python's standard library")


def read_text(path: Path, length: int) -> Dataset:
    """Reads a text file in UTF-8."""
    try:
        # A character is four bytes as a code and as many as a token.
        check_size(8 * path.stat().st_size, f"'{path}'")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(
            f"'{path}' cannot be read as text in UTF-8 ({error}); save it in that encoding."
        ) from error
    return text_dataset(text, length, str(path))


def text_dataset(text: str, length: int, source: str) -> Dataset:
    """The text cut into sequences of ``length`` characters that do not overlap.

    The last tenth of the text is for testing. Character number i of the sorted characters of the
    first nine tenths is token i; all others are one replacement token, the last of the vocabulary.

    Returns:
      A dataset whose ``train_images`` (n, length) are the tokens and whose ``train_labels``
      (n, length) the tokens one place later, both int32; ``vocabulary`` counts the tokens.

    Raises:
      ExperimentError: a part of the text is too short for one sequence.

    Example::

        dataset = text_dataset("to be or not to be, that is the question" * 20, 16, "Hamlet")
        dataset.train_images.shape, dataset.vocabulary      # (44, 16), 15
    """
    if length < 1:
        raise ExperimentError(
            f"config.data.length is {length}; a sequence needs at least 1 character, such as 128."
        )
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    train, test = np.split(codes, [len(codes) - len(codes) // 10])
    if len(test) <= length:
        raise ExperimentError(
            f"The text ({source}) has {len(codes):,} characters, and its last tenth is for testing; sequences "
            f"of {length} need at least {10 * (length + 1):,}: take a longer text or a smaller "
            "config.data.length."
        )
    characters = np.unique(train)
    train_inputs, train_targets = _sequences(_tokens(train, characters), length)
    test_inputs, test_targets = _sequences(_tokens(test, characters), length)
    return Dataset(
        train_inputs,
        train_targets,
        test_inputs,
        test_targets,
        source,
        image_shape=(length,),
        vocabulary=len(characters) + 1,
    )


def _tokens(codes: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """Each character's place in ``characters``, or their number for one that is not there."""
    places = np.minimum(np.searchsorted(characters, codes), len(characters) - 1)
    return np.where(characters[places] == codes, places, len(characters)).astype(np.int32)


def _sequences(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens as rows (n, length), and the rows one place later; an incomplete row is dropped."""
    used = (len(tokens) - 1) // length * length
    return tokens[:used].reshape(-1, length), tokens[1 : used + 1].reshape(-1, length)
