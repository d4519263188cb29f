"""Statistics from the rows ā (..., n, t, d_in), g (..., n, t, d_out), formed a few examples at a time.

A convolution's rows are the patches of its input, K times as large: they never exist for the whole batch. What is in memory at
once is `chunks.BUDGET` bytes of rows and per-example gradients (or one example's, where that is more).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._jax import chunks
from kfe_optax._layers.kinds.base import gram, masked
from kfe_optax._layers.layer import Layer
from kfe_optax._statistics import riders


class Rows:
    """The statistics of a layer that keeps its inputs and output gradients (see `statistics.Statistics`)."""

    def __init__(self, layer: Layer, rider: Mapping[str, jax.Array], scale: Any):
        self.layer = layer
        self.parts = riders.split(layer, rider)
        self._scale = scale

    def inputs(self, parts: Any) -> jax.Array:
        layer = self.layer
        rows = layer.kind.input_rows(self._wide(parts), layer.kernel_shape, layer.bias)
        return masked(rows, parts.get("live"))

    def outputs(self, parts: Any) -> jax.Array:
        layer = self.layer
        rows = layer.kind.output_rows(self._wide(parts), layer.kernel_shape)
        return masked(rows, parts.get("live")) * jnp.asarray(self._scale, layer.factor_dtype)

    def _wide(self, parts: Any) -> Any:
        return {name: part.astype(self.layer.factor_dtype) for name, part in parts.items()}

    def _sum(self, function: Callable[..., Any], *more: Any, example_bytes: int = 0) -> Any:
        """Σ over chunks of examples of `function(parts, *more)`, layer by layer of a stack; `more` has one entry a layer."""
        return self._by_chunks(chunks.fold, function, self.parts, more, example_bytes)

    def _map(self, function: Callable[..., Any], *more: Any) -> Any:
        """`function(parts, *more)`, which keeps the axis of the examples in front, as `_sum` in chunks."""
        return self._by_chunks(chunks.mapped, function, self.parts, more)

    def _by_chunks(self, how: Any, function: Any, parts: Any, more: Any, example_bytes: int = 0) -> Any:
        layer = self.layer
        chunk = chunks.size(layer.examples, layer.row_bytes + example_bytes)

        def one(parts, more):
            return how(lambda piece: function(piece, *more), parts, chunk)

        return over_stack(one, len(layer.stacked))(parts, more)

    @property
    def _gradient_bytes(self) -> int:
        return 3 * math.prod(self.layer.shape[len(self.layer.stacked) :]) * 4

    def rows(self):
        return over_stack(lambda parts: (self.inputs(parts), self.outputs(parts)), len(self.layer.stacked))(
            self.parts
        )

    def input_factor(self, diagonal=False):
        layer = self.layer
        if layer.sharing == "reduce":
            return self._sum(lambda parts: gram(self.mean_input(parts), diagonal)) / self.live_examples(
                len(layer.side_stack(0)) + (1 if diagonal else 2)
            )
        moments = self._sum(
            lambda parts: layer.kind.input_moments(
                self._wide(parts), parts.get("live"), layer.kernel_shape, layer.bias, diagonal
            )
        )
        count = self.count(moments.ndim)
        return layer.kind.input_factor(moments, count, layer.kernel_shape, layer.bias, diagonal)

    def count(self, rank: int) -> Any:
        """The number of live positions, one a stacked layer, with as many axes as its moments."""
        if "live" not in self.parts:
            return self.layer.examples * self.layer.positions
        count = jnp.maximum(self.parts["live"].sum((-2, -1)), 1)
        return count.reshape(*count.shape, *(1,) * (rank - count.ndim))

    def live_examples(self, rank: int) -> Any:
        """The number of examples with a live position, with `rank` axes."""
        if "live" not in self.parts:
            return self.layer.examples
        count = jnp.maximum((self.parts["live"].max(-1) > 0).sum(-1), 1)
        return count.reshape(*count.shape, *(1,) * (rank - count.ndim))

    def mean_input(self, parts: Any) -> jax.Array:
        a = self.inputs(parts)
        if "live" not in parts:
            return a.mean(-2, keepdims=True)
        return a.sum(-2, keepdims=True) / jnp.maximum(parts["live"].sum(-1), 1)[:, None, None]

    def output_factor(self, diagonal=False):
        reduce = self.layer.sharing == "reduce"

        def square(parts):
            g = self.outputs(parts)
            return gram(g.sum(-2, keepdims=True) if reduce else g, diagonal)

        return self._sum(square) / self.layer.examples

    def second_moment_in(self, basis_in, basis_out):
        bases = {name: b for name, b in (("in", basis_in), ("out", basis_out)) if b is not None}

        def squares(parts, bases):
            return second_moment(self.inputs(parts), self.outputs(parts), bases.get("in"), bases.get("out"))

        return self._sum(squares, bases, example_bytes=self._gradient_bytes) / self.layer.examples

    def contract_output(self, v, diagonal=False):
        return self._contract(lambda parts: (self.outputs(parts), self.inputs(parts)), v, diagonal)

    def contract_input(self, u, diagonal=False):
        return self._contract(lambda parts: (self.inputs(parts), self.outputs(parts)), u, diagonal)

    def _contract(self, sides, matrix, diagonal):
        def contracted(parts, matrix):
            return contract(*sides(parts), matrix, diagonal)

        return self._sum(contracted, matrix, example_bytes=self._gradient_bytes) / self.layer.examples

    def traced_factors(self, pairing, diagonal):
        function = _traced_examples if pairing == "example" else _traced_positions

        def traced(parts):
            return function(self.inputs(parts), self.outputs(parts), diagonal)

        sums = self._sum(traced, example_bytes=self._gradient_bytes)
        return jax.tree.map(lambda v: v / self.layer.examples, sums)

    def example_gradients(self):
        def one(parts):
            return jnp.einsum("...nta,...ntb->...nab", self.inputs(parts), self.outputs(parts))

        return over_stack(one, len(self.layer.stacked))(self.parts)

    def _alpha(self, parts: Any, p: jax.Array) -> jax.Array:
        """pᵀā of every block, (*blocks, m, t, v)."""
        return jnp.einsum("...mti,...vi->...mtv", self.inputs(parts), p)

    def _gamma(self, parts: Any, q: jax.Array) -> jax.Array:
        return jnp.einsum("...mto,...vo->...mtv", self.outputs(parts), q)

    def project_inputs(self, p):
        layer = self.layer
        if layer.sharing == "reduce":

            def mean(parts, p):
                alpha = _blocks_last(self._alpha(parts, p))
                if "live" not in parts:
                    return alpha.mean(1, keepdims=True)
                count = jnp.maximum(parts["live"].sum(-1), 1).astype(alpha.dtype)
                return alpha.sum(1, keepdims=True) / count[:, None, None, None]

            alpha, count = self._map(mean, p), self.live_examples(len(layer.stacked))
        elif layer.kind.per_example:
            # ā = 1 in every block: the blocks are one row, whose γ is the sum of theirs.
            stacked, vectors = p.shape[: len(layer.stacked)], p.shape[-2]
            return jnp.full((*stacked, layer.examples, 1, vectors, 1), layer.examples**-0.5, p.dtype)
        else:
            alpha = self._map(lambda parts, p: _blocks_last(self._alpha(parts, p)), p)
            count = self.count(len(layer.stacked))
        scale = jax.lax.rsqrt(jnp.asarray(count, alpha.dtype))
        return alpha * scale.reshape(*scale.shape, *(1,) * 4)

    def project_outputs(self, q):
        layer = self.layer

        def gamma(parts, q):
            values = _blocks_last(self._gamma(parts, q))
            values = values.sum(-1, keepdims=True) if layer.kind.per_example else values
            return values.sum(1, keepdims=True) if layer.sharing == "reduce" else values

        return self._map(gamma, q) * layer.examples**-0.5

    def project(self, p, q):
        def products(parts, p, q):
            return _blocks_last(self._alpha(parts, p) * self._gamma(parts, q)).sum((1, -1))

        return self._map(products, p, q)

    def inner(self, matrix):
        return self._map(self._inner, matrix)

    def _inner(self, parts: Any, matrix: jax.Array) -> jax.Array:
        mapped = self.inputs(parts) @ matrix[..., None, :, :]
        products = jnp.sum(mapped * self.outputs(parts), (-2, -1))
        return products.reshape(-1, products.shape[-1]).sum(0)

    def weighted_gradient(self, weights):
        layer = self.layer
        each = jnp.broadcast_to(weights.astype(layer.factor_dtype), (*layer.stacked, *weights.shape))
        weighted = {**self.parts, "weights": each}
        return self._by_chunks(chunks.fold, self._weighted, weighted, (), self._gradient_bytes)

    def _weighted(self, parts: Any) -> jax.Array:
        return jnp.einsum("...mti,...mto,m->...io", self.inputs(parts), self.outputs(parts), parts["weights"])


def _blocks_last(values: jax.Array) -> jax.Array:
    """(*blocks, m, t, v) → (m, t, v, all blocks)."""
    return jnp.moveaxis(values.reshape(-1, *values.shape[-3:]), 0, -1)


def over_stack(function: Any, stacked: int) -> Any:
    """`function` under `stacked` vmaps."""
    return functools.reduce(lambda f, _: jax.vmap(f), range(stacked), function)


def second_moment(a: jax.Array, g: jax.Array, basis_in: Any, basis_out: Any) -> jax.Array:
    """Σ_n (U_Aᵀ (Σ_t a_{n,t} g_{n,t}ᵀ) U_G)² elementwise, for a (..., n, t, d_in), g (..., n, t, d_out); None is the identity."""
    t, d_in, d_out = *a.shape[-2:], g.shape[-1]
    rotate_rows = t == 1 or t * (d_in**2 + d_out**2) <= d_in * d_out * (d_in + d_out)
    if rotate_rows:
        a = a if basis_in is None else a @ basis_in[..., None, :, :]
        g = g if basis_out is None else g @ basis_out[..., None, :, :]
    if t == 1:
        return jnp.square(a[..., 0, :]).mT @ jnp.square(g[..., 0, :])
    gradients = a.mT @ g
    if not rotate_rows:
        gradients = gradients if basis_in is None else basis_in[..., None, :, :].mT @ gradients
        gradients = gradients if basis_out is None else gradients @ basis_out[..., None, :, :]
    return jnp.sum(jnp.square(gradients), -3)


def contract(inner: jax.Array, outer: jax.Array, matrix: jax.Array, diagonal: bool) -> jax.Array:
    """Σ_n Σ_{t,t'} (x_tᵀ K x_t') y_t y_t'ᵀ for inner x (..., n, t, d), outer y (..., n, t, e), K (..., d, d) or its diagonal."""
    t, d, e = *inner.shape[-2:], outer.shape[-1]
    is_diagonal = matrix.ndim == inner.ndim - 2
    mapped = inner * matrix[..., None, None, :] if is_diagonal else inner @ matrix[..., None, :, :]
    if t == 1:
        rows = outer[..., 0, :]
        weights = jnp.sum(mapped * inner, (-1, -2))
        weighted = weights[..., None] * rows
        return jnp.sum(weighted * rows, -2) if diagonal else weighted.mT @ rows
    by_position = t * t * (d + e) <= 2 * t * d * e
    weighted = mapped @ inner.mT @ outer if by_position else mapped @ (inner.mT @ outer)
    flat, weighted = (v.reshape(*v.shape[:-3], -1, e) for v in (outer, weighted))
    return jnp.sum(weighted * flat, -2) if diagonal else flat.mT @ weighted


