"""How a layer sees a parameter whose axes were moved, joined or split."""

from __future__ import annotations

from typing import NamedTuple

import jax


class View(NamedTuple):
    """A parameter with its axes moved and joined or split, as a layer uses it; stacked axes stand in front and stay.

    Attributes:
      axes: the order of its axes.
      before: its shape, in their first order.
      shape: what it is reshaped to behind that.
    """

    axes: tuple[int, ...]
    before: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, leaf: jax.Array) -> jax.Array:
        lead = leaf.ndim - len(self.axes)
        moved = leaf.transpose(*range(lead), *(lead + axis for axis in self.axes))
        return moved.reshape(*leaf.shape[:lead], *self.shape)

    def back(self, leaf: jax.Array) -> jax.Array:
        lead = leaf.ndim - len(self.shape)
        moved = leaf.reshape(*leaf.shape[:lead], *(self.before[axis] for axis in self.axes))
        inverse = sorted(range(len(self.axes)), key=lambda i: self.axes[i])
        return moved.transpose(*range(lead), *(lead + i for i in inverse))


Views = tuple[tuple[str, tuple[View, ...]], ...]
