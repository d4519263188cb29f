"""Statistics of an embedding: rows ā are one-hot vectors, which are never formed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.kinds.base import gram
from kfe_optax._layers.layer import Layer
from kfe_optax._statistics.rows import Rows, over_stack


class Tokens(Rows):
    """The statistics of an embedding (see `statistics.Statistics`); A is always a diagonal.

    The gradient of an example, M = Σ_t e_{x_t} g_tᵀ, has a row H_v = Σ_{t: x_t = v} g_t for each token v that occurs. H is kept
    by position, (t, d), and a token that stands at k positions counts 1/k at each.
    """

    def __init__(self, layer: Layer, rider: Mapping[str, jax.Array], scale: Any):
        super().__init__(layer, rider, scale)
        self._vocabulary = layer.kernel_shape[0]

    def _tokens(self, parts: Any) -> jax.Array:
        return parts["input"][..., 0].astype(jnp.int32)

    def _live(self, parts: Any) -> jax.Array:
        tokens = self._tokens(parts)
        return parts.get("live", jnp.ones(tokens.shape, self.layer.factor_dtype))

    def _by_token(self, tokens: jax.Array, values: jax.Array) -> jax.Array:
        """Σ of the values at each token's positions: (m, t), (m, t, ...) → (vocabulary, ...)."""
        flat = values.reshape(-1, *values.shape[2:])
        return jnp.zeros((self._vocabulary, *flat.shape[1:]), values.dtype).at[tokens.ravel()].add(flat)

    def _gathered(self, parts: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens (m, t), H (m, t, d) and the weights 1/k (m, t)."""
        tokens, live = self._tokens(parts), self._live(parts)
        same = (tokens[:, :, None] == tokens[:, None, :]).astype(live.dtype)
        return tokens, same @ self.outputs(parts), live / jnp.maximum(same @ live[..., None], 1)[..., 0]

    def input_factor(self, diagonal=False):
        if self.layer.sharing == "reduce":
            return self._reduced_inputs()
        counts = self._sum(lambda parts: self._by_token(self._tokens(parts), self._live(parts)))
        return counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)

    def _reduced_inputs(self):
        """diag E[(mean_t ā)(mean_t ā)ᵀ]: the mean over examples of the squared frequencies."""

        def squares(parts):
            tokens, live = self._tokens(parts), self._live(parts)
            same = (tokens[:, :, None] == tokens[:, None, :]).astype(live.dtype)
            counts = (same @ live[..., None])[..., 0]
            total = jnp.maximum(live.sum(-1, keepdims=True), 1)
            # k positions hold k/T each: together (k/T)².
            return self._by_token(tokens, live * counts / total**2)

        sums = self._sum(squares, example_bytes=self._pair_bytes)
        return sums / self.live_examples(sums.ndim)

    def second_moment_in(self, basis_in, basis_out):
        assert basis_in is None
        bases = {} if basis_out is None else {"out": basis_out}

        def squares(parts, bases):
            tokens, rows, weights = self._gathered(parts)
            rows = rows @ bases["out"] if bases else rows
            return self._by_token(tokens, jnp.square(rows) * weights[..., None])

        return self._sum(squares, bases, example_bytes=self._pair_bytes) / self.layer.examples

    @property
    def _pair_bytes(self) -> int:
        return 8 * self.layer.positions**2

    def contract_output(self, v, diagonal=True):
        def contracted(parts, v):
            tokens, rows, weights = self._gathered(parts)
            mapped = rows * v if v.ndim == 1 else rows @ v
            return self._by_token(tokens, jnp.sum(mapped * rows, -1) * weights)

        return self._sum(contracted, v, example_bytes=self._pair_bytes) / self.layer.examples

    def contract_input(self, u, diagonal=False):
        def contracted(parts, u):
            tokens, rows, weights = self._gathered(parts)
            weighted = rows * (weights * u[tokens])[..., None]
            if diagonal:
                return jnp.sum(weighted * rows, (0, 1))
            return jnp.einsum("mta,mtb->ab", weighted, rows)

        return self._sum(contracted, u, example_bytes=self._pair_bytes) / self.layer.examples

    def traced_factors(self, pairing, diagonal):
        if pairing == "example":
            stack = self.layer.stack_shape
            d_in, d_out = self.layer.sides
            inputs = self.contract_output(jnp.ones((*stack, d_out), self.layer.factor_dtype))
            outputs = self.contract_input(jnp.ones((*stack, d_in), self.layer.factor_dtype), diagonal[1])
            return inputs.sum(-1), inputs, outputs

        def traced(parts):
            g = self.outputs(parts)
            traces = jnp.sum(g * g, -1)
            # ‖ā‖ = 1 at every position.
            return traces.sum(), self._by_token(self._tokens(parts), traces), gram(g, diagonal[1])

        return jax.tree.map(lambda v: v / self.layer.examples, self._sum(traced))

    def example_gradients(self):
        def one(parts):
            tokens, g = self._tokens(parts), self.outputs(parts)
            return jax.vmap(lambda t, g: jnp.zeros((self._vocabulary, g.shape[-1]), g.dtype).at[t].add(g))(
                tokens, g
            )

        return over_stack(one, len(self.layer.stacked))(self.parts)

    def _alpha(self, parts, p):
        return jnp.moveaxis(p[:, self._tokens(parts)], 0, -1) * self._live(parts)[..., None]

    def _inner(self, parts, matrix):
        return jnp.sum(matrix[self._tokens(parts)] * self.outputs(parts), (-2, -1))

    def _weighted(self, parts):
        return self._by_token(self._tokens(parts), self.outputs(parts) * parts["weights"][:, None, None])
