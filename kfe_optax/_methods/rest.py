"""The parameters outside the layers, and what an inner transformation (theirs, or that of `in_kfe`) may put into the state."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax._layers.layers import Layers
from kfe_optax._layers.paths import Path, path_name

T = TypeVar("T")


def sound(updates: T, new: Any, old: Any) -> tuple[T, Any, jax.Array]:
    """What an inner transformation returned without what is not finite, and whether there was any such number.

    A state that is no longer finite is not taken at all, nor is its update; else numbers of the update that are not are zero.
    """

    def lost(before, after):
        if not jnp.issubdtype(jnp.result_type(after), jnp.inexact):
            return jnp.zeros((), bool)
        # What was infinite before, such as the best loss so far, may stay so.
        return jnp.any(jnp.isfinite(before) & ~jnp.isfinite(after))

    spoilt = _any(jax.tree.map(lost, old, new))
    bad = spoilt | _any(jax.tree.map(lambda leaf: ~jnp.isfinite(leaf).all(), updates))
    kept = jax.tree.map(lambda a, b: jnp.where(spoilt, b, a), new, old)
    return jax.tree.map(lambda leaf: jnp.where(~spoilt & jnp.isfinite(leaf), leaf, 0), updates), kept, bad


def _any(flags: Any) -> jax.Array:
    leaves = jax.tree.leaves(flags)
    return jnp.stack(leaves).any() if leaves else jnp.zeros((), bool)


def outside(layers: Layers, leaves: dict[Path, jax.Array]) -> dict[str, jax.Array]:
    """The leaves outside the layers in float32 at least: in float16 Adam's ε of 1e-8 is zero, and small squares are."""
    return {path_name(path): _wide(leaves[path]) for path in layers.rest if path in leaves}


def _wide(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    wide = jnp.promote_types(dtype, jnp.float32)
    return leaf if dtype == wide or not jnp.issubdtype(dtype, jnp.inexact) else jnp.asarray(leaf, wide)
