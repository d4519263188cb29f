"""The description of one layer: which parameters form it, parameters ↔ matrix, taps → rows. Knows no optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.flow import Flow
from kfe_optax._layers.kinds import Kind
from kfe_optax._layers.kinds.base import TRANSPOSED
from kfe_optax._layers.paths import Path, leaves_by_path, path_name
from kfe_optax._layers.views import Views

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LARGEST_SIDE = 8192
"""Of a larger side the factor is a diagonal where `max_dim` says nothing else, and sums over a layer's uses hold that alone."""

WITHOUT_BIAS = "without bias"
"""The label of a use of a layer with a bias that does not add it."""


def largest_side(max_dim: int | None) -> int:
    """The largest side whose factor is a matrix."""
    return LARGEST_SIDE if max_dim is None else max_dim


Use = tuple[tuple[int, ...], tuple[int, ...], str, str, str]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The static description of one layer (or of a stack of like layers): s = W̄ᵀ ā, W̄ of shape (d_in, d_out).

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
      uses: ((input shape, output shape, input dtype, output dtype, label), ...) of the calls that were traced; not part of the
        layer's identity, since another batch size is the same layer.
      places: (place, route, x, label, moves, factor) of these calls in the program (see `rebuild.Place`).
      examples, positions: n and t of its rows.
      per_example: whether its statistics know single examples.
      in_loop: whether it runs inside a loop that uses the same parameters in each iteration.
      masked: whether a `row_mask` is in force at one of its calls.
      spread: whether a vmap over the batch hides the examples from it.
      constant: whether its input is the same for all examples (an embedding of positions); it has a single example.
      aligned: whether its leading axis is shown to be the batch (see `_tracing.batch_axes`). If not (the nodes of graphs, tokens
        dispatched to experts), its statistics are sums over its rows.
      size: the number of its parameters.
      flow: which layers feed it (see `kfe_optax._layers.flow`).
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
    uses: tuple[Use, ...] = dataclasses.field(compare=False, repr=False)
    places: tuple[tuple[Any, ...], ...] = dataclasses.field(compare=False, repr=False)
    examples: int = dataclasses.field(compare=False, repr=False)
    positions: int = dataclasses.field(compare=False, repr=False)
    per_example: bool = dataclasses.field(compare=False, repr=False)
    in_loop: bool = dataclasses.field(compare=False, repr=False, default=False)
    masked: bool = dataclasses.field(compare=False, repr=False, default=False)
    spread: bool = dataclasses.field(compare=False, repr=False, default=False)
    constant: bool = dataclasses.field(compare=False, repr=False, default=False)
    aligned: bool = dataclasses.field(compare=False, repr=False, default=True)
    size: int = dataclasses.field(compare=False, repr=False, default=0)
    flow: Flow = dataclasses.field(compare=False, repr=False, default=Flow())
    views: Views = ()
    sharing: str = "expand"

    @property
    def inputs_from(self) -> tuple[str, ...]:
        """The names of the layers whose outputs reach its input with no other layer between; none for a first layer."""
        return self.flow.layers

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

    @property
    def mixed(self) -> bool:
        """Whether it has uses with input and output exchanged as well, whose A depends on g."""
        return any(use[4] == TRANSPOSED for use in self.uses)

    @property
    def has_rows(self) -> bool:
        """Whether the tap holds rows, or sums over several uses."""
        return self.kind.per_example or (self.aligned and not (self.shared or self.mixed))

    @property
    def why_sums(self) -> str:
        """Of a layer without rows, why it has none, for messages."""
        if self.aligned:
            return "uses its parameters more than once"
        return "has a leading axis that is not shown to be the batch"

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows of one example, of the largest use."""
        item = jnp.dtype(self.factor_dtype).itemsize // 4

        def of_use(x: tuple[int, ...], y: tuple[int, ...]) -> int:
            # The batch may stand flattened with other axes: an example is then several of the leading axis.
            leading = self.kind.free(x, y)[0]
            return (
                item
                * max(1, leading // self.examples)
                * self.kind.row_bytes(x, y, self.kernel_shape, self.bias)
            )

        return max(of_use(x, y) for x, y, *_ in self.uses)

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

    def rows(self, tap: Any) -> tuple[Float[Array, "*stack n t d_in"], Float[Array, "*stack n t d_out"]]:
        """ā (*stack, n, t, d_in) and g (*stack, n, t, d_out) of a tap, n examples with t shared positions each.

        g carries √N, so that the layer's Fisher block is (1/N) Σ over the rows' outer products; with `fisher="empirical"`
        Σ_t ā_{n,t} g_{n,t}ᵀ is N times the part of the gradient that comes from example n. With several Fisher samples,
        or `fisher="exact"`, g has a leading axis for them.

        Raises:
          ValueError: the layer is shared (its statistics are sums), or the tap is another layer's.
        """
        if tap.name != self.name:
            raise ValueError(
                f"Layer {self.name!r} was given the tap of {tap.name!r}; pass taps[{self.name!r}]."
            )
        return tap.rows()
