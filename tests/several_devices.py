"""One training step on several devices: under pmap, under shard_map, and under jit with a batch divided over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kfe_optax as kfe

MODES = ("pmap", "shard_map", "jit")
AXIS = "devices"
EVERYWHERE, DIVIDED = PartitionSpec(), PartitionSpec(AXIS)
# step(params, opt_state, batch, key) → (params, opt_state, loss), with `batch` a tuple of arrays of the whole batch.
Step = Callable[[Any, Any, Any, Any], tuple[Any, Any, jax.Array]]


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def train_step(
    loss_fn: Any, layers: kfe.Layers, tx: Any, axis_name: Any = None, size: float = 1.0, **options: Any
) -> Step:
    """A step like a user's; the moved parameters are those minus `size` times the update."""
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, axis_name=axis_name, **options)

    def step(params, opt_state, batch, key):
        loss, grads, taps = differentiate(params, *batch, key=key)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        updates = jax.tree.map(lambda u: size * u, updates)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def divided(mode: str, devices: int, make: Callable[[Any], Step], check_vma: bool = True) -> Step:
    """`make(axis_name)` on several devices, with the arguments and results of one."""
    if mode == "jit":
        mesh = mesh_of(devices)
        split, everywhere = NamedSharding(mesh, DIVIDED), NamedSharding(mesh, EVERYWHERE)
        return jax.jit(
            make(None),
            in_shardings=(everywhere, everywhere, split, everywhere),
            out_shardings=everywhere,
        )
    # Placed before the first call: arrays of one device would be a compilation of their own.
    everywhere, split = (NamedSharding(mesh_of(devices), spec) for spec in (EVERYWHERE, DIVIDED))
    if mode == "shard_map":
        specs = (EVERYWHERE, EVERYWHERE, DIVIDED, EVERYWHERE)
        mapped = jax.shard_map(
            make(AXIS), mesh=mesh_of(devices), in_specs=specs, out_specs=EVERYWHERE, check_vma=check_vma
        )
        return jax.jit(mapped, in_shardings=(everywhere, everywhere, split, everywhere))
    mapped = jax.pmap(
        make(AXIS), AXIS, in_axes=(None, None, 0, None), devices=jax.devices()[:devices], out_axes=None
    )

    def step(params, state, batch, key):
        parts = jax.tree.map(lambda v: v.reshape(devices, -1, *v.shape[1:]), batch)
        return mapped(*jax.device_put((params, state), everywhere), parts, key)

    return step


def run(step: Step, params: Any, opt_state: Any, batches: Any, steps: int) -> list[Any]:
    """(parameters, loss) after each step; step t takes batches(t) and the key t."""
    found = []
    for t in range(steps):
        params, opt_state, loss = step(params, opt_state, batches(t), jax.random.key(t))
        found.append(jax.device_get((params, loss)))
    return found


def difference(ours: Any, theirs: Any, start: Any) -> float:
    """max over leaves of ‖a − b‖ / ‖b − start‖: how much the two ways from `start` differ."""

    def norm(v):
        return float(np.linalg.norm(np.asarray(v, np.float64)))

    def relative(a, b, s):
        moved = norm(np.asarray(b, np.float64) - np.asarray(s, np.float64))
        return norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / moved if moved else norm(a - b)

    # Not Python's max, which a NaN can hide from.
    return float(np.max(jax.tree.leaves(jax.tree.map(relative, ours, theirs, start))))


def batches_of(x: jax.Array, y: jax.Array) -> Callable[[int], tuple[jax.Array, jax.Array]]:
    """Batch t: the examples, with noise of their own."""
    return lambda t: (x + 0.3 * jax.random.normal(jax.random.key(1000 + t), x.shape, x.dtype), np.roll(y, t))
