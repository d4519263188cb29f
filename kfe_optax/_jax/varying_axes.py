"""Which devices an array differs on: the types of `jax.shard_map` with `check_vma=True`.

There an array's type says over which axes of the mesh it varies, a cotangent must have the type of what it belongs to, and
JAX sums the cotangents of what does not vary. Under `pmap`, under `shard_map(check_vma=False)` and outside of both no array
varies as far as types know, and the functions of this module do nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import core

T = TypeVar("T")
Axes = frozenset[Hashable]


def axes_of(tree: Any) -> Axes:
    """The axes over which an array of this tree varies, or one of a type in it."""
    kinds = (
        leaf if isinstance(leaf, core.ShapedArray) else jax.typeof(leaf) for leaf in jax.tree.leaves(tree)
    )
    return frozenset().union(*map(_axes, kinds))


def over(axes: Axes, tree: T) -> T:
    """The tree, its arrays typed as varying over these axes: what is derived from them stays on its device."""

    def cast(leaf):
        missing = tuple(sorted(axes - _axes(jax.typeof(leaf)), key=str))
        return _cast(leaf, missing) if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def like(value: T, other: Any) -> T:
    """`value`, varying at least where `other` does."""
    return over(axes_of(other), value)


def zeros(shape: Any) -> jax.Array:
    """Zeros of the type that `jax.eval_shape` found."""
    return over(_axes(shape), jnp.zeros(shape.shape, shape.dtype))


def names(axis_name: Any) -> tuple[Hashable, ...]:
    """The names in an `axis_name`, which is None, a name, or several."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def named(axis_name: Any) -> Axes:
    """The axes of `axis_name` that types tell of here."""
    return frozenset() if axis_name is None else axes_of(jax.lax.axis_index(axis_name))


def _axes(kind: Any) -> Axes:
    # JAX 0.8 and 0.9 have `vma`, later releases a type of several parts.
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(kind, "vma", None) or ())


def _cast(leaf: Any, axes: tuple[Hashable, ...]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(leaf, axes, to="varying")
    return jax.lax.pvary(leaf, axes)
