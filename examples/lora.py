"""Low-rank adaptation (Hu et al. 2022): a trained classifier of digits learns to read them turned by a quarter.

A frozen dense layer W gets a detour beside it, x W + (x A) B, of rank r. A and B are trained as two dense layers
without bias, and each has its own factors, of sizes d × r and r × d. W is an argument of the loss and none of its
parameters, so that it has no gradient, no factors and no state. B begins at zero: on the first steps A has neither a
gradient nor a curvature, as in Adam.

    python -m examples.lora
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfe_optax as kfe
from examples import race
from examples.digits import Digits, load

Params = dict[str, dict[str, jax.Array]]


class Carried(NamedTuple):
    """The frozen base, and the digits as they are to be read."""

    base: Params
    turned: Digits


def init_base(key: jax.Array, widths: tuple[int, ...] = (784, 256, 256, 10)) -> Params:
    """Kernels of He's size, and biases of zero."""
    he = jax.nn.initializers.he_normal()
    return {
        f"dense_{i}": {"kernel": he(jax.random.fold_in(key, i), shape), "bias": jnp.zeros(shape[1])}
        for i, shape in enumerate(itertools.pairwise(widths))
    }


def init_adapters(key: jax.Array, base: Params, rank: int) -> Params:
    """A (d_in, rank) for each layer of the base, and B (rank, d_out) of zeros."""
    adapters = {}
    for i, (name, layer) in enumerate(base.items()):
        d_in, d_out = layer["kernel"].shape
        down = jax.nn.initializers.he_normal()(jax.random.fold_in(key, i), (d_in, rank))
        adapters[name] = {"a": down, "b": jnp.zeros((rank, d_out))}
    return adapters


def network(base: Params, adapters: Params | None, images: jax.Array) -> jax.Array:
    """Logits (n, 10), with or without the detours."""
    h = images.reshape(len(images), -1)
    for i, (name, layer) in enumerate(base.items()):
        x = jax.nn.relu(h) if i else h
        h = x @ layer["kernel"] + layer["bias"]
        if adapters is not None:
            h = h + x @ adapters[name]["a"] @ adapters[name]["b"]
    return h


def pretrain(base: Params, upright: Digits, key: jax.Array, steps: int) -> Params:
    """The base, trained with Adam on upright digits."""
    tx = optax.adam(1e-3)

    def loss_fn(base: Params, batch: Digits) -> jax.Array:
        logits = network(base, None, batch.images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        base, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss_fn)(base, upright.batch(key, 128)), opt_state)
        return (optax.apply_updates(base, updates), opt_state), None

    return jax.lax.scan(step, (base, tx.init(base)), jax.random.split(key, steps))[0][0]


def loss_fn(adapters: Params, base: Params, batch: Digits) -> jax.Array:
    """The cross-entropy of turned digits."""
    logits = network(base, adapters, batch.images)
    return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


class Lora(NamedTuple):
    """Adapters of rank 8, batches of 128."""

    steps: int = 200
    unit: str = "training loss"
    rank: int = 8
    base_steps: int = 300

    def start(self, key: jax.Array) -> tuple[Params, Carried]:
        upright = load()
        base = pretrain(init_base(key), upright, jax.random.fold_in(key, 3), self.base_steps)
        turned = upright._replace(images=jnp.rot90(upright.images, axes=(1, 2)))
        return init_adapters(jax.random.fold_in(key, 4), base, self.rank), Carried(base, turned)

    def arguments(self, params: Params, carried: Carried, key: jax.Array) -> tuple[tuple[Any, ...], Carried]:
        return (carried.base, carried.turned.batch(key, 128)), carried

    def measure(self, params: Params, carried: Carried, loss: jax.Array) -> jax.Array:
        return loss

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "LoRA: a classifier learns to read turned digits", Lora(), (1e-2, 3e-2, 1e-1)

if __name__ == "__main__":
    race.main("lora", TITLE, PROBLEM, RATES)
