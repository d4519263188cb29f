"""Hugging Face's Flax GPT-2 with random weights, unmodified, reads characters: two blocks of width 64.

Its kernels are (out, in), queries, keys and values come from one projection, and the logits from the embedding of the
tokens, which is tied to the last layer; the printed table says what each of these became.

    pip install "transformers<5"
    python -m examples.gpt2

The Flax models are in transformers 4 for the last time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from transformers import FlaxGPT2LMHeadModel, GPT2Config

import kfe_optax as kfe
from examples import race
from examples.text import Text, load


@functools.cache
def model(vocabulary: int, length: int, width: int, depth: int, heads: int) -> FlaxGPT2LMHeadModel:
    """The model without weights."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return FlaxGPT2LMHeadModel(config, input_shape=(1, length), _do_init=False)


class Gpt2(NamedTuple):
    """Batches of 32 pieces of 64 characters."""

    steps: int = 200
    unit: str = "training loss, nats a character"
    length: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 4

    def model(self) -> FlaxGPT2LMHeadModel:
        return model(load()[1], self.length, self.width, self.depth, self.heads)

    def start(self, key: jax.Array) -> tuple[Any, Text]:
        return self.model().init_weights(key, (1, self.length)), load()[0]

    def arguments(self, params: Any, carried: Text, key: jax.Array) -> tuple[tuple[jax.Array], Text]:
        return (carried.batch(key, 32, self.length),), carried

    def loss_fn(self, params: Any, tokens: jax.Array) -> jax.Array:
        logits = self.model()(tokens[:, :-1], params=params).logits
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def measure(self, params: Any, carried: Text, loss: jax.Array) -> jax.Array:
        return loss


TITLE, PROBLEM, RATES = "Hugging Face: a character GPT-2", Gpt2(), (1e-3, 3e-3, 1e-2)

if __name__ == "__main__":
    race.main("gpt2", TITLE, PROBLEM, RATES)
