"""What every kind of layer has in common: how parameters form W̄, and how a use of the layer forms rows."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

TRANSPOSED = "transposed"
"""The label of a use with input and output exchanged: an output layer that is tied to a table, reverse mode inside the loss."""

Shape = tuple[int, ...]
Parts = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Kind(abc.ABC):
    """A kind of layer, s = W̄ᵀ ā with W̄ of shape (*blocks, d_in, d_out); hashable, its fields hold the layer's geometry.

    Shapes are those of one layer without the axes that Flax stacks. Blocks are parts of the parameters between which the
    approximation has no curvature (feature groups, attention heads); each has its own A and G, or shares one of them: the block
    axes of A and of G then broadcast against those of W̄ (`side_blocks`). `...` stands for stacked axes.

    Attributes:
      approximation: one of `approximations`.
    """

    approximation: str = ""

    name: ClassVar[str] = ""
    approximations: ClassVar[tuple[str, ...]] = ("",)
    convolution: ClassVar[bool] = False  # whether TEKFAC's trace-tuned damping is that of a convolution
    statistics: ClassVar[str] = "rows"  # "rows", or "tokens" for rows that are one-hot vectors
    per_example: ClassVar[bool] = False  # whether one row an example is kept, which may be summed over uses

    @property
    def diagonal(self) -> tuple[bool, bool]:
        """Which of A and G are diagonals by their nature."""
        return False, False

    def configured(self, approximation: str, options: Mapping[str, Any]) -> Kind:
        """This kind with another approximation.

        Raises:
          ValueError: it has none of that name, or the layer's shape does not admit it.
        """
        if approximation not in self.approximations or options:
            known = " or ".join(repr(a) for a in self.approximations)
            extra = f" without {', '.join(options)}" if options else ""
            raise ValueError(f"a {self.name} layer takes approximation={known}{extra}, not {approximation!r}")
        return dataclasses.replace(self, approximation=approximation)

    def plain(self) -> Kind:
        """This kind with its default approximation, as `find_layers` finds it."""
        return dataclasses.replace(self, approximation=type(self)().approximation)

    def form(self) -> Kind:
        """This kind without what the size of the input makes of it."""
        return self

    def like(self, other: Kind) -> Kind:
        """This kind with the approximation of another one that was found of the same layer."""
        same = type(other) is type(self)
        return dataclasses.replace(self, approximation=other.approximation) if same else self

    def check(self, kernel: Shape) -> None:  # noqa: B027 (most kinds have nothing to check)
        """Raises ValueError when the approximation does not fit a kernel of this shape."""

    # Parameters.

    def blocks(self, kernel: Shape) -> Shape:
        """The leading axes of W̄."""
        del kernel
        return ()

    def side_blocks(self, kernel: Shape) -> tuple[Shape, Shape]:
        """The leading axes of A and of G, as many as `blocks`."""
        return self.blocks(kernel), self.blocks(kernel)

    @abc.abstractmethod
    def sides(self, kernel: Shape, bias: bool) -> tuple[int, int]:
        """(d_in, d_out) of one block; d_in counts the 1 of the bias."""

    @abc.abstractmethod
    def to_matrix(self, leaves: Parts) -> jax.Array:
        """{"kernel", "bias"} → W̄ (..., *blocks, d_in, d_out), the bias as the last row."""

    @abc.abstractmethod
    def from_matrix(self, matrix: jax.Array, kernel: Shape, bias: bool) -> dict[str, jax.Array]:
        """The inverse of `to_matrix`."""

    # One use of the layer, with input x and output y.

    @abc.abstractmethod
    def free(self, x: Shape, y: Shape) -> Shape:
        """The axes that share the parameters: the examples, then the positions."""

    def batch_axis(self, x: Shape) -> int:
        """Which axis of x is the first of `free`."""
        del x
        return 0

    @abc.abstractmethod
    def row_shapes(self, x: Shape, y: Shape) -> dict[str, Shape]:
        """Shapes of the row rider's parts; their leading axis is that of the examples, times positions."""

    @abc.abstractmethod
    def row_values(self, x: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
        """The row rider's parts, in `row_shapes`."""

    # Parts of a chunk of m examples, (m, e, ...): the leading axis of `row_shapes` is split into (examples, e).

    @abc.abstractmethod
    def input_rows(self, parts: Parts, kernel: Shape, bias: bool) -> jax.Array:
        """ā (*input blocks, m, t, d_in)."""

    @abc.abstractmethod
    def output_rows(self, parts: Parts, kernel: Shape) -> jax.Array:
        """g (*output blocks, m, t, d_out)."""

    def input_moments(
        self, parts: Parts, live: jax.Array | None, kernel: Shape, bias: bool, diagonal: bool
    ) -> jax.Array:
        """What is summed over examples to make A: Σ ā āᵀ, or its diagonal."""
        return gram(masked(self.input_rows(parts, kernel, bias), live), diagonal)

    def input_factor(
        self, moments: jax.Array, count: jax.Array | int, kernel: Shape, bias: bool, diagonal: bool
    ) -> jax.Array:
        """A = E[mean_t ā āᵀ] from the sum of `input_moments` over `count` positions."""
        del kernel, bias, diagonal
        return moments / count

    def moments_shape(self, kernel: Shape, bias: bool) -> Shape:
        """The shape of `input_moments`."""
        d = self.sides(kernel, bias)[0]
        return (*self.side_blocks(kernel)[0], d, d)

    def row_bytes(self, x: Shape, y: Shape, kernel: Shape, bias: bool) -> int:
        """Bytes of the rows of one example in float32."""
        d_in, d_out = self.sides(kernel, bias)
        blocks = [math.prod(b) for b in self.side_blocks(kernel)]
        positions = math.prod(self.free(x, y)[1:])
        return 4 * positions * (blocks[0] * d_in + blocks[1] * d_out)


def gram(rows: jax.Array, diagonal: bool) -> jax.Array:
    """Σ over (m, t) of row rowᵀ for rows (..., m, t, d), or its diagonal."""
    flat = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    return jnp.sum(flat * flat, -2) if diagonal else flat.mT @ flat


def masked(rows: jax.Array, live: jax.Array | None) -> jax.Array:
    """Rows (..., m, t, d) with those of positions outside `live` (m, t) set to zero."""
    if live is None:
        return rows
    factor = live[..., None].astype(rows.dtype)
    return rows * jnp.expand_dims(factor, range(rows.ndim - factor.ndim))


def homogeneous(rows: jax.Array, first_block_only: bool = False) -> jax.Array:
    """[a; 1]; with `first_block_only` the 1 stands in block 0 of the axis −5 alone, and 0 in the others.

    A bias belongs to one block of inputs: in the others its row of W̄ is zero and stays so.
    """
    ones = jnp.ones_like(rows[..., :1])
    if first_block_only:
        ones = ones * (jnp.arange(rows.shape[0]) == 0).reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.concatenate([rows, ones], -1)


def grid_matrix(kernel: jax.Array, bias: jax.Array | None, grid: tuple[int, int]) -> jax.Array:
    """A kernel (..., p b_in, q b_out) cut into a p × q grid of blocks, (..., p, q, b_in, b_out), the bias in blocks (0, ·)."""
    p, q = grid
    *lead, d_in, d_out = kernel.shape
    matrix = kernel.reshape(*lead, p, d_in // p, q, d_out // q).swapaxes(-3, -2)
    if bias is None:
        return matrix
    row = bias.reshape(*lead, 1, q, 1, d_out // q)
    rows = jnp.concatenate([row, jnp.zeros((*lead, p - 1, q, 1, d_out // q), row.dtype)], -4)
    return jnp.concatenate([matrix, rows], -2)


def grid_parts(matrix: jax.Array, bias: bool) -> tuple[jax.Array, jax.Array | None]:
    """The inverse of `grid_matrix`: the kernel (..., p b_in, q b_out) and the bias (..., q b_out)."""
    own = None
    if bias:
        own = matrix[..., 0, :, -1, :]
        own = own.reshape(*own.shape[:-2], -1)
        matrix = matrix[..., :-1, :]
    *lead, p, q, b_in, b_out = matrix.shape
    return matrix.swapaxes(-3, -2).reshape(*lead, p * b_in, q * b_out), own
