"""A layer of a `Network` block by block, densely, and the first step of several methods on it."""

from __future__ import annotations

import jax
import numpy as np

from . import dense

DAMPING = 0.03


def fisher(rows):
    """F of every block (*blocks, d, d)."""
    m = rows.gradients()
    flat = m.reshape(*m.shape[:-4], -1, m.shape[-2] * m.shape[-1])
    return flat.swapaxes(-1, -2) @ flat / rows.n


def blocks(layer, values, rank=2):
    """{index: block} of values (*blocks or 1s, ...), every block of W̄."""
    whole = np.broadcast_to(values, (*layer.stack_shape, *np.shape(values)[np.ndim(values) - rank :]))
    return {index: whole[index] for index in np.ndindex(*layer.stack_shape)}


def full(side, rank):
    """A side as matrices, whether it is kept as its diagonal (of this rank) or not."""
    side = np.asarray(side)
    return side[..., None] * np.eye(side.shape[-1]) if side.ndim == rank else side


class Blocks:
    """One layer of a network by its definition: A, G, F and the mean gradient V, block by block."""

    def __init__(self, network, name):
        self.layer = network.layers[name]
        branch, rows = network.branches[name], network.rows(name, "exact")
        a, g = branch.factors(rows)
        a, g = (
            side * np.eye(side.shape[-1]) if narrow else side
            for side, narrow in zip((a, g), self.layer.kind.diagonal, strict=True)
        )
        self.a, self.g, self.f = (
            blocks(self.layer, a),
            blocks(self.layer, g),
            blocks(self.layer, fisher(rows)),
        )
        mean = network.rows(name, "empirical").gradients()[..., 0, :, :, :].mean(-3)
        self.v = blocks(self.layer, mean)
        # π of all blocks where they share a factor.
        pairs = (
            [(a.mean((0, 1)), g.mean((0, 1)))] * len(self.v)
            if self.layer.shares_factors
            else zip(self.a.values(), self.g.values(), strict=True)
        )
        self.pi = {index: dense.pi(*pair) for index, pair in zip(self.v, pairs, strict=True)}

    def matrix(self, tree):
        return blocks(self.layer, np.asarray(self.layer.to_matrix(tree)))

    def basis(self, pair):
        rank = len(self.layer.stack_shape) + 1
        vectors = [np.ones_like(side.values) if side.vectors is None else side.vectors for side in pair]
        return [blocks(self.layer, full(side, rank)) for side in vectors]


def one_step(network, made):
    """{method: (updates, state)} of the first step with the taps of all columns."""
    grads, taps = network.taps("exact")

    @jax.jit
    def run(grads, taps):
        return {
            name: tx.update(grads, tx.init(network.params), network.params, taps=taps)
            for name, tx in made.items()
        }

    return run(grads, taps)
