"""What methods with inverses do in every step: the factors' average when that is due, and new inverses when those are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kfe_optax._jax import counts, failures
from kfe_optax._jax.failures import Failure
from kfe_optax._layers.layers import Layers
from kfe_optax._methods import periods
from kfe_optax._methods.layerwise import Step
from kfe_optax.factors.base import Source


class Inverting(Protocol):
    """A method whose state has `factors`, `roots`, `failures` and `last_refresh`."""

    @property
    def layers(self) -> Layers: ...
    @property
    def factors(self) -> Any: ...
    @property
    def factor_update_period(self) -> Any: ...
    @property
    def inverse_update_period(self) -> Any: ...
    @property
    def early(self) -> periods.Early: ...


class Refreshed(NamedTuple):
    """Four fields of the method's state after the step."""

    factors: Any
    roots: Any
    failures: jax.Array
    last_refresh: jax.Array


def refreshed(
    method: Inverting, state: Any, step: Step, invert: Callable[[Any], tuple[Any, jax.Array]]
) -> Refreshed:
    """The step's factors, and its roots out of `invert`, factors → (roots, the number of factorizations that failed)."""
    factors = update_factors(
        method.factors,
        method.layers,
        state.factors,
        step,
        method.factor_update_period,
        method.early,
    )
    due = periods.due(step.count, method.inverse_update_period, method.early) | step.again

    def new() -> tuple[Any, jax.Array]:
        with jax.default_matmul_precision("highest"):
            return invert(factors)

    roots, failed = periods.new_if_due(due, step.finite, new, (state.roots, jnp.zeros((), jnp.int32)))
    more = failures.of(Failure.FACTORIZATION, failed) + failures.between(
        state.factors.failures, factors.failures
    )
    last_refresh = jnp.where(due & step.finite, step.count, state.last_refresh)
    return Refreshed(factors, roots, counts.added(state.failures, more), last_refresh)


def update_factors(
    factors: Any, layers: Layers, state: Any, step: Step, period: Any, early: periods.Early = periods.PLAIN
) -> Any:
    """The state of the factors after this step, from a pull of its own when an update is due."""
    if step.again:
        return state

    def new() -> Any:
        pulled = step.taps.pulled() if factors.needs_taps and step.taps is not None else None
        with jax.default_matmul_precision("highest"):
            return factors.update(state, Source(layers, pulled, step.gradients), step.count)

    return periods.new_if_due(periods.due(step.count, period, early), step.finite, new, state)
