"""One layer of a loss function: what it is, and what the traced batch showed of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from kfe_optax._layers.flow import Flow
from kfe_optax._layers.identity import Identity
from kfe_optax._layers.kinds.base import TRANSPOSED

if TYPE_CHECKING:
    from jaxtyping import Array, Float

WITHOUT_BIAS = "without bias"
"""The label of a use of a layer with a bias that does not add it."""

Use = tuple[tuple[int, ...], tuple[int, ...], str, str, str]


def _seen(**default: Any) -> Any:
    """A field of what a batch showed: another batch is the same layer."""
    return dataclasses.field(compare=False, repr=False, **default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer(Identity):
    """The static description of one layer (or of a stack of like layers), equal to another if their `Identity` is.

    Attributes, beside those of `Identity`:
      uses: ((input shape, output shape, input dtype, output dtype, label), ...) of the calls that were traced.
      places: (place, route, x, label, …) of these calls in the program (see `rebuild.Place`).
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

    uses: tuple[Use, ...] = _seen()
    places: tuple[tuple[Any, ...], ...] = _seen()
    examples: int = _seen()
    positions: int = _seen()
    per_example: bool = _seen()
    in_loop: bool = _seen(default=False)
    masked: bool = _seen(default=False)
    spread: bool = _seen(default=False)
    constant: bool = _seen(default=False)
    aligned: bool = _seen(default=True)
    size: int = _seen(default=0)
    flow: Flow = dataclasses.field(compare=False, repr=False, default=Flow())

    @property
    def inputs_from(self) -> tuple[str, ...]:
        """The names of the layers whose outputs reach its input with no other layer between; none for a first layer."""
        return self.flow.layers

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
