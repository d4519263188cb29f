"""How the linear algebra of a step is divided among devices: who computes what, and how all of them come to the results.

A step that is the same on every device (replicated factors, averaged gradients) need not be computed on every device. The work is
a list of stacks; of a stack of b equal problems each of n devices takes b // n, and what remains of all stacks is dealt out by
cost, so that also a network of nothing but different shapes is divided. The results are gathered on all devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from kfe_optax._jax import varying_axes

Distribute = Literal["none", "inverses", "inverses_and_apply"]
Function = Callable[..., Any]
Stack = tuple[Any, ...]  # pytrees of arrays (b, ...)


class Devices(NamedTuple):
    """Devices that hold the same arrays and run the same step; hashable.

    Attributes:
      count: how many.
      axes: the axes that number them: of `pmap` or `shard_map`, or of the mesh.
      mesh: under a plain `jit`, the mesh in context; None inside a mapped function.
    """

    count: int = 1
    axes: tuple[Any, ...] = ()
    mesh: Any = None


ALONE = Devices()


class Division(NamedTuple):
    """Who shares which part of a step's linear algebra; hashable.

    Attributes:
      inverses: the devices that share the factorizations of a refresh.
      products: those that share the products of every step, which apply the preconditioner.
    """

    inverses: Devices = ALONE
    products: Devices = ALONE


def check_distribute(distribute: Any) -> None:
    """Raises ValueError unless it is one of `Distribute`."""
    if distribute not in get_args(Distribute):
        raise ValueError(
            "distribute must be 'none' (every device factorizes everything), 'inverses' or 'inverses_and_apply', not "
            f"{distribute!r}."
        )


def division(distribute: Distribute, axis_name: Any) -> Division:
    """The division of a step whose taps were made for `axis_name`; called where the step is traced."""
    if distribute == "none":
        return Division()
    here = present(axis_name)
    return Division(here, here if distribute == "inverses_and_apply" else ALONE)


def present(axis_name: Any = None) -> Devices:
    """The devices that take part in what is traced.

    Inside `pmap` or `shard_map` those along the axis (or the axes) `axis_name`. Under a plain `jit` all of the mesh in context
    (`jax.set_mesh`); a mesh with axes that a `shard_map` around has taken is none. Where there is neither, the device is alone.
    """
    if axis_name is not None:
        axes = varying_axes.names(axis_name)
        return Devices(math.prod(jax.lax.axis_size(axis) for axis in axes), axes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2 or AxisType.Manual in mesh.axis_types:
        return ALONE
    return Devices(mesh.size, mesh.axis_names, mesh)


def whole(tree: Any) -> Any:
    """Arrays whose type says that they are sharded (axes of a mesh of type Explicit), as arrays that are not."""

    def gathered(leaf):
        spec = jax.typeof(leaf).sharding.spec
        return leaf if all(axis is None for axis in spec) else jax.sharding.reshard(leaf, PartitionSpec())

    return jax.tree.map(gathered, tree)


def shared(devices: Devices, function: Function, stacks: Sequence[Stack]) -> list[Any]:
    """`[function(*stack) for stack in stacks]`, each device computing its share.

    Args:
      devices: who shares.
      function: pytrees of arrays (b, ...) → pytree of arrays (b, ...), problem by problem; without collectives.
      stacks: its arguments, all of a stack with the same b.

    Returns:
      The results, the same on all devices.
    """
    if devices.count == 1 or not stacks:
        return [function(*stack) for stack in stacks]
    if devices.mesh is None:
        return _shared(devices, function, stacks)
    mapped = jax.shard_map(
        lambda given: _shared(devices, function, given),
        mesh=devices.mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    return mapped(whole(list(stacks)))


def _shared(devices: Devices, function: Function, stacks: Sequence[Stack]) -> list[Any]:
    """Inside a mapped function: this device's share, by the number that it has, and then everybody's."""
    tables = rows_of(devices.count, [(_length(stack), _cost(stack)) for stack in stacks])
    index = jax.lax.axis_index(devices.axes)
    rows = [jnp.asarray(table)[index] for table in tables]
    # How many rows of each stack a device has; devices that have equally many share a branch.
    loads = [tuple(counts) for counts in np.stack([(t >= 0).sum(1) for t in tables], 1).tolist()]
    kinds = sorted(set(loads))
    branches = [lambda load=load: _computed(function, stacks, rows, load, index) for load in kinds]
    if len(kinds) == 1:
        mine = branches[0]()
    else:
        mine = jax.lax.switch(jnp.asarray([kinds.index(load) for load in loads])[index], branches)
    return [
        jax.tree.map(lambda leaf, table=table, own=own: _everybodys(leaf, table, own, devices, index), result)
        for result, table, own in zip(mine, tables, rows, strict=True)
    ]


def rows_of(count: int, stacks: Sequence[tuple[int, float]]) -> list[np.ndarray]:
    """For each stack (length, cost of a problem) a table (count, most): the rows that each device computes, then −1.

    Each device has length // count of every stack in a row; the rest goes, the most expensive first, to the device that has
    the least to do.
    """
    rows = [[[i * (b // count) + j for j in range(b // count)] for i in range(count)] for b, _ in stacks]
    rest = [(cost, s, row) for s, (b, cost) in enumerate(stacks) for row in range(b // count * count, b)]
    load = [0.0] * count
    for cost, s, row in sorted(rest, key=lambda item: -item[0]):
        owner = load.index(min(load))
        load[owner] += cost
        rows[s][owner].append(row)
    tables = []
    for own in rows:
        most = max(map(len, own))
        tables.append(np.array([r + [-1] * (most - len(r)) for r in own], np.int32).reshape(count, most))
    return tables


def _length(stack: Stack) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def _cost(stack: Stack) -> float:
    """Of one problem: 2d³ for a factor (d, d), the products' mn(m + n) for a gradient (m, n), which come first in a stack."""
    shape = jax.tree.leaves(stack)[0].shape[1:]
    return float(math.prod(shape) * sum(shape[-2:]))