def _traced_positions(a: jax.Array, g: jax.Array, diagonal: tuple[bool, bool]) -> tuple[jax.Array, ...]:
    """Σ_n of σ = Σ_t ‖a_t‖²‖g_t‖², σΦ = Σ_t ‖g_t‖² a_t a_tᵀ, σΨ = Σ_t ‖a_t‖² g_t g_tᵀ."""
    trace_in, trace_out = (jnp.sum(v * v, -1, keepdims=True) for v in (a, g))
    return (
        jnp.sum(trace_in * trace_out, (-3, -2, -1)),
        gram(a * jnp.sqrt(trace_out), diagonal[0]),
        gram(g * jnp.sqrt(trace_in), diagonal[1]),
    )


def _traced_examples(a: jax.Array, g: jax.Array, diagonal: tuple[bool, bool]) -> tuple[jax.Array, ...]:
    """Σ_n of σ = ‖M‖², σΦ = M Mᵀ, σΨ = Mᵀ M with M = Σ_t a_t g_tᵀ."""
    unit_in, unit_out = (jnp.ones((*v.shape[:-3], v.shape[-1]), v.dtype) for v in (a, g))
    inputs = contract(g, a, unit_out, diagonal[0])
    outputs = contract(a, g, unit_in, diagonal[1])
    trace = inputs.sum(-1) if diagonal[0] else jnp.trace(inputs, axis1=-2, axis2=-1)
    return trace, inputs, outputs
