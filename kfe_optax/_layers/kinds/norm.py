"""Scale and shift of a normalization: the exact Fisher of each feature's pair."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from kfe_optax._layers.kinds.base import Kind


@dataclasses.dataclass(frozen=True)
class Norm(Kind):
    """BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm: y = γ∘x̂ + β, one block a feature.

    The parameters of feature j are the row w_j = [γ_j, β_j] (or one of them), W̄ is (features, 1, 2), and the row of an
    example is ā = 1, g = ∂(its loss)/∂w_j, summed over its positions. A⊗G = 1⊗E[g gᵀ] is then the Fisher matrix of the pair
    itself.

    Attributes:
      approximation: "full": the 2 × 2 matrix; "diagonal": its diagonal.
    """

    approximation: str = "full"
    parameters: tuple[str, ...] = ("scale", "bias")
    axes: tuple[int, ...] = (-1,)  # the features' axes of x̂, negative, in the order of the parameters' axes

    name: ClassVar[str] = "norm"
    approximations: ClassVar[tuple[str, ...]] = ("full", "diagonal")
    per_example: ClassVar[bool] = True

    @property
    def diagonal(self) -> tuple[bool, bool]:
        return False, self.approximation == "diagonal"

    def blocks(self, kernel):
        return (math.prod(kernel),)

    def sides(self, kernel, bias):
        return 1, len(self.parameters)

    def to_matrix(self, leaves):
        rank = len(self.axes)
        columns = [leaves[name] for name in self.parameters]
        flat = [c.reshape(*c.shape[: c.ndim - rank], -1) for c in columns]
        return jnp.stack(flat, -1)[..., None, :]

    def from_matrix(self, matrix, kernel, bias):
        lead = matrix.shape[:-3]
        return {name: matrix[..., 0, i].reshape(*lead, *kernel) for i, name in enumerate(self.parameters)}

    def free(self, x, y):
        # One row an example: its positions are summed.
        return (x[0],) if len(x) > len(self.axes) else (1,)

    def row_shapes(self, x, y):
        features = math.prod(x[axis] for axis in self.axes)
        return {"output": (self.free(x, y)[0], features * len(self.parameters))}

    def row_values(self, x, g):
        """The gradient of every example: x is x̂."""
        wide = jnp.promote_types(g.dtype, jnp.float32)
        parts = {"scale": lambda: x.astype(wide) * g, "bias": lambda: g.astype(wide)}
        sums = [self._per_example(parts[name]()) for name in self.parameters]
        return {"output": jnp.stack(sums, -1).reshape(sums[0].shape[0], -1)}

    def _per_example(self, values: jax.Array) -> jax.Array:
        """Sums over all axes but the examples' and the features', (n, features)."""
        kept = [values.ndim + axis for axis in self.axes]
        batch = [] if len(kept) == values.ndim else [0]
        others = [axis for axis in range(values.ndim) if axis not in (*kept, *batch)]
        values = values.transpose(*batch, *kept, *others)
        values = values.sum(tuple(range(len(batch) + len(kept), values.ndim)))
        return values.reshape(values.shape[0] if batch else 1, -1)

    def input_rows(self, parts, kernel, bias):
        g = parts["output"]
        return jnp.ones((math.prod(kernel), g.shape[0], 1, 1), g.dtype)

    def input_factor(self, moments, count, kernel, bias, diagonal):
        # The mean of 1, however many parts of an example there are.
        return jnp.ones_like(moments)

    def output_rows(self, parts, kernel):
        # A batch that was flattened with other axes left several parts of an example.
        g = parts["output"].sum(1)
        return g.reshape(g.shape[0], -1, 1, len(self.parameters)).swapaxes(0, 1)

    def by_positions(self) -> NormByPositions:
        """The same parameters where it is not known which positions make an example."""
        return NormByPositions(self.approximation, self.parameters, self.axes)


@dataclasses.dataclass(frozen=True)
class NormByPositions(Norm):
    """A normalization whose examples are not known, such as that of a graph's nodes: a row a position.

    G = Σ_t g_t g_tᵀ with g_t = ∂L/∂w_j of position t alone, as a dense layer has it: the products of different positions of one
    example, of which nobody knows which they are, are left out.
    """

    per_example: ClassVar[bool] = False

    def free(self, x, y):
        kept = {len(x) + axis for axis in self.axes}
        return tuple(size for axis, size in enumerate(x) if axis not in kept) or (1,)

    def row_shapes(self, x, y):
        features = math.prod(x[axis] for axis in self.axes)
        return {"output": (math.prod(self.free(x, y)), features * len(self.parameters))}

    def _per_example(self, values: jax.Array) -> jax.Array:
        """With a row a position, (positions, features)."""
        kept = [values.ndim + axis for axis in self.axes]
        others = [axis for axis in range(values.ndim) if axis not in kept]
        features = math.prod(values.shape[axis] for axis in kept)
        return values.transpose(*others, *kept).reshape(-1, features)

    def input_rows(self, parts, kernel, bias):
        g = parts["output"]
        return jnp.ones((math.prod(kernel), *g.shape[:2], 1), g.dtype)

    def output_rows(self, parts, kernel):
        g = parts["output"]
        return jnp.moveaxis(g.reshape(*g.shape[:2], -1, len(self.parameters)), 2, 0)
