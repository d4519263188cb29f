"""One grid for the positions of all layers: nearest neighbors, scaled so that a layer's own curvature keeps its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax._layers.layer import Layer

Grid = tuple[int, ...]
Choice = Literal["finest", "coarsest"]


class Resampling(NamedTuple):
    """From the positions of one layer to those of the common grid.

    Attributes:
      index: which position of the layer is nearest, one a common position; None where the grids are equal.
      scale: what its values are multiplied with.
    """

    index: np.ndarray | None
    scale: np.ndarray | None

    def __call__(self, values: jax.Array) -> jax.Array:
        """(..., t) → (..., common positions)."""
        if self.index is None or self.scale is None:
            return values
        scale = jnp.asarray(self.scale, values.dtype)
        return values[..., self.index] * jnp.expand_dims(scale, range(values.ndim - 1))


def grid_of(layer: Layer) -> Grid:
    """The axes of a layer's positions, without those of size 1."""
    if layer.sharing == "reduce" or layer.kind.per_example:
        return ()
    x, y, *_ = layer.uses[0]
    batch, *axes = layer.kind.free(x, y)
    # Further axes may stand flattened with the batch.
    return tuple(size for size in (batch // layer.examples, *axes) if size > 1)


def resamplings(grids: Sequence[Grid], choice: Choice) -> tuple[list[Resampling], int]:
    """How each layer comes to the common grid, and how many positions that has.

    "finest" has the largest size of each axis, so that layers are repeated; "coarsest" the smallest, so that positions are left
    out. A layer with one position fits any grid. Grids of different ranks (a convolution, tokens) are flattened first.
    """
    if len({len(grid) for grid in grids if grid}) > 1:
        grids = [(math.prod(grid),) if grid else () for grid in grids]
    rank = max(map(len, grids))
    grids = [grid or (1,) * rank for grid in grids]
    extreme = max if choice == "finest" else min
    common = tuple(map(extreme, zip(*grids, strict=True)))
    return [_nearest(grid, common) for grid in grids], math.prod(common)


def _nearest(grid: Grid, common: Grid) -> Resampling:
    """α and γ times √w each, w = 1/(how often the position is repeated) · (all positions)/(those that are used).

    Σ w α² over the common grid is Σ α² over the layer's own where no position is left out, and an estimate of it otherwise; so is
    Σ w γ².
    """
    if grid == common:
        return Resampling(None, None)
    axes = [((np.arange(to) + 0.5) * size / to).astype(int) for size, to in zip(grid, common, strict=True)]
    index = np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), grid).ravel()
    repeats = np.bincount(index, minlength=math.prod(grid))
    return Resampling(index, np.sqrt(repeats.size / np.count_nonzero(repeats) / repeats[index]))
