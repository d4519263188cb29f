"""Dense layers: s = Wᵀ x + b for a kernel W (d, d_out); ā = [x; 1], W̄ = [W; bᵀ]. Any linear map of one kernel is one."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from kfe_optax._layers.kinds.base import Kind, Parts, Shape, grid_matrix, grid_parts, homogeneous


@dataclasses.dataclass(frozen=True)
class Dense(Kind):
    """`nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, `tag_dense`.

    y = einsum("inputs,kernel->outputs", x, kernel) + bias. Axes of x that the kernel lacks are the examples and shared positions,
    axes of the kernel that only x has form d_in, those that only y has form d_out, and those that both have are blocks, each a
    dense layer of its own.

    A transposed use, u = v Wᵀ, has input and output exchanged: reverse mode inside the loss makes them, and tied weights. There a
    row is ā = ∂loss/∂u, without the 1, and g = v. A kernel with both kinds has F ≈ A₁⊗G₁ + A₂⊗G₂; its single product keeps the
    trace: σ = Σ tr A_u tr G_u, A = Σ tr(G_u) A_u / σ, G = Σ tr(A_u) G_u.

    Attributes:
      approximation: "joint": one A and one G; "heads": the first of several input axes (an attention's output projection) or
        output axes (its query, key and value) is cut into heads, with an A or a G a head.
      kernel: a letter an axis of the kernel.
      inputs: those of x; "..." stands for any leading axes.
      outputs: those of y.
      bias: those of the bias.
    """

    approximation: str = "joint"
    kernel: str = "ab"
    inputs: str = "...a"
    outputs: str = "...b"
    bias: str = "b"

    name: ClassVar[str] = "dense"
    approximations: ClassVar[tuple[str, ...]] = ("joint", "heads")

    @property
    def labels(self) -> tuple[str, str, str]:
        """The kernel's letters of the blocks, of the input and of the output."""
        both = [c for c in self.kernel if c in self.inputs and c in self.outputs]
        ins = [c for c in self.kernel if c not in self.outputs]
        outs = [c for c in self.kernel if c not in self.inputs]
        return "".join(both), "".join(ins), "".join(outs)

    def _sizes(self, kernel: Shape) -> tuple[int, int, int]:
        size = dict(zip(self.kernel, kernel, strict=True))
        block, ins, outs = (math.prod(size[c] for c in labels) for labels in self.labels)
        return block, ins, outs

    def _grid(self, kernel: Shape) -> tuple[int, int] | None:
        if self.approximation != "heads":
            return None
        size = dict(zip(self.kernel, kernel, strict=True))
        _, ins, outs = self.labels
        return size[ins[0]] if len(ins) > 1 else 1, size[outs[0]] if len(outs) > 1 else 1

    def check(self, kernel):
        block, ins, outs = self.labels
        if self.approximation == "heads" and (block or (len(ins) < 2 and len(outs) < 2)):
            raise ValueError(
                "approximation='heads' needs a kernel with an axis of heads beside that of the features, such as an "
                f"attention's projections have, not one of shape {kernel}"
            )

    def blocks(self, kernel):
        grid = self._grid(kernel)
        if grid:
            return grid
        return (self._sizes(kernel)[0],) if self.labels[0] else ()

    def side_blocks(self, kernel):
        grid = self._grid(kernel)
        if grid:
            return (grid[0], 1), (1, grid[1])
        return self.blocks(kernel), self.blocks(kernel)

    def sides(self, kernel, bias):
        _, ins, outs = self._sizes(kernel)
        p, q = self._grid(kernel) or (1, 1)
        return ins // p + bias, outs // q

    def to_matrix(self, leaves):
        shape = leaves["kernel"].shape
        lead, kernel = shape[: len(shape) - len(self.kernel)], shape[len(shape) - len(self.kernel) :]
        block, ins, outs = self.labels
        sizes = self._sizes(kernel)
        w = _arranged(leaves["kernel"], self.kernel, block + ins + outs)
        w = w.reshape(*lead, *(sizes if block else sizes[1:]))
        b = None
        if "bias" in leaves:
            b = _arranged(leaves["bias"], self.bias, block + outs)
            b = b.reshape(*lead, *((sizes[0],) if block else ()), sizes[2])
        grid = self._grid(kernel)
        if grid:
            return grid_matrix(w, b, grid)
        return w if b is None else jnp.concatenate([w, b[..., None, :]], -2)

    def from_matrix(self, matrix, kernel, bias):
        size = dict(zip(self.kernel, kernel, strict=True))
        block, ins, outs = self.labels
        if self._grid(kernel):
            w, b = grid_parts(matrix, bias)
        else:
            w, b = (matrix[..., :-1, :], matrix[..., -1, :]) if bias else (matrix, None)
        lead = w.shape[: w.ndim - (3 if block else 2)]
        order = block + ins + outs
        leaves = {"kernel": _arranged(w.reshape(*lead, *(size[c] for c in order)), order, self.kernel)}
        if b is not None:
            order = block + outs
            leaves["bias"] = _arranged(b.reshape(*lead, *(size[c] for c in order)), order, self.bias)
        return leaves

    def expanded(self, labels: str, rank: int) -> str:
        """The letters of an input or output of this rank, with capitals in place of "..."."""
        if "..." not in labels:
            return labels
        extra = rank - (len(labels) - 3)
        return labels.replace("...", "".join(chr(ord("A") + i) for i in range(extra)))

    def free_labels(self, rank: int) -> str:
        """The letters of the examples and positions of an input of this rank."""
        return "".join(c for c in self.expanded(self.inputs, rank) if c not in self.kernel)

    def free(self, x, y):
        labels = self.expanded(self.inputs, len(x))
        size = dict(zip(labels, x, strict=True))
        return tuple(size[c] for c in self.free_labels(len(x))) or (1,)

    def batch_axis(self, x):
        labels = self.free_labels(len(x))
        return self.expanded(self.inputs, len(x)).index(labels[0]) if labels else 0

    def row_shapes(self, x, y):
        rows = math.prod(self.free(x, y))
        return {"input": (rows, math.prod(x) // rows), "output": (rows, math.prod(y) // rows)}

    def row_values(self, x, g):
        block, ins, outs = self.labels
        free = self.free_labels(x.ndim)
        shapes = self.row_shapes(x.shape, g.shape)
        x = _arranged(x, self.expanded(self.inputs, x.ndim), free + block + ins)
        g = _arranged(g, self.expanded(self.outputs, g.ndim), free + block + outs)
        return {"input": x.reshape(shapes["input"]), "output": g.reshape(shapes["output"])}

    def input_rows(self, parts: Parts, kernel: Shape, bias: bool):
        rows = _blocked(parts["input"], self.side_blocks(kernel)[0])
        return homogeneous(rows, self._grid(kernel) is not None) if bias else rows

    def output_rows(self, parts: Parts, kernel: Shape):
        return _blocked(parts["output"], self.side_blocks(kernel)[1])


def _arranged(array: jax.Array, labels: str, order: str) -> jax.Array:
    """The last axes, which `labels` names, in the order of `order`."""
    lead = array.ndim - len(labels)
    return array.transpose(*range(lead), *(lead + labels.index(c) for c in order))


def _blocked(rows: jax.Array, blocks: Shape) -> jax.Array:
    """Rows (m, t, blocks d) as (*blocks, m, t, d)."""
    if not blocks:
        return rows
    m, t, width = rows.shape
    split = jnp.moveaxis(rows.reshape(m, t, math.prod(blocks), -1), 2, 0)
    return split.reshape(*blocks, m, t, width // math.prod(blocks))
