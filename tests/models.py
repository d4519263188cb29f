"""The zoo: small models and losses that put layers under everything Flax and JAX do to parameters.

Every case is a loss as a user writes it, its parameters and a batch, together with what discovery must find. `sizes`
lists (matrix shape with stacked axes, shared) of every layer in the order of the forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import freeze

import kfe_optax as kfe

BATCH, INPUTS, WIDTH, CLASSES = 6, 3, 4, 3
Sizes = tuple[tuple[tuple[int, ...], bool], ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
      make: (dtype) → (loss function, params, args); the loss is a mean over the first axis of the args.
      sizes: what `find_layers` must find.
      independent: whether the loss of an example depends on that example alone (no batch statistics, no dropout).
      example_gradients: whether the layers keep per-example gradients.
      has_aux: whether the loss returns an auxiliary value.
      tier: None, "slow" or "nightly": the mark of a model that takes long, or that seldom says what the others do not.
    """

    make: Callable[[Any], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    sizes: Sizes
    independent: bool = True
    example_gradients: bool = True
    has_aux: bool = False
    tier: str | None = None


CASES: dict[str, Case] = {}


def case(*sizes: tuple[int, ...], shared: tuple[int, ...] = (), **options: Any):
    """Registers a maker under its name; `shared` holds the indices of the layers that are used more than once."""

    def register(make):
        found = tuple((shape, i in shared) for i, shape in enumerate(sizes))
        CASES[make.__name__] = Case(make, found, **options)
        return make

    return register


def batch(dtype: Any, *shape: int, classes: int = CLASSES) -> tuple[jax.Array, jax.Array]:
    """Inputs (BATCH, *shape) and integer labels (BATCH,)."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCH, *(shape or (INPUTS,))))
    return jnp.asarray(x, dtype), jnp.asarray(generator.integers(0, classes, BATCH))


def tokens(vocabulary: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Tokens (BATCH, length) and integer labels (BATCH,)."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, vocabulary, (BATCH, length))
    return jnp.asarray(drawn), jnp.asarray(generator.integers(0, CLASSES, BATCH))


def randomized(params: Any, dtype: Any, seed: int = 1) -> Any:
    """The tree with seeded normal values, so that no bias is zero and both precisions see the same numbers."""
    generator = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(params)
    values = [jnp.asarray(generator.normal(size=leaf.shape) / 2, dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, values)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def parameter_shapes(module: nn.Module, x: jax.Array) -> Any:
    """The Linen parameter tree of `module` for inputs like `x`, abstract."""
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


def linen(module: nn.Module, dtype: Any, x: jax.Array, labels: jax.Array, freeze_params: bool = False):
    """The usual loss of a Linen classifier."""
    params = randomized(parameter_shapes(module, x), dtype)

    def loss_fn(params, x, labels):
        return cross_entropy(module.apply({"params": params}, x), labels)

    return loss_fn, freeze(params) if freeze_params else params, (x, labels)


def nnx_model(model: nnx.Module, dtype: Any) -> nnx.Module:
    """`model` with seeded values in place of its parameters, all of its floating state in `dtype`."""
    nnx.update(model, randomized(nnx.state(model, nnx.Param), dtype))
    statistics = nnx.state(model, nnx.BatchStat)
    nnx.update(model, jax.tree.map(lambda v: v.astype(dtype), statistics))
    return model


def other_state(model: nnx.Module) -> Any:
    """Everything but the parameters as plain numbers: batch statistics, rng counts and keys."""

    def numbers(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(numbers, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))))


def nnx_loss(model, x, labels):
    return cross_entropy(model(x), labels)
