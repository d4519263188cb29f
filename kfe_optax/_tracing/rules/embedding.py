"""`gather` of whole vectors by tokens is an embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kfe_optax._layers.kinds import Embedding
from kfe_optax._layers.kinds.embedding import LOOKUP
from kfe_optax._tracing.rules.base import Found, Layout, Rule, shapes


class Gather(Rule):
    """table[tokens]."""

    primitive = "gather"

    def use(self, equation, side, trail):
        numbers, table = equation.params["dimension_numbers"], equation.invars[0].aval
        y = equation.outvars[0].aval
        # Whole vectors, in the output with an axis of size 1 in their front where the gather was a slice.
        collapsed, offsets = tuple(numbers.collapsed_slice_dims), tuple(numbers.offset_dims)
        rank = y.ndim - len(offsets)
        vectors = (
            side == 0
            and len(trail.dims) == 2
            and 0 <= trail.dims[0] < trail.dims[1]
            and table.shape[0] > 1
            and rank > 0
            and numbers.start_index_map[0] == 0
            and (collapsed, offsets) in (((0,), (rank,)), ((), (rank, rank + 1)))
            and tuple(equation.params["slice_sizes"]) == (1, table.shape[1])
            and not numbers.operand_batching_dims
        )
        if not vectors:
            return None
        shape = (*y.shape[:rank], y.shape[-1])
        tokens, vectors = jax.ShapeDtypeStruct(shape[:-1], jnp.float32), jax.ShapeDtypeStruct(shape, y.dtype)
        return Found(
            Embedding(),
            trail,
            1,
            shapes(tokens, vectors, LOOKUP),
            (*(-1,) * (y.ndim - 1), 1),
            tuple(range(rank)),
        )

    def layout(self, equation, x, operands):
        tokens, shape = operands[x][..., 0], equation.outvars[0].aval.shape
        last = equation.invars[0].aval.shape[0] - 1
        if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            tokens = jnp.clip(tokens, 0, last)
        elif jnp.issubdtype(tokens.dtype, jnp.signedinteger):
            # An index that is out of bounds reads no row; a negative one would count from the end.
            tokens = jnp.where(tokens < 0, last + 1, tokens)
        tokens = tokens.astype(jnp.float32)
        return Layout(tokens, lambda y: y.reshape(*tokens.shape, shape[-1]), lambda y: y.reshape(shape))
