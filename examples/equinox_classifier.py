"""A convolutional network of digits in Equinox: a module is a pytree, whose arrays are the parameters.

`eqx.partition` parts the arrays from the rest (activations, sizes), and the loss puts them together again. An Equinox
layer sees one example, so that the module is called under `jax.vmap`; the layers are found all the same, with kernels
(out, in, …).

    python -m examples.equinox_classifier
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax

import kfe_optax as kfe
from examples import race
from examples.digits import Digits, load


class Network(eqx.Module):
    """Two convolutions with a stride of two, and a dense layer."""

    convolutions: list[eqx.nn.Conv2d]
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array, channels: int):
        keys = jax.random.split(key, 3)
        self.convolutions = [
            eqx.nn.Conv2d(1, channels, 3, 2, key=keys[0]),
            eqx.nn.Conv2d(channels, 2 * channels, 3, 2, key=keys[1]),
        ]
        self.out = eqx.nn.Linear(2 * channels * 36, 10, key=keys[2])

    def __call__(self, image: jax.Array) -> jax.Array:
        h = image[None]
        for convolution in self.convolutions:
            h = jax.nn.relu(convolution(h))
        return self.out(h.reshape(-1))


class Carried(NamedTuple):
    """The digits, and what `eqx.partition` returns beside the arrays: here no leaves, so that a compiled step takes it."""

    digits: Digits
    rest: Any


def loss_fn(arrays: Any, rest: Any, batch: Digits) -> jax.Array:
    logits = jax.vmap(eqx.combine(arrays, rest))(batch.images)
    return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


class Classifier(NamedTuple):
    """Batches of 128 digits."""

    steps: int = 200
    unit: str = "training loss"
    channels: int = 8

    def start(self, key: jax.Array) -> tuple[Any, Carried]:
        arrays, rest = eqx.partition(Network(key, self.channels), eqx.is_inexact_array)
        return arrays, Carried(load(), rest)

    def arguments(self, params: Any, carried: Carried, key: jax.Array) -> tuple[tuple[Any, ...], Carried]:
        return (carried.rest, carried.digits.batch(key, 128)), carried

    def measure(self, params: Any, carried: Carried, loss: jax.Array) -> jax.Array:
        return loss

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "Equinox: a convolutional network of digits", Classifier(), (3e-2, 1e-1, 3e-1)

if __name__ == "__main__":
    race.main("equinox_classifier", TITLE, PROBLEM, RATES)
