"""What a layer is: which parameters form it, and its matrix. Knows no batch and no optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.kinds import Kind
from kfe_optax._layers.paths import Path, leaves_by_path, path_name
from kfe_optax._layers.views import Views

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LARGEST_SIDE = 8192
"""Of a larger side the factor is a diagonal where `max_dim` says nothing else, and sums over a layer's uses hold that alone."""


def largest_side(max_dim: int | None) -> int:
    """The largest side whose factor is a matrix."""
    return LARGEST_SIDE if max_dim is None else max_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes one layer (or a stack of like layers) the layer that it is: s = W̄ᵀ ā, W̄ of shape (d_in, d_out).

    Attributes:
      name: the path of the layer's parameters, joined by "/".
      kind: what kind of layer it is, with its geometry and its approximation (see `kfe_optax._layers.kinds`).
      paths: ((role, key path), ...), such as (("kernel", ("Dense_0", "kernel")), ("bias", ("Dense_0", "bias"))).
      kernel_shape: the kernel's shape without stacked axes, as the layer uses it (see `views`).
      stack_axes: where the stacked axes (scan over layers, ensembles) stand in the kernel, outermost first.
      stacked: their sizes.
      shared: True when the parameters are used more than once in a forward pass (a repeated call, a scan over time, a vmap
        over examples): its statistics are sums over the uses (additive riders) and it has no rows.
      order: its place in the forward pass.
      dtype: the kernel's dtype.
      views: (role, how its parameter is moved and reshaped before the layer uses it), of those that are.
      sharing: how the factors treat shared positions, "expand" or "reduce" (see `Layers.configure`).
    """

    name: str
    kind: Kind
    paths: tuple[tuple[str, Path], ...]
    kernel_shape: tuple[int, ...]
    stack_axes: tuple[int, ...]
    stacked: tuple[int, ...]
    shared: bool
    order: int
    dtype: str
    views: Views = ()
    sharing: str = "expand"

    @property
    def bias(self) -> bool:
        return any(role == "bias" for role, _ in self.paths)

    @property
    def sides(self) -> tuple[int, int]:
        """(d_in, d_out), d_in with the homogeneous 1 of the bias."""
        return self.kind.sides(self.kernel_shape, self.bias)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes of W̄: the stacked ones, then the kind's blocks."""
        return (*self.stacked, *self.kind.blocks(self.kernel_shape))

    def side_stack(self, side: int) -> tuple[int, ...]:
        """The leading axes of A (side 0) or G (1), which broadcast against `stack_shape`."""
        return (*self.stacked, *self.kind.side_blocks(self.kernel_shape)[side])

    @property
    def shares_factors(self) -> bool:
        """Whether several blocks of W̄ have an A or a G in common."""
        return any(self.side_stack(side) != self.stack_shape for side in (0, 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W̄: (*stack_shape, d_in, d_out)."""
        return (*self.stack_shape, *self.sides)

    @property
    def factor_dtype(self) -> Any:
        """The dtype of factors, bases and scales: float32, or float64 for float64 parameters."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def is_diagonal(self, side: int, max_dim: int | None) -> bool:
        """Whether A (side 0) or G (1) is kept as a diagonal."""
        return self.kind.diagonal[side] or self.sides[side] > largest_side(max_dim)

    def _positions(self, ndim: int) -> tuple[int, ...]:
        # A stacked axis stands at the same place in every leaf, except where a leaf has too few axes (an axis of −1).
        return tuple(min(axis, ndim - 1) for axis in self.stack_axes)

    def stack_first(self, leaf: jax.Array) -> jax.Array:
        """Moves the stacked axes of a parameter, gradient or rider to the front."""
        stacked = self._positions(leaf.ndim)
        return jnp.moveaxis(leaf, stacked, range(len(stacked))) if stacked else leaf

    def unstack_first(self, leaf: jax.Array) -> jax.Array:
        """The inverse of `stack_first`."""
        stacked = self._positions(leaf.ndim)
        return jnp.moveaxis(leaf, range(len(stacked)), stacked) if stacked else leaf

    def to_matrix(self, tree: Any) -> Float[Array, "*stack d_in d_out"]:
        """The layer's W̄ (*stack, d_in, d_out) out of a parameter-shaped tree; the bias is the last row.

        Raises:
          ValueError: the tree lacks one of the layer's parameters.
        """
        leaves = leaves_by_path(tree)
        missing = [path_name(path) for _, path in self.paths if path not in leaves]
        if missing:
            raise ValueError(
                f"Layer {self.name!r} needs {', '.join(missing)}, which the tree does not hold; pass a tree with the "
                "structure of the parameters that find_layers saw."
            )
        return self.gather({role: leaves[path] for role, path in self.paths})

    def gather(self, leaves: Mapping[str, jax.Array]) -> Float[Array, "*stack d_in d_out"]:
        """{role: leaf} → W̄ (*stack, d_in, d_out)."""
        seen = {role: self.stack_first(leaf) for role, leaf in leaves.items()}
        for role, views in self.views:
            for view in views:
                seen[role] = view.of(seen[role])
        return self.kind.to_matrix(seen)

    def from_matrix(self, matrix: Float[Array, "*stack d_in d_out"]) -> dict[Path, jax.Array]:
        """W̄ (*stack, d_in, d_out) → {key path: parameter-shaped array}, the inverse of `to_matrix`.

        Raises:
          ValueError: the matrix does not have the layer's shape.
        """
        if matrix.shape != self.shape:
            raise ValueError(f"Layer {self.name!r} has matrices of shape {self.shape}, not {matrix.shape}.")
        leaves = self.kind.from_matrix(matrix, self.kernel_shape, self.bias)
        for role, views in self.views:
            for view in reversed(views):
                leaves[role] = view.back(leaves[role])
        return {path: self.unstack_first(leaves[role]) for role, path in self.paths}

    def leaf_shapes(self) -> dict[Path, tuple[int, ...]]:
        """{key path: shape} of the layer's parameters."""
        matrix = jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))
        leaves = jax.eval_shape(lambda m: list(self.from_matrix(m).values()), matrix)
        return {path: leaf.shape for (_, path), leaf in zip(self.paths, leaves, strict=True)}
