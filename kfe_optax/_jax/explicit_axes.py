"""Meshes with Explicit axes, where an array's type says how it is divided over the devices.

What the user wrote keeps its types: the forward pass, and the pull that transposes it. All that this package adds leaves the
divisions to the compiler (`jax.sharding.auto_axes`), which reduces where the data lie. Without such a mesh these functions
do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kfe_optax._jax import static_values, varying_axes

T = TypeVar("T")

WHOLE = object()
"""In the place of an array: one that is whole on every device."""


def sharding_of(leaf: Any) -> Any:
    """The sharding in the type of an array, or in a type; None for any other value."""
    if not hasattr(leaf, "dtype"):
        return None
    kind = leaf if isinstance(leaf, core.ShapedArray) else jax.typeof(leaf)
    return getattr(kind, "sharding", None)


def mesh_of(tree: Any) -> Any:
    """The mesh with Explicit axes over which an array of this tree is typed, or None."""
    for leaf in jax.tree.leaves(tree):
        mesh = None if leaf is WHOLE else getattr(sharding_of(leaf), "mesh", None)
        if mesh is not None and AxisType.Explicit in (mesh.axis_types or ()):
            return mesh
    return None


def automatic(function: Callable[..., T], like: Any, *arguments: Any) -> T:
    """`function(*arguments)` with the divisions inside left to the compiler.

    Args:
      function: closes over no array.
      like: a tree of the results' structure, whose leaves have the results' shardings; `WHOLE` for all of them, or for one.
      *arguments: what it is called with.
    """
    mesh = mesh_of((arguments, like))
    if mesh is None:
        return function(*arguments)
    shardings = jax.tree.map(lambda leaf: _on(mesh, leaf), like)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*arguments)


def on_any_mesh(update: Callable[..., Any]) -> Callable[..., Any]:
    """The `update` of an Optax transformation, inside `automatic`: what it returns is divided as the updates and state are.

    Where the updates vary over devices by their type, so does the state, also one that was made of zeros.
    """

    @functools.wraps(update)
    def wrapped(updates, state, params=None, **extra):
        state = varying_axes.like(state, updates)
        given = (updates, state, params, extra)
        if mesh_of(given) is None:
            return update(updates, state, params, **extra)
        arrays, static = static_values.split_static(given)

        def automatic_update(arrays):
            updates, state, params, extra = static(arrays)
            return update(updates, state, params, **extra)

        return automatic(automatic_update, (updates, state), arrays)

    return wrapped


def as_typed(function: Callable[..., T], shardings: Any, *arguments: Any) -> T:
    """`function(*arguments)` where the arguments have the given shardings in their types again, inside `automatic`.

    `shardings` is a tree of the arguments' structure, or None where nothing was typed.
    """
    if shardings is None or mesh_of(arguments) is not None:
        return function(*arguments)
    return jax.sharding.explicit_axes(function, in_sharding=shardings)(*arguments)


def shardings(tree: Any) -> Any:
    """What `as_typed` needs to know of its arguments, leaf by leaf; None without a mesh of Explicit axes."""
    mesh = mesh_of(tree)
    if mesh is None:
        return None
    return tuple(_on(mesh, leaf) for leaf in jax.tree.leaves(tree))


def _on(mesh: Any, leaf: Any) -> Any:
    """A leaf's sharding. Without `jax.set_mesh`, constants that a trace makes belong to no mesh."""
    sharding = None if leaf is WHOLE else sharding_of(leaf)
    if sharding is None or sharding.mesh.empty:
        return NamedSharding(mesh, PartitionSpec())
    return sharding


def batch_axes(arrays: Any, examples: set[int]) -> Any:
    """The mesh axes over which the first axis of the batch's arrays is divided, by their types; None where it is not."""
    for leaf in jax.tree.leaves(arrays):
        if leaf.ndim and leaf.shape[0] in examples and mesh_of(leaf) is not None:
            spec = sharding_of(leaf).spec
            if spec and spec[0] is not None:
                return spec[0]
    return None


def divided(value: jax.Array, mesh: Any, axis: int, names: Any) -> jax.Array:
    """An array divided along one axis over the mesh's axes `names`."""
    spec = PartitionSpec(*(names if i == axis else None for i in range(value.ndim)))
    return jax.sharding.reshard(value, NamedSharding(mesh, spec))
