"""Recurrent language models."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import linen as nn

CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


class Recurrent(nn.Module):
    """Characters (n, length) to the logits of each next one, through layers of recurrent cells.

    The cells are made of dense layers, one of each gate's inputs and one of its hidden state, and
    start every sequence from zeros.

    Example::

        model = Recurrent(vocabulary=96, cell="gru")
        params = model.init(key, tokens)["params"]  # tokens (n, length) int32
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
            cell = CELLS[self.cell](self.width, param_dtype=x.dtype, name=f"{self.cell}_{index}")
            x = nn.RNN(cell, name=f"rnn_{index}")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.vocabulary, name="logits")(x)
