"""What one use of a layer adds to the sums of all its uses (see `riders`)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._jax import chunks
from kfe_optax._layers.kinds.base import TRANSPOSED, gram, masked
from kfe_optax._layers.layer import WITHOUT_BIAS


def of_use(use: Any, x: jax.Array, g: jax.Array, live: jax.Array | None, spec: Any) -> dict[str, jax.Array]:
    """The sums of one use, those that are wanted (by name, in `spec`); see `tags.Use`.

    The functions below take the live rows, or 1 where all are.
    """
    wanted = {name: kind.dtype for name, kind in spec}
    dtype = wanted["count"]
    x, g = x.astype(dtype), g.astype(dtype)
    # Under a vmap over examples JAX adds up those cotangents that are mapped, and takes any other for the sum: an input or a
    # number of rows that does not depend on g would count once.
    one = jnp.where(jnp.isnan(g.ravel()[0]), 1, 1).astype(dtype)
    x = x * one
    live = one if live is None else live.astype(dtype) * one
    tokens = use.kind.statistics == "tokens"
    if use.label == TRANSPOSED:
        of_rows = _of_attend if tokens else _of_rows
        values = {
            name if name == "examples" else f"{TRANSPOSED}_{name}": value
            for name, value in of_rows(use, g, x, live).items()
        }
    else:
        values = (_of_lookup if tokens else _of_rows)(use, x, g, live)
    return {name: value() for name, value in values.items() if name in wanted}


def _of_rows(use: Any, x: jax.Array, g: jax.Array, live: jax.Array) -> dict[str, Any]:
    n = use.examples
    parts = {
        name: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for name, v in use.kind.row_values(x, g).items()
    }
    positions = math.prod(use.kind.free(x.shape, g.shape)) // n
    if live.ndim:
        parts["live"] = live.reshape(n, positions)
    chunk = chunks.size(n, use.row_bytes)
    unbiased = use.bias and use.label in (WITHOUT_BIAS, TRANSPOSED)

    def a(parts):
        rows = use.kind.input_rows(parts, use.kernel, use.bias)
        if unbiased:
            rows = rows.at[..., -1].set(0)
        return masked(rows, parts.get("live"))

    def b(parts):
        return masked(use.kind.output_rows(parts, use.kernel), parts.get("live"))

    def moments(parts):
        if unbiased:
            return gram(a(parts), False)
        return use.kind.input_moments(parts, parts.get("live"), use.kernel, use.bias, False)

    def counts():
        return parts["live"].sum(-1) if live.ndim else jnp.full(n, positions, g.dtype) * live

    def example_first(function):
        # (n, *blocks, ...): examples first, as pieces are put together along them.
        return lambda: chunks.mapped(function, parts, chunk)

    # Each in a loop of its own, so that a sum that nobody reads is not computed.
    return {
        "inputs": lambda: chunks.fold(moments, parts, chunk),
        "outputs": lambda: chunks.fold(lambda p: gram(b(p), False), parts, chunk),
        "input_squares": lambda: chunks.fold(lambda p: gram(a(p), True), parts, chunk),
        "output_squares": lambda: chunks.fold(lambda p: gram(b(p), True), parts, chunk),
        "count": lambda: counts().sum(),
        "examples": example_first(lambda p: jnp.moveaxis(a(p).mT @ b(p), -3, 0)),
        "input_sums": lambda: _blocks_first(
            chunks.mapped(lambda p: jnp.moveaxis(a(p).sum(-2), -2, 0), parts, chunk)
        ),
        "output_sums": lambda: _blocks_first(
            chunks.mapped(lambda p: jnp.moveaxis(b(p).sum(-2), -2, 0), parts, chunk)
        ),
        "example_counts": counts,
    }


def _blocks_first(values: jax.Array) -> jax.Array:
    """(n, *blocks, d) → (*blocks, n, d)."""
    return jnp.moveaxis(values, 0, -2)


def _weights(live: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return live.reshape(shape) if live.ndim else jnp.broadcast_to(live, shape)


def _of_lookup(use: Any, x: jax.Array, g: jax.Array, live: jax.Array) -> dict[str, Any]:
    n, vocabulary = use.examples, use.kernel[0]
    tokens = x.reshape(n, -1).astype(jnp.int32)
    rows = g.reshape(*tokens.shape, g.shape[-1])
    weights = _weights(live, tokens.shape)
    rows = rows * weights[..., None]

    def by_token(tokens, values):
        return jnp.zeros((vocabulary, *values.shape[1:]), values.dtype).at[tokens].add(values)

    def frequencies():
        return jax.vmap(by_token)(tokens, weights)

    return {
        "inputs": lambda: by_token(tokens.ravel(), weights.ravel()),
        "outputs": lambda: gram(rows, False),
        "count": lambda: weights.sum(),
        "examples": lambda: jax.vmap(by_token)(tokens, rows),
        "input_sums": frequencies,
        "output_sums": lambda: rows.sum(1),
        "example_counts": lambda: weights.sum(1),
    }


def _of_attend(use: Any, x: jax.Array, g: jax.Array, live: jax.Array) -> dict[str, Any]:
    """x = ∂L/∂logits (…, tokens) and g, the input of the output layer that is tied to the table."""
    n = use.examples
    x, g = (v.reshape(n, -1, v.shape[-1]) for v in (x, g))
    weights = _weights(live, x.shape[:2])
    x, g = x * weights[..., None], g * weights[..., None]
    return {
        "inputs": lambda: gram(x, True),
        "outputs": lambda: gram(g, False),
        "count": lambda: weights.sum(),
        "examples": lambda: x.mT @ g,
    }
