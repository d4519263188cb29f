"""Kinds of layers: how parameters form the matrix W̄, and how an input and an output gradient form rows.

One kind a file, one line in `KINDS`. A kind knows neither Flax nor an optimizer: the adapters say which Flax modules are of
which kind, and everything else (riders, factors, transforms, the conformance tests) goes through this interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax

from kfe_optax.kinds.dense import Dense

Shape = tuple[int, ...]


class Kind(Protocol):
    """A kind of layer, s = W̄ᵀ ā with W̄ of shape (d_in, d_out); leading axes `...` are stacked layers.

    Shapes are those of one layer without stacked axes. `bias` says whether ā ends with a constant 1.
    """

    name: str
    convolution: bool  # whether TEKFAC's trace-tuned damping is that of a convolution

    def sides(self, kernel: Shape, bias: bool) -> tuple[int, int]:
        """(d_in, d_out); d_in counts the 1 of the bias."""

    def to_matrix(self, leaves: Mapping[str, jax.Array]) -> jax.Array:
        """{"kernel", "bias"} → W̄ (..., d_in, d_out), the bias as the last row."""

    def from_matrix(self, matrix: jax.Array, kernel: Shape, bias: bool) -> dict[str, jax.Array]:
        """The inverse of `to_matrix`."""

    def rows(self, x: jax.Array, g: jax.Array, examples: int, bias: bool) -> tuple[jax.Array, jax.Array]:
        """Raw riders (..., n t, d) → ā (..., n, t, d_in) and g (..., n, t, d_out)."""

    def row_riders(self, x: Shape, y: Shape) -> dict[str, Shape]:
        """Shapes of the row rider for one use with input shape x and output shape y."""

    def additive_riders(self, kernel: Shape, x: Shape, examples: bool) -> dict[str, Shape]:
        """Shapes of the additive rider; with per-example gradients when `examples`."""

    def additive_factors(self, sums: Mapping[str, jax.Array], bias: bool) -> tuple[jax.Array, jax.Array]:
        """Additive sums → A = Σ āāᵀ / count and G = Σ ggᵀ."""

    def positions(self, x: Shape) -> tuple[int, int]:
        """(n, t): the examples and the shared positions in an input of shape x."""


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Dense(),)}
