"""Factors that are given instead of estimated: any terms, step after step, through the library's open interface."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax.factors.base import Term

from . import factor_rows as fr

# Which sides are kept as diagonals.
DIAGONAL = {
    "dense": (True, False),
    "positions": (False, False),
    "stack": (False, False),
    "twice": (False, True),
}


class State(NamedTuple):
    updates: jax.Array
    terms: Any
    failures: jax.Array


class Given:
    """At step k the k-th entry of `table`, {layer: (Term with a leading axis of steps, …)}, over and over."""

    needs_taps = False

    def __init__(self, table):
        self.table = table
        self.rank = len(next(iter(table.values())))

    def init(self, layers, max_dim):
        zero = jnp.zeros((), jnp.int32)
        return State(zero, jax.tree.map(lambda v: jnp.zeros_like(v[0]), self.table), zero)

    def update(self, state, source, count):
        length = len(jax.tree.leaves(self.table)[0])
        chosen = jax.tree.map(lambda v: jnp.asarray(v)[count % length], self.table)
        return State(state.updates + 1, chosen, state.failures)

    def terms(self, state, layers):
        return state.terms


def random_table(generator, steps, rank, spread=1.0):
    """Positive definite first terms, indefinite second ones."""
    table = {}
    for name, (stacked, _, *sides) in fr.SHAPES.items():
        lead = (steps, *([stacked] if stacked else []))
        table[name] = tuple(
            Term(*(_side(generator, lead, d, DIAGONAL[name][i], k == 0, spread) for i, d in enumerate(sides)))
            for k in range(rank)
        )
    return table


def _side(generator, lead, d, diagonal, positive, spread):
    if diagonal:
        values = generator.normal(size=(*lead, d))
        return values**2 + 0.01 if positive else spread * values
    square = generator.normal(size=(*lead, d, d))
    if positive:
        return square @ square.swapaxes(-1, -2) + 0.01 * np.eye(d)
    return spread * (square + square.swapaxes(-1, -2))


def random_gradients(generator):
    return {
        name: {"kernel": jnp.asarray(generator.normal(size=(*([stacked] if stacked else []), d_in, d_out)))}
        for name, (stacked, _, d_in, d_out) in fr.SHAPES.items()
    }


def members(table, step, *trees):
    """(key, [(A, B), …] as matrices, the matrices of every tree) of each layer at a step, stacks taken apart."""
    for name, terms in table.items():
        stacked = fr.SHAPES[name][0]
        for i in range(stacked or 1):
            pick = (lambda v, i=i: np.asarray(v)[i]) if stacked else np.asarray
            pairs = [tuple(fr.expanded(pick(side[step])) for side in term) for term in terms]
            yield (name, i), pairs, [pick(tree[name]["kernel"]) for tree in trees]