def _computed(
    function: Function, stacks: Sequence[Stack], rows: Sequence[jax.Array], load: tuple[int, ...], index: Any
) -> list[Any]:
    """The results of as many rows of each stack as `load` says, with zeros up to the most that a device has."""
    results = []
    for stack, own, many in zip(stacks, rows, load, strict=True):

        def taken(of, stack=stack, own=own):
            return jax.tree.map(lambda v: v.at[own[:of]].get(mode="promise_in_bounds"), stack)

        most = own.shape[0]
        if many:
            results.append(jax.tree.map(lambda v, most=most: _padded(v, most, index), function(*taken(many))))
        else:
            shapes = jax.eval_shape(function, *jax.eval_shape(lambda taken=taken, most=most: taken(most)))
            results.append(jax.tree.map(lambda s: _zeros(s.shape, s.dtype, index), shapes))
    return results


def _padded(leaf: jax.Array, length: int, index: Any) -> jax.Array:
    missing = length - leaf.shape[0]
    return jnp.concatenate([leaf, _zeros((missing, *leaf.shape[1:]), leaf.dtype, index)]) if missing else leaf


def _zeros(shape: tuple[int, ...], dtype: Any, index: Any) -> jax.Array:
    """Zeros whose type says, as that of the results does, that they differ from device to device."""
    return varying_axes.like(jnp.zeros(shape, dtype), index)


def _everybodys(
    leaf: jax.Array, table: np.ndarray, own: jax.Array, devices: Devices, index: Any
) -> jax.Array:
    """(b, ...) on all devices, from each device's (most, ...)."""
    count, most = table.shape
    length = int(table.max()) + 1
    if count * most > 2 * length:
        # Hardly anyone has a full share: a sum moves twice the results, gathering would move mostly padding.
        numbers = leaf.astype(jnp.int32) if leaf.dtype == bool else leaf
        empty = _zeros((length, *leaf.shape[1:]), numbers.dtype, index)
        mine = empty.at[jnp.where(own < 0, length, own)].set(numbers, mode="drop")
        return jax.lax.psum(mine, devices.axes).astype(leaf.dtype)
    gathered = _all_gather(leaf, devices.axes)
    flat = gathered.reshape(count * most, *leaf.shape[1:])
    if count * most == length:
        return flat
    places = np.empty(length, np.int32)
    places[table[table >= 0]] = np.flatnonzero(table >= 0)
    return flat[places]


def _all_gather(leaf: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    """(n, ...), of a type that says that it is the same on all devices where types say such things."""
    if not varying_axes.axes_of(leaf):
        return jax.lax.all_gather(leaf, axes)
    if hasattr(jax.lax, "all_gather_invariant"):  # JAX 0.8 and 0.9
        return jax.lax.all_gather_invariant(leaf, axes)
    return jax.lax.all_gather(leaf, axes, to="invarying")
