"""Convolutions with a kernel of their own at every position."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from kfe_optax._layers.kinds.base import Kind, homogeneous
from kfe_optax._layers.kinds.patches import Geometry


@dataclasses.dataclass(frozen=True)
class ConvLocal(Kind):
    """`nn.ConvLocal`: nothing is shared, and every output position is a block, a dense layer of its patch.

    Its kernel is (*positions, c K, d_out), the patch ordered (channel, window), its bias (*positions, d_out).
    """

    geometry: Geometry | None = None

    name: ClassVar[str] = "conv_local"

    def blocks(self, kernel):
        return (math.prod(kernel[:-2]),)

    def sides(self, kernel, bias):
        return kernel[-2] + bias, kernel[-1]

    def _rank(self) -> int:
        assert self.geometry is not None
        return len(self.geometry.window)

    def to_matrix(self, leaves):
        w = leaves["kernel"]
        lead = w.shape[: w.ndim - self._rank() - 2]
        w = w.reshape(*lead, -1, *w.shape[-2:])
        if "bias" not in leaves:
            return w
        return jnp.concatenate([w, leaves["bias"].reshape(*lead, w.shape[-3], 1, w.shape[-1])], -2)

    def from_matrix(self, matrix, kernel, bias):
        lead = matrix.shape[:-3]
        w = matrix[..., :-1, :] if bias else matrix
        leaves = {"kernel": w.reshape(*lead, *kernel)}
        if bias:
            leaves["bias"] = matrix[..., -1, :].reshape(*lead, *kernel[:-2], kernel[-1])
        return leaves

    def free(self, x, y):
        return x[: len(x) - self._rank() - 1] or (1,)

    def row_shapes(self, x, y):
        batch, rank = math.prod(self.free(x, y)), self._rank() + 1
        return {"input": (batch, *x[-rank:]), "output": (batch, *y[-rank:])}

    def row_values(self, x, g):
        shapes = self.row_shapes(x.shape, g.shape)
        return {"input": x.reshape(shapes["input"]), "output": g.reshape(shapes["output"])}

    def input_rows(self, parts, kernel, bias):
        assert self.geometry is not None
        x = parts["input"]
        m, e = x.shape[:2]
        patches = self.geometry.patches(x.reshape(m * e, *x.shape[2:]))
        rows = patches.swapaxes(-1, -2).reshape(m, e, patches.shape[1], -1).transpose(2, 0, 1, 3)
        return homogeneous(rows) if bias else rows

    def output_rows(self, parts, kernel):
        g = parts["output"]
        m, e = g.shape[:2]
        return g.reshape(m, e, -1, g.shape[-1]).transpose(2, 0, 1, 3)
