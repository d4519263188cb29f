"""Convolutions: every output position is a dense layer of its patch (Grosse & Martens 2016)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from kfe_optax._layers.kinds import base
from kfe_optax._layers.kinds.base import Kind, Parts, Shape, grid_matrix, grid_parts, homogeneous
from kfe_optax._layers.kinds.patches import Geometry

_POINT = Geometry((), (), (), (), ())


@dataclasses.dataclass(frozen=True)
class Conv(Kind):
    """`nn.Conv`, `nnx.Conv`, `nn.ConvTranspose`, `nnx.ConvTranspose` in 1, 2 and 3 dimensions; ā_t = [patch under t; 1].

    A patch is ordered as Flax's kernel (window, input channel). With feature groups the groups are blocks, exactly: W̄ is (groups,
    d_in, d_out). The product A⊗G of A = E[mean_t ā āᵀ] and G = E[Σ_t g gᵀ] is KFC's Ω⊗Γ (Ω = T A, Γ = G / T).

    A transposed use, u = Σ_t W̄ v_t scattered over the input's positions, is what reverse mode inside the loss makes: ā_t is the
    patch of ∂loss/∂u under t, without the 1, and g_t = v_t (see `Dense`).

    Attributes:
      approximation: "kfc": the patches as they are. "sua": inputs at different offsets are uncorrelated and the same
        everywhere, A = blockdiag(I_K⊗Σ, 0) + m mᵀ with Σ the covariance of the input's channels and m = [1_K⊗M; 1] their means.
        "sua_uncentered": I_K⊗C with C = E[x xᵀ] and no mean term (as the authors of EKFAC do), which needs one C for all K
        offsets: its side is c + 1 instead of K c + 1. "groups": the input's channels, with all offsets, and the output's are
        cut into `num_groups` groups, A and G block-diagonal, all pairs kept.
      geometry: how the window moves.
      feature_groups: as in `nn.Conv`.
      flipped: the kernel is (window, output, input) and flipped, as with `transpose_kernel=True`.
      num_groups: of "groups".
    """

    approximation: str = "kfc"
    geometry: Geometry = _POINT
    feature_groups: int = 1
    flipped: bool = False
    num_groups: int = 1

    name: ClassVar[str] = "conv"
    approximations: ClassVar[tuple[str, ...]] = ("kfc", "sua", "sua_uncentered", "groups")
    convolution: ClassVar[bool] = True

    def configured(self, approximation: str, options: Mapping[str, Any]) -> Kind:
        options = dict(options)
        groups = options.pop("num_groups", None)
        if (approximation == "groups") != (groups is not None):
            raise ValueError("approximation='groups' and num_groups=... belong together")
        kind = super().configured(approximation, options)
        return dataclasses.replace(kind, num_groups=groups or 1)

    def plain(self) -> Kind:
        return dataclasses.replace(self, approximation="kfc", num_groups=1)

    def form(self):
        return dataclasses.replace(self, geometry=dataclasses.replace(self.geometry, padding=()))

    def like(self, other):
        groups = other.num_groups if isinstance(other, Conv) else 1
        return dataclasses.replace(super().like(other), num_groups=groups)

    def check(self, kernel):
        if self.approximation != "kfc" and self.feature_groups > 1:
            raise ValueError(
                f"a convolution with {self.feature_groups} feature groups has approximation='kfc' alone"
            )
        if self.approximation.startswith("sua") and any(d > 1 for d in self.geometry.input_dilation):
            raise ValueError(
                "a transposed or input-dilated convolution has zeros in its patches, which SUA does not"
            )
        channels, features = self._channels(kernel)
        if self.num_groups < 1 or channels % self.num_groups or features % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide {channels} input and {features} output channels"
            )

    def _channels(self, kernel: Shape) -> tuple[int, int]:
        """Input channels of a group, and all output channels."""
        return (kernel[-1], kernel[-2]) if self.flipped else (kernel[-2], kernel[-1])

    def _grid(self, kernel: Shape) -> tuple[int, int] | None:
        if self.approximation == "groups":
            return self.num_groups, self.num_groups
        if self.approximation == "sua_uncentered":
            return math.prod(kernel[:-2]), 1
        return None

    def blocks(self, kernel):
        grid = self._grid(kernel)
        if grid:
            return grid
        return (self.feature_groups,) if self.feature_groups > 1 else ()

    def side_blocks(self, kernel):
        if self.approximation == "groups":
            return (self.num_groups, 1), (1, self.num_groups)
        if self.approximation == "sua_uncentered":
            return (1, 1), (1, 1)
        return self.blocks(kernel), self.blocks(kernel)

    def sides(self, kernel, bias):
        channels, features = self._channels(kernel)
        d_in = math.prod(kernel[:-2]) * channels
        p, q = self._grid(kernel) or (1, self.feature_groups)
        return d_in // p + bias, features // q

    def to_matrix(self, leaves):
        rank = len(self.geometry.window)
        shape = leaves["kernel"].shape
        lead, kernel = shape[: len(shape) - rank - 2], shape[len(shape) - rank - 2 :]
        w, b = leaves["kernel"], leaves.get("bias")
        if self.flipped:
            w = jnp.flip(w, tuple(range(-2 - rank, -2))).mT
        channels, features = self._channels(kernel)
        w = w.reshape(*lead, -1, channels, features)
        grid = self._grid(kernel)
        if grid:
            return grid_matrix(self._by_group(w).reshape(*lead, -1, features), b, grid)
        w = w.reshape(*lead, -1, features)
        if self.feature_groups > 1:
            w = jnp.moveaxis(w.reshape(*w.shape[:-1], self.feature_groups, -1), -2, -3)
            b = b if b is None else b.reshape(*lead, self.feature_groups, -1)
        return w if b is None else jnp.concatenate([w, b[..., None, :]], -2)

    def from_matrix(self, matrix, kernel, bias):
        channels, features = self._channels(kernel)
        rank = len(self.geometry.window)
        grid = self._grid(kernel)
        if grid:
            w, b = grid_parts(matrix, bias)
            w = self._by_offset(w.reshape(*w.shape[:-2], -1, channels, features))
        else:
            w, b = (matrix[..., :-1, :], matrix[..., -1, :]) if bias else (matrix, None)
            if self.feature_groups > 1:
                w = jnp.moveaxis(w, -3, -2)
                w = w.reshape(*w.shape[:-2], -1)
                b = b if b is None else b.reshape(*b.shape[:-2], -1)
            w = w.reshape(*w.shape[:-2], -1, channels, features)
        w = w.reshape(*w.shape[:-3], *kernel[:-2], channels, features)
        if self.flipped:
            w = jnp.flip(w.mT, tuple(range(-2 - rank, -2)))
        return {"kernel": w} | ({} if b is None else {"bias": b})

    def _by_group(self, w):
        """(..., offsets, channels, features) with the rows ordered (group, offset, channel) under "groups"."""
        if self.approximation != "groups":
            return w
        *lead, offsets, channels, features = w.shape
        split = w.reshape(*lead, offsets, self.num_groups, channels // self.num_groups, features)
        return split.swapaxes(-4, -3)

    def _by_offset(self, w):
        """The inverse of `_by_group` on (..., rows, channels, features)."""
        if self.approximation != "groups":
            return w
        *lead, offsets, channels, features = w.shape
        split = w.reshape(*lead, self.num_groups, offsets, channels // self.num_groups, features)
        return split.swapaxes(-4, -3).reshape(*lead, offsets, channels, features)

    # Uses.

    def _images(self, shape: Shape) -> tuple[int, ...]:
        """(examples and further batch axes), flattened to one, then the spatial axes and the channels."""
        rank = len(self.geometry.window) + 1
        return (math.prod(shape[: len(shape) - rank]), *shape[len(shape) - rank :])

    def free(self, x, y):
        rank = len(self.geometry.window) + 1
        batch = x[: len(x) - rank] or (1,)
        return (*batch, *y[len(y) - rank : -1])

    def row_shapes(self, x, y):
        return {"input": self._images(x), "output": self._images(y)}

    def row_values(self, x, g):
        return {"input": x.reshape(self._images(x.shape)), "output": g.reshape(self._images(g.shape))}

    def _patches(self, parts: Parts):
        """(m, t, K, c) of a chunk's inputs (m, e, *spatial, c)."""
        x = parts["input"]
        patches = self.geometry.patches(x.reshape(-1, *x.shape[2:]))
        return patches.reshape(x.shape[0], -1, *patches.shape[-2:])

    def input_rows(self, parts, kernel, bias):
        patches = self._patches(parts)
        m, t, offsets, _ = patches.shape
        grid = self._grid(kernel)
        if self.approximation == "sua_uncentered":
            rows = patches.transpose(2, 0, 1, 3)[:, None]
        elif grid or self.feature_groups > 1:
            groups = self.num_groups if grid else self.feature_groups
            rows = (
                patches.reshape(m, t, offsets, groups, -1).transpose(3, 0, 1, 2, 4).reshape(groups, m, t, -1)
            )
            rows = rows[:, None] if grid else rows
        else:
            rows = patches.reshape(m, t, -1)
        return homogeneous(rows, grid is not None) if bias else rows

    def output_rows(self, parts, kernel):
        g = parts["output"]
        g = g.reshape(g.shape[0], -1, g.shape[-1])
        grid = self._grid(kernel)
        groups = grid[1] if grid else self.feature_groups
        if not grid and groups == 1:
            return g
        g = jnp.moveaxis(g.reshape(*g.shape[:2], groups, -1), 2, 0)
        return g[None] if grid else g

    def input_moments(self, parts, live, kernel, bias, diagonal):
        if not self.approximation.startswith("sua"):
            return super().input_moments(parts, live, kernel, bias, diagonal)
        if live is not None:
            raise ValueError(
                "approximation='sua' takes the input's channels as the same at all positions, which a row_mask contradicts: use "
                "'kfc' for this layer."
            )
        x = parts["input"]
        # [x; 1] at every input position: covariance, means and count at once.
        return base.gram(homogeneous(x.reshape(x.shape[0], -1, x.shape[-1])), False)

    def moments_shape(self, kernel, bias):
        if self.approximation.startswith("sua"):
            side = self._channels(kernel)[0] + 1
            return (side, side)
        return super().moments_shape(kernel, bias)

    def input_factor(self, moments, count, kernel, bias, diagonal):
        if not self.approximation.startswith("sua"):
            return moments / count
        second = moments / jnp.maximum(moments[..., -1:, -1:], 1)
        covariance, mean = second[..., :-1, :-1], second[..., :-1, -1]
        if self.approximation == "sua_uncentered":
            factor = _bordered(covariance) if bias else covariance
            factor = factor[..., None, None, :, :]
        else:
            offsets = math.prod(kernel[:-2])
            centered = covariance - mean[..., :, None] * mean[..., None, :]
            factor = jnp.kron(jnp.eye(offsets, dtype=moments.dtype), centered)
            means = jnp.concatenate([mean] * offsets, -1)
            if bias:
                factor = _bordered(factor, 0)
                means = jnp.concatenate([means, jnp.ones_like(means[..., :1])], -1)
            factor = factor + means[..., :, None] * means[..., None, :]
        return jnp.diagonal(factor, axis1=-2, axis2=-1) if diagonal else factor

    def row_bytes(self, x, y, kernel, bias):
        channels = self._channels(kernel)[0] * self.feature_groups
        positions = math.prod(self.free(x, y)[1:])
        return 4 * positions * (2 * math.prod(kernel[:-2]) * channels + y[-1])


def _bordered(matrix, corner: float = 1.0):
    """blockdiag(matrix, corner)."""
    pad = [(0, 0)] * (matrix.ndim - 2) + [(0, 1), (0, 1)]
    return jnp.pad(matrix, pad).at[..., -1, -1].set(corner)
