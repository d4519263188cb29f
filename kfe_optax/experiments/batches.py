"""Batches as a pure function of the seed and the step, so that a resumed run sees the same ones."""

from __future__ import annotations

import numpy as np

from kfe_optax.experiments.errors import ExperimentError

Batch = dict[str, np.ndarray]


class Batches:
    """Shuffled batches of a data set; the last partial batch of an epoch is dropped.

    The order of an epoch is a permutation drawn from (seed, epoch) alone. Nothing is consumed and
    nothing is carried along: ``batches(step)`` is the same whether the run came to this step in one
    go or was stopped and resumed.

    Example::

        batches = Batches(images, labels, batch_size=512, seed=0)
        batches(980)["image"].shape                     # (512, 784)
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(images):
            raise ExperimentError(
                f"config.batch_size is {batch_size} and there are {len(images)} training images; "
                f"choose a batch size from 1 to {len(images)}."
            )
        self._images = images
        self._labels = labels
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # the last epoch and its permutation
        self.steps_per_epoch = len(images) // batch_size

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, to which a step belongs."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """Which images form the batch of ``step``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._order = (epoch, generator.permutation(len(self._images)))
        start = position * self._batch_size
        return self._order[1][start : start + self._batch_size]

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``: ``{"image": (batch, pixels), "label": (batch,)}``."""
        chosen = self.indices(step)
        return {"image": self._images[chosen], "label": self._labels[chosen]}
