"""The help topics of Python's standard library, as numbers of characters."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Text(NamedTuple):
    """Tokens (n,) of the whole text."""

    tokens: jax.Array

    def batch(self, key: jax.Array, size: int, length: int) -> jax.Array:
        """Pieces (size, length + 1), which begin anywhere: each character and the one that follows it."""
        first = jax.random.randint(key, (size, 1), 0, len(self.tokens) - length)
        return self.tokens[first + jnp.arange(length + 1)]


def load() -> tuple[Text, int]:
    """The text, and how many characters it is made of."""
    text = "\n\n".join(topics[title] for title in sorted(topics))
    characters, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    return Text(jnp.asarray(tokens, jnp.int32)), len(characters)
