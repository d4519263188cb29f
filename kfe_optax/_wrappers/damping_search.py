"""The greedy search for the preconditioner's own damping γ² (Martens & Grosse 2015, section 6.6)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

SEARCH_FACTOR = (19 / 20) ** 0.5
"""One step's factor in the search for the inner damping's root γ; a period of T steps has its T-th power."""


class Proposal(NamedTuple):
    """A preconditioned gradient D, the coefficients of δ = −αD + μδ₀ (without μ when there is no momentum), M(δ) − M(0), δᵀδ."""

    direction: Any
    coefficients: jax.Array
    change: jax.Array
    squared_norm: jax.Array


def neighbors(inner_damping: jax.Array, period: int, floor: float, ceiling: float) -> list[jax.Array]:
    """(γω₂)² and (γ/ω₂)² in [floor, ceiling]."""
    factor = SEARCH_FACTOR ** (2 * period)
    return [jnp.clip(inner_damping * f, floor, ceiling) for f in (factor, 1 / factor)]


def searched(
    due: jax.Array,
    propose: Any,
    first: Proposal,
    inner_state: Any,
    inner_damping: jax.Array,
    others: list[jax.Array],
    fresh: jax.Array,
) -> tuple[Proposal, Any, jax.Array]:
    """The best proposal of three inner dampings, the preconditioner's state and the damping that belong to it.

    Unless it is `fresh`, the first proposal comes from older factors than the others, and is made again.
    """
    leaves, structure = jax.tree.flatten(inner_state)

    def retried(damping):
        proposal, state = propose(inner_state, damping, retry=first.direction)
        return proposal, jax.tree.leaves(state)

    # What another damping does not change (factors, counts) stays outside the branch, which would copy it on every step.
    changed = _changed(lambda state: propose(state, inner_damping, retry=first.direction)[1], inner_state)

    def start():
        return first, [leaves[i] for i in changed], inner_damping

    dampings = jnp.stack([inner_damping, *others]).astype(inner_damping.dtype)

    def attempt(i, best):
        proposal, new = retried(dampings[i])
        better = (i == 0) | (jnp.isfinite(proposal.change) & ~(proposal.change >= best[0].change))
        other = (proposal, [new[place] for place in changed], dampings[i])
        return jax.lax.cond(better, lambda: other, lambda: best)

    def search():
        # A loop and not proposals side by side: one program to compile, one more set of inverses in memory.
        return jax.lax.fori_loop(jnp.where(fresh, 1, 0), len(dampings), attempt, start())

    best, new, inner_damping = jax.lax.cond(due, search, start)
    for i, leaf in zip(changed, new, strict=True):
        leaves[i] = leaf
    return best, jax.tree.unflatten(structure, leaves), inner_damping


def _changed(function: Any, tree: Any) -> list[int]:
    """Which leaves of a tree a function to a like tree does not hand on as they are."""
    jaxpr = jax.make_jaxpr(lambda t: jax.tree.leaves(function(t)))(tree).jaxpr
    return [i for i, source in enumerate(_handed_on(jaxpr)) if source != i]


def _handed_on(jaxpr: Any) -> list[int | None]:
    """Which input each output is, through compiled functions too; None for what is computed."""
    inputs = {variable: i for i, variable in enumerate(jaxpr.invars)}

    def source(variable):
        return None if isinstance(variable, core.Literal) else inputs.get(variable)

    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            places = _handed_on(equation.params["jaxpr"].jaxpr)
            for variable, place in zip(equation.outvars, places, strict=True):
                origin = None if place is None else source(equation.invars[place])
                if origin is not None:
                    inputs[variable] = origin
    return [source(variable) for variable in jaxpr.outvars]
