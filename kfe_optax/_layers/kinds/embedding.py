"""Embeddings: a dense layer of one-hot vectors, whose A is diagonal; tied ones serve as an output layer as well."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax

from kfe_optax._layers.kinds.base import Kind

LOOKUP = "lookup"


@dataclasses.dataclass(frozen=True)
class Embedding(Kind):
    """`nn.Embed`, `nnx.Embed`: ā_t is the one-hot vector of token t, W̄ the table (tokens, features), A the tokens' frequencies.

    `attend` (x ↦ E x, a tied output layer) is a transposed use of the table (see `Dense`): there a row is ā = ∂loss/∂logits and
    g = x.
    """

    name: ClassVar[str] = "embedding"
    statistics: ClassVar[str] = "tokens"

    @property
    def diagonal(self) -> tuple[bool, bool]:
        return True, False

    def sides(self, kernel, bias):
        return kernel[0], kernel[1]

    def to_matrix(self, leaves):
        return leaves["kernel"]

    def from_matrix(self, matrix, kernel, bias):
        return {"kernel": matrix}

    def moments_shape(self, kernel, bias):
        return (kernel[0],)

    def free(self, x, y):
        return y[:-1] or (1,)

    def row_shapes(self, x, y):
        rows = math.prod(self.free(x, y))
        return {"input": (rows, 1), "output": (rows, y[-1])}

    def row_values(self, x, g):
        shapes = self.row_shapes(x.shape, g.shape)
        return {"input": x.reshape(shapes["input"]), "output": g.reshape(shapes["output"])}

    def row_bytes(self, x, y, kernel, bias):
        # The one-hot vectors are never formed.
        return 4 * math.prod(self.free(x, y)[1:]) * (y[-1] + 1)

    def input_rows(self, parts, kernel, bias):
        """One-hot vectors in full, for tests and small tables; the statistics do without."""
        return jax.nn.one_hot(parts["input"][..., 0].astype(int), kernel[0], dtype=parts["output"].dtype)

    def output_rows(self, parts, kernel):
        return parts["output"]
