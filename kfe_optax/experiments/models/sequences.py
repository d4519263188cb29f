"""Models of sequences: transformers of image patches and of characters, and recurrent networks of characters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kfe_optax.experiments.errors import chosen

CELLS: dict[str, type[nn.RNNCellBase]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
_POSITIONS = nn.initializers.normal(0.02)


class Wide(nn.Module):
    """Two dense layers with a GELU between them."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(x.shape[-1], name="dense_2")(jax.nn.gelu(nn.Dense(self.hidden, name="dense_1")(x)))


class Experts(nn.Module):
    """A mixture of such pairs, a stack of them: each position's two best experts by a router, weighted by its softmax.

    Every expert computes every position, which at these sizes costs less than sorting them.
    """

    experts: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scores = nn.Dense(self.experts, use_bias=False, name="router")(x)
        second = jax.lax.top_k(scores, 2)[0][..., 1:]
        weights = jax.nn.softmax(jnp.where(scores >= second, scores, -jnp.inf))
        axes: Any = {"params": 0}
        rngs: Any = {"params": True}
        stack = nn.vmap(Wide, variable_axes=axes, split_rngs=rngs, in_axes=None, axis_size=self.experts)
        return jnp.einsum("e...d,...e->...d", stack(self.hidden, name="stack")(x), weights)


class Block(nn.Module):
    """Attention and two dense layers (or a mixture of experts), each on a layer norm's output and added to its input.

    It returns a pair, as the body of a loop does.
    """

    heads: int
    hidden: int
    causal: bool
    dropout: float
    train: bool
    experts: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        dropout, still = self.dropout, not self.train
        # One mask for all examples; (1, 1, length, length).
        mask = nn.make_causal_mask(jnp.ones((1, x.shape[1]))) if self.causal else None
        attention = nn.MultiHeadDotProductAttention(
            self.heads, dropout_rate=dropout, deterministic=still, name="attention"
        )
        branch = attention(nn.LayerNorm(name="norm_1")(x), mask=mask)
        x = x + nn.Dropout(dropout, deterministic=still)(branch)
        wide = Experts(self.experts, self.hidden) if self.experts > 1 else Wide(self.hidden)
        nn.share_scope(self, wide)
        return x + nn.Dropout(dropout, deterministic=still)(wide(nn.LayerNorm(name="norm_2")(x))), None


class VisionTransformer(nn.Module):
    """Patches of an image, embedded by a convolution, through blocks, to the logits of their mean."""

    image_shape: tuple[int, int, int]
    classes: int = 10
    patch: int = 4
    width: int = 192
    depth: int = 6
    heads: int = 6
    hidden: int = 768
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(-1, *self.image_shape)
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("positions", _POSITIONS, x.shape[1:])
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for index in range(1, self.depth + 1):
            block = Block(self.heads, self.hidden, False, self.dropout, train, name=f"block_{index}")
            x, _ = block(x)
        return nn.Dense(self.classes, name="logits")(nn.LayerNorm(name="norm")(x).mean(1))


class CharacterTransformer(nn.Module):
    """Characters (n, length) to the logits of each next one, (n, length, vocabulary).

    ``experts`` above one puts a mixture of so many in the place of each block's dense layers. ``tied`` takes the
    embedding's table for the last layer as well. ``scan`` makes a loop of the blocks, whose parameters are
    then stacked and whose activations are computed again in the backward pass: a program and a memory that
    hardly grow with ``depth``.
    """

    vocabulary: int
    length: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int = 512
    dropout: float = 0.0
    tied: bool = False
    scan: bool = False
    experts: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=_POSITIONS, name="embed")
        positions = self.param("positions", _POSITIONS, (self.length, self.width))
        x = embed(tokens) + positions[: tokens.shape[1]]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = (self.heads, self.hidden, True, self.dropout, train, self.experts)
        if self.scan:
            body: Any = nn.remat(Block, prevent_cse=False)
            axes: Any = {"params": 0}
            rngs: Any = {"params": True, "dropout": True}
            loop = nn.scan(body, variable_axes=axes, split_rngs=rngs, length=self.depth)
            x, _ = loop(*block, name="blocks")(x, None)
        else:
            for index in range(1, self.depth + 1):
                x, _ = Block(*block, name=f"block_{index}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary, name="logits")(x)


class Recurrent(nn.Module):
    """Characters (n, length) to the logits of each next one, through layers of recurrent cells.

    The cells are made of dense layers, one of each gate's inputs and one of its hidden state, and
    start every sequence from zeros.
    """

    vocabulary: int
    cell: str = "lstm"
    embedding: int = 64
    width: int = 256
    depth: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.embedding, name="embed")(tokens)
        for index in range(1, self.depth + 1):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            # Of the parameters' type: cells of float32 would not loop over a state of float64.
            cell = chosen("config.model.cell", self.cell, CELLS)(
                self.width, param_dtype=x.dtype, name=f"{self.cell}_{index}"
            )
            x = nn.RNN(cell, name=f"rnn_{index}")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.vocabulary, name="logits")(x)
