"""What all factors estimators share: their interface, running averages that leave out what is not finite, shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax.layers import Layer, Layers
from kfe_optax.taps import Pulled

ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]
T = TypeVar("T")


class Term(NamedTuple):
    """One Kronecker product A⊗B of a layer.

    Attributes:
      input: A (*stack, d_in, d_in), or its diagonal (*stack, d_in) where the side is larger than `max_dim`.
      output: B (*stack, d_out, d_out), or its diagonal.
    """

    input: jax.Array
    output: jax.Array


class Source(NamedTuple):
    """What an estimator may look at in one step.

    Attributes:
      layers: the layers of the optimizer.
      pulled: the statistics of the step (see `Taps.pulled`); None for an estimator with `needs_taps = False`.
      gradients: {layer: mean gradient (*stack, d_in, d_out)}.
    """

    layers: Layers
    pulled: Pulled | None
    gradients: dict[str, jax.Array]


class Factors(Protocol):
    """An estimator of every layer's Fisher block as a sum of Kronecker products.

    Its hyper-parameters are its fields, what changes is in a state: a NamedTuple of arrays with `updates` and `failures`.
    """

    @property
    def rank(self) -> int:
        """How many Kronecker products it yields."""

    @property
    def needs_taps(self) -> bool:
        """Whether it reads taps, or gradients alone."""

    def init(self, layers: Sequence[Layer], max_dim: int) -> Any:
        """The state before the first batch; a side larger than `max_dim` is diagonal."""

    def update(self, state: Any, source: Source, count: jax.Array) -> Any:
        """The state with one more batch, at step `count`; an estimate that is not finite is left out, and counted."""

    def terms(self, state: Any, layers: Layers) -> dict[str, tuple[Term, ...]]:
        """{layer: Kronecker terms}; the first one is positive semi-definite on both sides."""


def check_max_dim(max_dim: Any) -> None:
    """Raises ValueError for a traced `max_dim`."""
    if isinstance(max_dim, core.Tracer):
        raise ValueError(
            "max_dim fixes the shapes of the state and cannot be traced: give optax.inject_hyperparams "
            "static_args=('max_dim',), or call tx.init outside jit."
        )


def zero_term(layer: Layer, max_dim: int) -> Term:
    """Zeros in the shapes of a layer's factors."""
    return Term(*(jnp.zeros(_side_shape(layer, side, max_dim), layer.factor_dtype) for side in (0, 1)))


def _side_shape(layer: Layer, side: int, max_dim: int) -> tuple[int, ...]:
    d = layer.sides[side]
    return (*layer.stack_shape, d, d) if d <= max_dim else (*layer.stack_shape, d)


def is_diagonal(layer: Layer, term: Term) -> tuple[bool, bool]:
    """Which sides of a term are diagonals."""
    rank = len(layer.stack_shape) + 1
    return term.input.ndim == rank, term.output.ndim == rank


def divided(term: Term, by: jax.Array) -> Term:
    """Both sides of a term divided by a number (*stack,)."""
    return Term(*(side / by.reshape(by.shape + (1,) * (side.ndim - by.ndim)) for side in term))


def weight_of_past(updates: jax.Array, decay: ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """ρ = min(1 − 1/k, decay) at the k-th update, so that the first batch counts in full (Martens & Grosse 2015, section 5)."""
    bound = jnp.asarray(decay(count) if callable(decay) else decay)
    return jnp.minimum(1 - 1 / updates.astype(jnp.result_type(float)), bound)


def average(old: dict[str, T], new: dict[str, T], rho: jax.Array) -> tuple[dict[str, T], jax.Array]:
    """ρ old + (1 − ρ) new for every layer, the old one where the new one is not finite, and how many were not."""
    result, failures = {}, jnp.zeros((), jnp.int32)
    for name, before in old.items():
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new[name])]).all()
        failures = failures + ~finite

        def one(a, b, finite=finite):
            weight = rho.astype(a.dtype)
            return jnp.where(finite, weight * a + (1 - weight) * b.astype(a.dtype), a)

        result[name] = jax.tree.map(one, before, new[name])
    return result, failures
