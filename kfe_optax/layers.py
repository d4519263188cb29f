"""Layer descriptions: which parameters form which layer, parameters ↔ matrix, taps → rows. Knows no optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax import table
from kfe_optax.kinds import KINDS, Kind

Path = tuple[str | int, ...]


def key_path(path: tuple[Any, ...]) -> Path:
    """A JAX key path as plain names, the same for a dict, an `nnx.State` and an attribute."""
    names: list[str | int] = []
    for key in path:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                names.append(getattr(key, field))
                break
        else:
            names.append(str(key))
    # An NNX variable is a node with one child, its value.
    if names and names[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        names.pop()
    return tuple(names)


def path_name(path: Path) -> str:
    return "/".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class Layer:
    """The static description of one layer (or of a stack of like layers): s = W̄ᵀ ā, W̄ of shape (d_in, d_out).

    Attributes:
      name: the path of the layer's parameters, joined by "/".
      kind: a key of `kfe_optax.kinds.KINDS`.
      paths: ((role, key path), ...), such as (("kernel", ("Dense_0", "kernel")), ("bias", ("Dense_0", "bias"))).
      kernel_shape: the kernel's shape without stacked axes.
      stack_axes: where the stacked axes (scan over layers, ensembles) stand in the kernel, outermost first.
      stack_shape: their sizes.
      shared: True when the parameters are used more than once in a forward pass (a repeated call, a scan over time, a vmap
        over examples): its statistics are sums over the uses (additive riders) and it has no rows.
      order: its place in the forward pass.
      dtype: the kernel's dtype.
      uses: ((input shape, output shape, input dtype, output dtype), ...) of the calls that were traced; not part of the
        layer's identity, since another batch size is the same layer.
    """

    name: str
    kind: str
    paths: tuple[tuple[str, Path], ...]
    kernel_shape: tuple[int, ...]
    stack_axes: tuple[int, ...]
    stack_shape: tuple[int, ...]
    shared: bool
    order: int
    dtype: str
    uses: tuple[tuple[tuple[int, ...], tuple[int, ...], str, str], ...] = dataclasses.field(
        compare=False, repr=False
    )
    examples: int = dataclasses.field(compare=False, repr=False)
    positions: int = dataclasses.field(compare=False, repr=False)
    per_example: bool = dataclasses.field(compare=False, repr=False)

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    @property
    def bias(self) -> bool:
        return any(role == "bias" for role, _ in self.paths)

    @property
    def sides(self) -> tuple[int, int]:
        """(d_in, d_out), d_in with the homogeneous 1 of the bias."""
        return self._kind.sides(self.kernel_shape, self.bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W̄: (*stack, d_in, d_out)."""
        return (*self.stack_shape, *self.sides)

    @property
    def factor_dtype(self) -> Any:
        """The dtype of factors, bases and scales: float32, or float64 for float64 parameters."""
        return jnp.promote_types(self.dtype, jnp.float32)

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

    def stacked_shape(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a leaf with inner shape `inner` when the stacked axes are put where the kernel has them."""
        ndim = len(inner) + len(self.stack_shape)
        sizes = dict(zip(self._positions(ndim), self.stack_shape, strict=True))
        rest = iter(inner)
        return tuple(sizes[i] if i in sizes else next(rest) for i in range(ndim))

    def to_matrix(self, tree: Any) -> jax.Array:
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

    def gather(self, leaves: Mapping[str, jax.Array]) -> jax.Array:
        """{role: leaf} → W̄ (*stack, d_in, d_out)."""
        return self._kind.to_matrix({role: self.stack_first(leaf) for role, leaf in leaves.items()})

    def from_matrix(self, matrix: jax.Array) -> dict[Path, jax.Array]:
        """W̄ (*stack, d_in, d_out) → {key path: parameter-shaped array}, the inverse of `to_matrix`.

        Raises:
          ValueError: the matrix does not have the layer's shape.
        """
        if matrix.shape != self.shape:
            raise ValueError(f"Layer {self.name!r} has matrices of shape {self.shape}, not {matrix.shape}.")
        leaves = self._kind.from_matrix(matrix, self.kernel_shape, self.bias)
        return {path: self.unstack_first(leaves[role]) for role, path in self.paths}

    def rows(self, tap: Any) -> tuple[jax.Array, jax.Array]:
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

    def split_rows(self, rider: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """A row rider's cotangent → (ā, g), without any scale."""
        x, g = (self.stack_first(rider[side]) for side in ("input", "output"))
        return self._kind.rows(x, g, self.examples, self.bias)

    def rider_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the layer's rider for the calls that were traced."""
        x, y, x_dtype, y_dtype = self.uses[0]
        if not self.shared:
            dtypes = {"input": x_dtype, "output": y_dtype}
            shapes = self._kind.row_riders(x, y)
        else:
            shapes = self._kind.additive_riders(self.kernel_shape, x, self.per_example)
            dtypes = dict.fromkeys(shapes, np.dtype(self.factor_dtype).name)
        return {
            name: jax.ShapeDtypeStruct(self.stacked_shape(shape), jnp.dtype(dtypes[name]))
            for name, shape in shapes.items()
        }

    def additive_factors(self, rider: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """An additive rider's cotangent → A (the mean over all rows) and G (the sum), bias included."""
        sums = {name: self.stack_first(value) for name, value in rider.items() if name != "examples"}

        def factors(s):
            return self._kind.additive_factors(s, self.bias)

        for _ in self.stack_shape:
            factors = jax.vmap(factors)
        return factors(sums)

    def example_gradients(self, rider: Mapping[str, jax.Array]) -> jax.Array:
        """An additive rider's per-example gradients Σ_t ā gᵀ, (*stack, n, d_in, d_out)."""
        stacked = self.stack_first(rider["examples"])
        d, d_out = self.kernel_shape
        examples = stacked.reshape(*stacked.shape[:-1], d + 1, d_out)
        return examples if self.bias else examples[..., :-1, :]


class Layers(Mapping[str, Layer]):
    """The layers of a loss function, by name, in the order of the forward pass; static, hashable, printable as a table.

    Attributes:
      rest: the key paths of the parameters outside every layer.
      reasons: for each of them, why.
      outputs: the registered losses (see `kfe_optax.losses`).
    """

    def __init__(
        self,
        layers: tuple[Layer, ...],
        rest: tuple[Path, ...],
        reasons: tuple[str, ...],
        sizes: tuple[int, ...],
        outputs: tuple[Any, ...],
    ):
        self._layers = layers
        self._by_name = {layer.name: layer for layer in layers}
        self.rest = rest
        self.reasons = reasons
        self.outputs = outputs
        self._sizes = sizes

    def __getitem__(self, name: str) -> Layer:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no layer {name!r}; the layers are {', '.join(self._by_name)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._layers)

    def __hash__(self) -> int:
        return hash((self._layers, self.rest))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layers):
            return NotImplemented
        return (self._layers, self.rest) == (other._layers, other.rest)

    def __repr__(self) -> str:
        return f"Layers({', '.join(self._by_name)}; {len(self.rest)} parameters outside)"

    def __str__(self) -> str:
        return self.table()

    def settle_batch(self, batches: set[int]) -> Layers:
        """The layers with n set to the loss's batch where a layer sees it flattened with other axes, (n t, d).

        Raises:
          ValueError: a layer's leading axis cannot be the batch.
        """
        settled = []
        for layer in self._layers:
            if layer.shared or layer.examples in batches:
                settled.append(layer)
                continue
            n = max((b for b in batches if layer.examples % b == 0 and b > 1), default=None)
            if n is None:
                raise ValueError(
                    f"The leading axis of the input of layer {layer.name!r} has size {layer.examples}, but the registered loss "
                    f"has {' or '.join(map(str, sorted(batches)))} examples: the batch must be the first axis of every layer's "
                    "input and of the loss's outputs (batch-major, also when flattened with other axes)."
                )
            positions = layer.positions * (layer.examples // n)
            settled.append(dataclasses.replace(layer, examples=n, positions=positions))
        return Layers(tuple(settled), self.rest, self.reasons, self._sizes, self.outputs)

    def table(self, max_dim: int = 8192) -> str:
        """The layers as an aligned table, with the bytes of state and the cost of a refresh under `max_dim`."""
        return table.layer_table(self._layers, self.rest, self.reasons, self._sizes, max_dim)


def leaves_by_path(tree: Any) -> dict[Path, Any]:
    """{key path: leaf} of a parameter-shaped tree."""
    return {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def matrix_elements(layer: Layer) -> int:
    """The number of parameters of a layer, over its whole stack."""
    return math.prod(layer.shape)
