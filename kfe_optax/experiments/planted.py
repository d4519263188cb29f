"""Planted targets: outputs of a random linear map, which a linear network has to find again."""

from __future__ import annotations

import numpy as np

from kfe_optax.experiments.dataset import Dataset


def planted_targets(
    train_size: int, test_size: int, inputs: int, outputs: int, noise: float, seed: int = 0
) -> Dataset:
    """Gaussian inputs x and targets y = Wᵀx + ``noise`` times a Gaussian, W of N(0, 1/inputs).

    Inputs and targets have variance one. The map and the examples depend on ``seed`` alone, not on the
    run's, so that runs with different seeds have one problem.

    Example::

        dataset = planted_targets(25_000, 2_500, inputs=10, outputs=10, noise=0.01)
        dataset.train_images.shape, dataset.train_labels.shape      # (25000, 10), (25000, 10)
    """
    # A stream each, so that the size of one set changes nothing in the others.
    of_map, of_train, of_test = (np.random.default_rng((seed, stream)) for stream in range(3))
    planted = of_map.normal(size=(inputs, outputs)) / np.sqrt(inputs)

    def examples(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = generator.normal(size=(count, inputs + outputs))
        x = rows[:, :inputs]
        y = x @ planted + noise * rows[:, inputs:]
        return x.astype(np.float32), y.astype(np.float32)

    return Dataset(
        *examples(train_size, of_train),
        *examples(test_size, of_test),
        f"targets of a planted linear map with noise {noise:g}",
        image_shape=(inputs,),
    )
