"""Batches as a pure function of the seed and the step, so that a resumed run sees the same ones."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from kfe_optax.experiments.augmentation import augment_images, augmentations
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.growth import Phase, phases_of
from kfe_optax.experiments.parallel import WHOLE, Share

Batch = dict[str, np.ndarray]


class Batches:
    """Shuffled batches of a data set; the last partial batch of an epoch is dropped.

    The order of an epoch is a permutation drawn from (seed, epoch) alone, and the augmentation of a
    batch is drawn from (seed, step). Nothing is consumed and nothing is carried along:
    ``batches(step)`` is the same whether the run came to this step in one go or was stopped and
    resumed. Where the batch grows, a new size begins a new epoch.

    Args:
      images: the examples, one a row.
      labels: their labels, one a row.
      batch_size: examples a batch, or the phases of a growing batch, see ``growth.growing_batch``.
      seed: of the order and the augmentation.
      augment: ``""`` or names with commas between them, see ``augmentation.augment_images``.
      image_shape: (height, width) or (height, width, channels) of a row; augmentation needs it.
      share: which rows of every batch are drawn, where several processes share it.

    Example::

        batches = Batches(images, labels, batch_size=512, seed=0)
        batches(980)["image"].shape                     # (512, 784)
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int | Sequence[Phase],
        seed: int,
        *,
        augment: str = "",
        image_shape: tuple[int, ...] = (),
        share: Share = WHOLE,
    ):
        phases = (Phase(0, batch_size),) if isinstance(batch_size, int) else tuple(batch_size)
        for phase in phases:
            if not 1 <= phase.batch_size <= len(images):
                raise ExperimentError(
                    f"config.batch_size is {phase.batch_size} and there are {len(images)} training images; "
                    f"choose a batch size from 1 to {len(images)}."
                )
        self._images = images
        self._labels = labels
        self._phases = phases
        self._epochs = _first_epochs(phases, len(images))
        self._seed = seed
        self._augmentations = augmentations(augment, image_shape)
        self._image_shape = image_shape
        self._share = share
        self._order: tuple[int, np.ndarray] | None = None  # the last epoch and its permutation

    def batch_size(self, step: int) -> int:
        """The number of examples in the batch of ``step``."""
        return self._phases[self._phase(step)].batch_size

    def first_steps(self, run_steps: int) -> list[int]:
        """The first step of each batch size within a run."""
        return [phase.start for phase in self._phases if phase.start < run_steps]

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, to which a step belongs."""
        return self._place(step)[0]

    def _phase(self, step: int) -> int:
        return bisect.bisect_right(self._phases, step, key=lambda phase: phase.start) - 1

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the place of its batch within it."""
        number = self._phase(step)
        phase = self._phases[number]
        epochs, position = divmod(step - phase.start, len(self._images) // phase.batch_size)
        return self._epochs[number] + epochs, position

    def indices(self, step: int) -> np.ndarray:
        """Which images form the batch of ``step``."""
        epoch, position = self._place(step)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._order = (epoch, generator.permutation(len(self._images)))
        size = self.batch_size(step)
        return self._order[1][position * size : (position + 1) * size]

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``, or this process's share: ``{"image": (batch, pixels), "label": (batch,)}``."""
        own = self._share.rows(self.batch_size(step))
        chosen = self.indices(step)[own]
        images = self._images[chosen]
        if self._augmentations:
            # numpy takes (seed, step, 0) for (seed, step), the key of an epoch's order: hence the 1.
            generator = np.random.default_rng((self._seed, step, 1))
            images = augment_images(
                images, self._image_shape, self._augmentations, generator, batch=(self.batch_size(step), own)
            )
        return {"image": images, "label": self._labels[chosen]}


def _first_epochs(phases: Sequence[Phase], examples: int) -> list[int]:
    """The epoch with which each phase begins; a partial one before it counts."""
    first = [0]
    for phase, following in itertools.pairwise(phases):
        steps = following.start - phase.start
        first.append(first[-1] + math.ceil(steps / (examples // phase.batch_size)))
    return first


def make_batches(
    config: ConfigDict, dataset: Dataset, seed: int | None = None, *, share: Share = WHOLE
) -> Batches:
    """The training batches that a config describes: ``batch_size``, ``batch_growth``, ``seed`` and ``data.augment``.

    ``seed`` stands for that of the config where it is given.

    Example::

        batches = make_batches(config, load(config))
        batches(0)["image"].shape                       # (512, 784)
    """
    return Batches(
        dataset.train_images,
        dataset.train_labels,
        phases_of(config, len(dataset.train_images)),
        config.seed if seed is None else seed,
        augment=config.data.augment,
        image_shape=dataset.image_shape,
        share=share,
    )
