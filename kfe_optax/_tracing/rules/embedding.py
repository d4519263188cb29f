"""`gather` of whole vectors by tokens is an embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.kinds import Embedding
from kfe_optax._layers.kinds.embedding import LOOKUP
from kfe_optax._tracing.rules.base import Found, Layout, Rule, shapes


class Gather(Rule):
    """table[tokens]; under a vmap over tables, of tokens of their own or of the same ones."""

    primitive = "gather"

    def use(self, equation, side, trail):
        numbers, table = equation.params["dimension_numbers"], equation.invars[0].aval
        y = equation.outvars[0].aval
        if side != 0 or table.ndim < 2:
            return None
        members = table.ndim - 2
        stack, sizes = tuple(range(members)), table.shape[:-2]
        # Whole vectors, in the output with an axis of size 1 in their front where the gather was a slice.
        collapsed, offsets = tuple(numbers.collapsed_slice_dims), tuple(numbers.offset_dims)
        slices = tuple(equation.params["slice_sizes"])
        own = tuple(numbers.operand_batching_dims) == stack == tuple(numbers.start_indices_batching_dims)
        same = members > 0 and not numbers.operand_batching_dims and offsets[:members] == stack
        rank = y.ndim - len(offsets) + (members if same else 0)
        behind = offsets[members:] if same else offsets
        known = (
            (own or same)
            and min(trail.dims) >= 0
            and list(trail.dims) == sorted(trail.dims)
            and 1 < table.shape[-2] <= 2**24  # as which float32 tells tokens apart
            and rank > members
            and _place_of_tokens(equation, members) is not None
            and (collapsed, behind) in (((members,), (rank,)), ((), (rank, rank + 1)))
            and slices == (*((1,) * members if own else sizes), 1, table.shape[-1])
        )
        if not known:
            return None
        shape = (*y.shape[members:rank], y.shape[-1])
        tokens, vectors = jax.ShapeDtypeStruct(shape[:-1], jnp.float32), jax.ShapeDtypeStruct(shape, y.dtype)
        vmaps = tuple((size, (True, own, True)) for size in reversed(sizes))
        order = tuple(range(rank - (members if same else 0)))
        axes = (*(-1,) * (y.ndim - 1), 1)
        return Found(Embedding(), trail, 1, shapes(tokens, vectors, LOOKUP), axes, order, vmaps=vmaps)

    def layout(self, equation, x, operands):
        table, shape = equation.invars[0].aval, equation.outvars[0].aval.shape
        tokens = operands[x][..., _place_of_tokens(equation, table.ndim - 2)]
        last = table.shape[-2] - 1
        if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            tokens = jnp.clip(tokens, 0, last)
        elif jnp.issubdtype(tokens.dtype, jnp.signedinteger):
            # An index that is out of bounds reads no row; a negative one would count from the end.
            tokens = jnp.where(tokens < 0, last + 1, tokens)
        tokens = tokens.astype(jnp.float32)
        slice_ = not equation.params["dimension_numbers"].collapsed_slice_dims
        whole = (*shape[:-2], shape[-1]) if slice_ else shape
        return Layout(tokens, lambda y: y.reshape(whole), lambda y: y.reshape(shape))


def _place_of_tokens(equation: Any, axis: int) -> int | None:
    """Which of the start indices is along the axis of the tokens, where the others say nothing: a whole axis begins at 0."""
    starts = tuple(equation.params["dimension_numbers"].start_index_map)
    clipped = equation.params["mode"] == jax.lax.GatherScatterMode.CLIP
    sizes = zip(equation.params["slice_sizes"], equation.invars[0].aval.shape, strict=True)
    whole = {i for i, (size, of) in enumerate(sizes) if clipped and size == of and i != axis}
    return starts.index(axis) if axis in starts and set(starts) <= {axis, *whole} else None
