"""The FACES data: 25x25 gray faces, from scikit-image's wheel, multiplied by augmentation.

scikit-image ships a hundred faces of the Labeled Faces in the Wild set at exactly the 25x25 pixels
of the usual FACES autoencoder. A hundred images train nothing of that size, so each is varied:
mirrored, moved, turned, scaled, and changed in contrast and brightness.
"""

from __future__ import annotations

import importlib

import numpy as np

from kfe_optax.experiments.dataset import Dataset, check_size
from kfe_optax.experiments.errors import ExperimentError

SIDE = 25
_FACES = 100  # scikit-image's array holds a hundred faces, then a hundred patches without one
_TEST_FACES = 10


def embedded_faces(variations: int, seed: int = 0) -> Dataset:
    """Ninety people for training and ten others for testing, ``variations`` images of each.

    No person is in both sets: variations of one photograph would make the test loss meaningless.
    """
    faces = _read_embedded()
    check_size(4 * faces.size * variations, "The faces of config.data.variations")
    generator = np.random.default_rng(seed)
    people = generator.permutation(len(faces))
    train = augmented(faces[people[:-_TEST_FACES]], variations, generator)
    test = augmented(faces[people[-_TEST_FACES:]], variations, generator)
    return Dataset(
        train,
        np.zeros(len(train), np.int32),
        test,
        np.zeros(len(test), np.int32),
        "100 faces of scikit-image's lfw_subset, augmented",
        image_shape=(SIDE, SIDE),
    )


def augmented(images: np.ndarray, variations: int, generator: np.random.Generator) -> np.ndarray:
    """``variations`` random variations of every image (n, side, side), as flat rows in [0, 1]."""
    repeated = np.repeat(images, variations, axis=0).astype(np.float32)
    count, side = len(repeated), repeated.shape[1]
    mirrored = generator.random(count) < 0.5
    repeated[mirrored] = repeated[mirrored, :, ::-1]
    moved = _transformed(
        repeated,
        angle=generator.uniform(-0.15, 0.15, count),
        scale=generator.uniform(0.92, 1.08, count),
        shift=generator.uniform(-1.5, 1.5, (count, 2)),
    )
    contrast = generator.uniform(0.8, 1.2, (count, 1))
    brightness = generator.uniform(-0.1, 0.1, (count, 1))
    flat = moved.reshape(count, side * side)
    mean = flat.mean(axis=1, keepdims=True)
    return np.clip((flat - mean) * contrast + mean + brightness, 0.0, 1.0).astype(np.float32)


def _transformed(images: np.ndarray, angle: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Turns, scales and shifts every image by its own amount, with bilinear interpolation."""
    count, side = len(images), images.shape[1]
    center = (side - 1) / 2
    row, column = np.meshgrid(np.arange(side) - center, np.arange(side) - center, indexing="ij")
    cosine = (np.cos(angle) / scale)[:, None, None]
    sine = (np.sin(angle) / scale)[:, None, None]
    # For each target pixel, the place in the source that it shows; the border is repeated outward.
    source_row = np.clip(cosine * row + sine * column + center + shift[:, 0, None, None], 0, side - 1)
    source_column = np.clip(cosine * column - sine * row + center + shift[:, 1, None, None], 0, side - 1)
    top = np.minimum(source_row.astype(int), side - 2)
    left = np.minimum(source_column.astype(int), side - 2)
    down, right = source_row - top, source_column - left
    which = np.arange(count)[:, None, None]
    upper = images[which, top, left] * (1 - right) + images[which, top, left + 1] * right
    lower = images[which, top + 1, left] * (1 - right) + images[which, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _read_embedded() -> np.ndarray:
    """The hundred faces (100, 25, 25) that scikit-image's wheel ships."""
    try:
        data = importlib.import_module("skimage.data")
    except ImportError as error:
        raise ExperimentError(
            "The embedded faces come with scikit-image; install it with 'pip install "
            "scikit-image', or set config.data_dir to an .npz file of faces."
        ) from error
    return np.asarray(data.lfw_subset()[:_FACES], np.float32)
