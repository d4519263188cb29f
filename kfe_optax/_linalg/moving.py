"""What is kept in a Kronecker-factored basis, carried into another one."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kfe_optax._linalg.kronecker import Eigenbasis

Pair = tuple[Eigenbasis, Eigenbasis]


def _rotations(old: Pair, new: Pair) -> Iterator[tuple[int, jax.Array]]:
    """(side, R = U_newᵀ U_old) of the sides that have vectors."""
    for side in (0, 1):
        before, after = old[side].vectors, new[side].vectors
        if before is not None and after is not None:
            yield side, after.mT @ before


def carry_second_moment(scale: jax.Array, old: Pair, new: Pair) -> jax.Array:
    """S in another basis: (R_A∘R_A) S (R_G∘R_G)ᵀ with R = U_newᵀ U_old; keeps tr S and positivity (George et al. 2018)."""
    for side, rotation in _rotations(old, new):
        squared = jnp.square(rotation)
        scale = squared @ scale if side == 0 else scale @ squared.mT
    return scale


def carry_first_moment(moment: jax.Array, old: Pair, new: Pair) -> jax.Array:
    """A matrix of the old basis in the new one: R_A m R_Gᵀ with R = U_newᵀ U_old (Vyas et al. 2024)."""
    for side, rotation in _rotations(old, new):
        moment = rotation @ moment if side == 0 else moment @ rotation.mT
    return moment


def carry_columns(moment: jax.Array, old: Pair, new: Pair) -> jax.Array:
    """A matrix whose entries go where the eigenvectors have gone, unturned (Vyas et al. 2024, in their code)."""
    for side, rotation in _rotations(old, new):
        source = jnp.argmax(jnp.abs(rotation), -1)
        index = source[..., :, None] if side == 0 else source[..., None, :]
        moment = jnp.take_along_axis(moment, index, -2 if side == 0 else -1)
    return moment
