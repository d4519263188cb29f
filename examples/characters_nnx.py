"""A character Transformer in Flax NNX with `nnx.split` and `nnx.merge`: two blocks of width 64 read 64 characters.

The parameters of the optimizer are the `nnx.State` that `nnx.split` returns, and the loss merges them with the graph:
a pure function of a tree, for Optax without `nnx.Optimizer`.

    python -m examples.characters_nnx
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import kfe_optax as kfe
from examples import race
from examples.text import Text, load


class Block(nnx.Module):
    """Causal attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(jnp.ones(h.shape[:2]))
        h = h + self.attention(self.norms[0](h), mask=mask)
        return h + self.out(nnx.gelu(self.hidden(self.norms[1](h))))


class Transformer(nnx.Module):
    """Tokens (n, length) to the logits of the next ones."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.places = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        h = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.out(self.norm(h))


class Carried(NamedTuple):
    """The text, and what `nnx.split` returns beside the parameters."""

    text: Text
    graph: nnx.GraphDef
    rest: nnx.State


def loss_fn(params: nnx.State, graph: nnx.GraphDef, rest: nnx.State, tokens: jax.Array) -> jax.Array:
    logits = nnx.merge(graph, params, rest)(tokens[:, :-1])
    return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


class Characters(NamedTuple):
    """Batches of 32 pieces of 64 characters."""

    steps: int = 200
    unit: str = "training loss, nats a character"
    length: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 4

    def start(self, key: jax.Array) -> tuple[nnx.State, Carried]:
        text, vocabulary = load()
        model = Transformer(vocabulary, self.length, self.width, self.depth, self.heads, nnx.Rngs(key))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return params, Carried(text, graph, rest)

    def arguments(self, params: Any, carried: Carried, key: jax.Array) -> tuple[tuple[Any, ...], Carried]:
        return (carried.graph, carried.rest, carried.text.batch(key, 32, self.length)), carried

    def measure(self, params: Any, carried: Carried, loss: jax.Array) -> jax.Array:
        return loss

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "NNX: a character Transformer", Characters(), (3e-3, 1e-2, 3e-2)

if __name__ == "__main__":
    race.main("characters_nnx", TITLE, PROBLEM, RATES)
