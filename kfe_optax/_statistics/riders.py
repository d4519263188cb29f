"""The riders: what a tag's backward rule yields of a layer, field by field.

A layer that keeps its rows has what its kind makes of them (`Kind.row_shapes`: "input", "output"), examples times positions
along the leading axis, and

| field | shape | what |
|---|---|---|
| live | (n, t) | which rows count, where a `row_mask` is in force |

One that is used more than once, or whose examples are not known, has sums over its uses:

| field | shape | what |
|---|---|---|
| inputs | `Kind.moments_shape`, as a rule (*in_blocks, d_in, d_in) | Σ ā āᵀ, or what the kind makes A of |
| outputs | (*out_blocks, d_out, d_out) | Σ g gᵀ |
| input_squares, output_squares | (*in_blocks, d_in), (*out_blocks, d_out) | their diagonals, above `LARGEST_SIDE` |
| count | (1,) | how many rows |
| transposed_inputs, ... | as these | those of uses with input and output exchanged, ∂L/∂u in the place of ā and v in that of g |
| examples | (n, *blocks, d_in, d_out) | Σ_t ā gᵀ of each example, where they are known |
| input_sums, output_sums | (*in_blocks, n, d_in), (*out_blocks, n, d_out) | Σ_t ā, Σ_t g of each example, for sharing="reduce" |
| example_counts | (n,) | its positions, likewise |

All of them have the stacked axes of the layer in front. The values are formed by `Kind.row_values` and by `additive.of_use`, and
read by `Rows`, `Tokens` and `Sums`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.identity import LARGEST_SIDE
from kfe_optax._layers.kinds.base import TRANSPOSED
from kfe_optax._layers.layer import Layer

Rider = dict[str, jax.Array]
Spec = tuple[tuple[str, Any], ...]
"""((field, its type), ...), static."""


def zeros(layer: Layer) -> Rider:
    """The rider of a layer for the calls that were traced."""
    types = dict.fromkeys(("input", "output"), layer.factor_dtype)
    if layer.has_rows and not layer.kind.per_example and layer.kind.statistics == "rows":
        types = {"input": layer.uses[0][2], "output": layer.uses[0][3]}
    fields = _of_rows(layer) if layer.has_rows else _of_sums(layer)
    return {
        name: jnp.zeros((*layer.stacked, *shape), types.get(name, layer.factor_dtype))
        for name, shape in fields.items()
    }


def _of_rows(layer: Layer) -> dict[str, tuple[int, ...]]:
    x, y, *_ = layer.uses[0]
    masked = layer.masked and not layer.kind.per_example
    return layer.kind.row_shapes(x, y) | ({"live": (layer.examples, layer.positions)} if masked else {})


def _of_sums(layer: Layer) -> dict[str, tuple[int, ...]]:
    n, (d_in, d_out) = layer.examples, layer.sides
    in_blocks, out_blocks = layer.kind.side_blocks(layer.kernel_shape)
    fields: dict[str, tuple[int, ...]] = {"count": (1,)}
    moments = layer.kind.moments_shape(layer.kernel_shape, layer.bias)
    if max(moments) > LARGEST_SIDE and not layer.kind.diagonal[0]:
        fields["input_squares"] = (*in_blocks, d_in)
    else:
        fields["inputs"] = moments
    if d_out > LARGEST_SIDE:
        fields["output_squares"] = (*out_blocks, d_out)
    else:
        fields["outputs"] = (*out_blocks, d_out, d_out)
    if layer.mixed:
        fields |= {f"{TRANSPOSED}_{name}": shape for name, shape in fields.items()}
    if layer.per_example:
        fields["examples"] = (n, *layer.kind.blocks(layer.kernel_shape), d_in, d_out)
    if layer.sharing == "reduce":
        fields |= {
            "input_sums": (*in_blocks, n, d_in),
            "output_sums": (*out_blocks, n, d_out),
            "example_counts": (n,),
        }
    return fields


def examples_axis(layer: Layer, field: str) -> int | None:
    """Which axis of a field runs over the examples, the first of what they are flattened with; None: none."""
    return len(layer.stacked) if layer.has_rows or field == "examples" else None


def split(layer: Layer, rider: Mapping[str, jax.Array]) -> Rider:
    """A row rider with its leading axis split, (*stacked, n, e, ...); live positions (*stacked, n, t)."""
    lead, n = len(layer.stacked), layer.examples
    return {
        name: value
        if name == "live"
        else value.reshape(*layer.stacked, n, value.shape[lead] // n, *value.shape[lead + 1 :])
        for name, value in rider.items()
    }


def spec(rider: Rider) -> Spec:
    """The types of a rider: static, so that the zeros need not wait among the residuals for the backward pass."""
    return tuple((name, jax.typeof(value)) for name, value in sorted(rider.items()))


def fit(values: Mapping[str, jax.Array], spec: Spec) -> Rider:
    """The rider's cotangent: the values in the rider's shapes, zeros for what a use has not."""
    return {
        name: values[name].reshape(kind.shape).astype(kind.dtype)
        if name in values
        else jnp.zeros(kind.shape, kind.dtype)
        for name, kind in spec
    }
