"""The greedy search for the preconditioner's own damping γ² (Martens & Grosse 2015, section 6.6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._methods import request as request_lib
from kfe_optax._methods.request import Request

SEARCH_FACTOR = (19 / 20) ** 0.5
"""One step's factor in the search for the inner damping's root γ; a period of T steps has its T-th power."""


class Proposal(NamedTuple):
    """A preconditioned gradient D, the coefficients of δ = −αD + μδ₀ (without μ when there is no momentum), M(δ) − M(0), δᵀδ."""

    direction: Any
    coefficients: jax.Array
    change: jax.Array
    squared_norm: jax.Array


# (the preconditioner's state, what is asked of it) → the proposal and the new state.
Propose = Callable[[Any, Request], tuple[Proposal, Any]]


def neighbors(inner_damping: jax.Array, period: int, floor: float, ceiling: float) -> list[jax.Array]:
    """(γω₂)² and (γ/ω₂)² in [floor, ceiling]."""
    factor = SEARCH_FACTOR ** (2 * period)
    return [jnp.clip(inner_damping * f, floor, ceiling) for f in (factor, 1 / factor)]


def searched(
    due: jax.Array,
    propose: Propose,
    first: Proposal,
    inner_state: Any,
    inner_damping: jax.Array,
    others: list[jax.Array],
    fresh: jax.Array,
) -> tuple[Proposal, Any, jax.Array]:
    """The best proposal of three inner dampings, the preconditioner's state and the damping that belong to it.

    Unless it is `fresh`, the first proposal comes from older factors than the others, and is made again.
    """
    # What another damping does not change (the statistics) stays outside the branch, which would copy it on every step.
    own, put_back = request_lib.divided(inner_state)
    dampings = jnp.stack([inner_damping, *others]).astype(inner_damping.dtype)

    def start():
        return first, own, inner_damping

    def attempt(i, best):
        proposal, new = propose(inner_state, Request(dampings[i], first=first.direction))
        better = (i == 0) | (jnp.isfinite(proposal.change) & ~(proposal.change >= best[0].change))
        other = (proposal, request_lib.divided(new)[0], dampings[i])
        return jax.lax.cond(better, lambda: other, lambda: best)

    def search():
        # A loop and not proposals side by side: one program to compile, one more set of inverses in memory.
        return jax.lax.fori_loop(jnp.where(fresh, 1, 0), len(dampings), attempt, start())

    best, own, inner_damping = jax.lax.cond(due, search, start)
    return best, put_back(own), inner_damping
