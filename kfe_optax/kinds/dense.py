"""Dense layers: s = Wᵀ x + b for a kernel W (d, d_out); ā = [x; 1], W̄ = [W; bᵀ]."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


class Dense:
    """`nn.Dense`, `nnx.Linear`, `tag_dense`: any leading axes beyond the batch are shared positions (see `Kind`)."""

    name = "dense"
    convolution = False

    def sides(self, kernel: Shape, bias: bool) -> tuple[int, int]:
        return kernel[0] + bias, kernel[1]

    def to_matrix(self, leaves: Mapping[str, jax.Array]) -> jax.Array:
        if "bias" not in leaves:
            return leaves["kernel"]
        return jnp.concatenate([leaves["kernel"], leaves["bias"][..., None, :]], -2)

    def from_matrix(self, matrix: jax.Array, kernel: Shape, bias: bool) -> dict[str, jax.Array]:
        if not bias:
            return {"kernel": matrix}
        return {"kernel": matrix[..., : kernel[0], :], "bias": matrix[..., kernel[0], :]}

    def positions(self, x: Shape) -> tuple[int, int]:
        return (x[0], math.prod(x[1:-1])) if len(x) > 1 else (1, 1)

    def row_riders(self, x: Shape, y: Shape) -> dict[str, Shape]:
        rows = math.prod(x[:-1])
        return {"input": (rows, x[-1]), "output": (rows, y[-1])}

    def rows(self, x: jax.Array, g: jax.Array, examples: int, bias: bool) -> tuple[jax.Array, jax.Array]:
        if bias:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)

        def split(v):
            return v.reshape(*v.shape[:-2], examples, -1, v.shape[-1])

        return split(x), split(g)

    def additive_riders(self, kernel: Shape, x: Shape, examples: bool) -> dict[str, Shape]:
        d, d_out = kernel
        shapes = {
            "inputs": (d, d),
            "outputs": (d_out, d_out),
            "input_sum": (1, d),
            "count": (1, 1),
        }
        if examples:
            shapes["examples"] = (x[0], (d + 1) * d_out)
        return shapes

    def additive_factors(self, sums: Mapping[str, jax.Array], bias: bool) -> tuple[jax.Array, jax.Array]:
        count = jnp.maximum(sums["count"], 1)
        inputs = sums["inputs"] / count
        if bias:
            mean = sums["input_sum"] / count
            corner = jnp.ones_like(count)
            inputs = jnp.block([[inputs, mean.mT], [mean, corner]])
        return inputs, sums["outputs"]
