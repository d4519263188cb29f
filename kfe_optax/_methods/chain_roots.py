"""The block-tridiagonal inverse of F̂ along chains of layers (Martens & Grosse 2015, section 4.3).

F̂ is the Fisher of a Gaussian model in which the gradient of each layer depends on that of the next one alone: F̂⁻¹ = Ξᵀ Λ Ξ with
Ξ V_i = V_i − Ψ^A_i V_{i+1} Ψ^G_iᵀ, Ψ^A_i = A_{i,i+1} A_{i+1,i+1}⁻¹, likewise Ψ^G_i, and Λ the inverse of what the next layer does
not explain, Σ_i = A_ii⊗G_ii − (Ψ^A_i A_{i+1,i+1} Ψ^A_iᵀ)⊗(Ψ^G_i G_{i+1,i+1} Ψ^G_iᵀ), of the last layer A⊗G itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import ALONE, Devices
from kfe_optax._linalg.kronecker import Eigenbasis
from kfe_optax.factors.chained import ChainFactors


class ChainRoots(NamedTuple):
    """What applying F̂⁻¹ takes, of a chain of L elements.

    Attributes:
      input: Ψ^A_i (d_in, d_in of the next), L − 1 of them.
      output: Ψ^G_i (d_out, d_out of the next), L − 1 of them.
      pencils: (K₁ and s₁, K₂ and s₂) of Σ_i, L − 1 pairs.
      last: A⁻¹ and G⁻¹ of the last element.
    """

    input: tuple[jax.Array, ...]
    output: tuple[jax.Array, ...]
    pencils: tuple[tuple[Eigenbasis, Eigenbasis], ...]
    last: tuple[jax.Array, jax.Array]


def unit(factors: ChainFactors) -> ChainRoots:
    """The roots before the first refresh: F̂⁻¹ is the identity."""

    def pencil(side):
        return Eigenbasis(jnp.zeros(side.shape[:1], side.dtype), kronecker.identity_like(side, 0))

    own = list(zip(factors.input, factors.output, strict=True))
    return ChainRoots(
        tuple(jnp.zeros_like(side) for side in factors.input_next),
        tuple(jnp.zeros_like(side) for side in factors.output_next),
        tuple((pencil(a), pencil(g)) for a, g in own[:-1]),
        (kronecker.identity_like(own[-1][0], 0), kronecker.identity_like(own[-1][1], 0)),
    )


def refresh(
    factors: Mapping[str, ChainFactors],
    old: Mapping[str, ChainRoots],
    damping: jax.Array,
    devices: Devices = ALONE,
    relative: bool = False,
) -> tuple[dict[str, ChainRoots], jax.Array]:
    """The roots of all chains, and how many chains kept all of their old ones because a factorization failed.

    The devices share inverses and pencils, not the products between them.

    The diagonal blocks have factored damping wherever they stand, the others none: the joint factors of neighbors then stay
    positive definite, and Σ_i with them.
    """
    # {(chain, side, i): A_ii or G_ii, damped}
    damped: dict[Any, jax.Array] = {}
    following: dict[Any, jax.Array] = {}
    for name, chain in factors.items():
        for i, pair in enumerate(zip(chain.input, chain.output, strict=True)):
            amounts = damping_lib.factored(*pair, damping, 0, relative)
            for side, (block, amount) in enumerate(zip(pair, amounts, strict=True)):
                damped[name, side, i] = damping_lib.add_to_diagonal(block, amount, 0)
        for side, blocks in enumerate((chain.input_next, chain.output_next)):
            following.update({(name, side, i): block for i, block in enumerate(blocks)})
    # The first of a chain that has a second is divided by nothing.
    needed = {(n, s, i): block for (n, s, i), block in damped.items() if i or (n, s, 0) not in following}
    inverses = kronecker.by_shape(kronecker.inverse, needed, devices)
    maps = {(n, s, i): block @ inverses[n, s, i + 1][0] for (n, s, i), block in following.items()}
    explained = {key: _symmetric(maps[key] @ block.mT) for key, block in following.items()}
    pairs = {key: (damped[key], explained[key]) for key in following}
    pencils = kronecker.by_shape(kronecker.pencil, pairs, devices)
    new, failures = {}, jnp.zeros((), jnp.int32)
    for name, chain in factors.items():
        last = len(chain.input) - 1
        roots = ChainRoots(
            tuple(maps[name, 0, i] for i in range(last)),
            tuple(maps[name, 1, i] for i in range(last)),
            tuple((pencils[name, 0, i][0], pencils[name, 1, i][0]) for i in range(last)),
            (inverses[name, 0, last][0], inverses[name, 1, last][0]),
        )
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(roots)]).all()

        def keep(new_leaf, old_leaf, finite=finite):
            return jnp.where(finite, new_leaf.astype(old_leaf.dtype), old_leaf)

        # Roots of different refreshes within a chain are roots of no F̂: the chain keeps all or none.
        new[name] = jax.tree.map(keep, roots, old[name])
        failures = failures + ~finite
    return new, failures


def apply(
    roots: Mapping[str, ChainRoots], matrices: Mapping[str, list[jax.Array]], floor: Any, devices: Devices
) -> dict[str, list[jax.Array]]:
    """F̂⁻¹ V of all chains, {chain: its V_i (d_in, d_out)}; of Σ_i at least `floor` times A_ii⊗G_ii is inverted.

    The devices share the products of the members, once for the first two factors of Ξᵀ Λ Ξ and once for the third.
    """
    inner, last = {}, {}
    for name, own in matrices.items():
        root = roots[name]
        for i, v in enumerate(own[:-1]):
            inner[name, i] = (v, own[i + 1], root.input[i], root.output[i], root.pencils[i])
        last[name, len(own) - 1] = (own[-1], *root.last)

    def forward(v, following, psi_in, psi_out, pencil):
        rest = v - psi_in @ following @ psi_out.mT
        stacked = v.ndim - 2
        scaled = kronecker.to_basis(rest, pencil, stacked) / _denominators(pencil, floor)
        return kronecker.from_basis(scaled, pencil, stacked)

    solved = kronecker.each(forward, inner, devices)
    solved |= kronecker.each(lambda v, a, g: a @ v @ g, last, devices)

    def backward(v, previous, psi_in, psi_out):
        return v - psi_in.mT @ previous @ psi_out

    pairs = {
        (name, i + 1): (solved[name, i + 1], solved[name, i], roots[name].input[i], roots[name].output[i])
        for name, i in inner
    }
    solved |= kronecker.each(backward, pairs, devices)
    return {name: [solved[name, i] for i in range(len(own))] for name, own in matrices.items()}


def _denominators(pencil: tuple[Eigenbasis, Eigenbasis], floor: Any) -> jax.Array:
    """1 − s₁ s₂ᵀ: what is left of A_ii⊗G_ii in each direction; s in [0, 1] but for rounding."""
    explained = kronecker.outer(*(jnp.clip(side.values, 0, 1) for side in pencil))
    return jnp.maximum(1 - explained, floor)


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.mT) / 2
