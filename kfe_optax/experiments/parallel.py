"""Where a training step runs: on one device, on several that share each batch, in one process or in several.

All modes take the same global batch, draw the same sampled targets, and therefore make the same run, up to rounding. What
differs is who is told about the devices: under ``sharded`` nobody, because the compiler divides the program of one device;
under ``pmap`` and ``shard_map`` the loss sees a device's own examples, and averages are taken over the axis ``AXIS``. There a
batch norm normalizes by the statistics of a device's own examples, as is usual, and dropout differs from device to device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError, chosen, require

Step = Callable[[Any, Any, Any], tuple[Any, jax.Array]]
AXIS = "devices"
DISTRIBUTE = ("none", "inverses", "inverses_and_apply")
_MODES = ("one", "sharded", "pmap", "shard_map")


class Share(NamedTuple):
    """The rows of a batch that this process draws: those from ``start`` to ``stop`` of every ``of``."""

    start: int = 0
    stop: int = 1
    of: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch of this size, which ``of`` divides."""
        return slice(batch_size * self.start // self.of, batch_size * self.stop // self.of)


WHOLE = Share()


class Devices:
    """One device or several on a mesh: the batch is divided, the state is on every device.

    A *placed* state is one that the compiled step takes and returns. With ``axis_name`` the step is one device's, under
    ``jax.shard_map``, and averages over that axis. ``share`` is what of a batch this process draws.
    """

    def __init__(self, devices: Sequence[jax.Device], axis_name: str | None = None):
        # The devices of one process stand side by side.
        own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        words = f"config.devices.count is {len(devices)}, which leaves process {jax.process_index()} without a device"
        require(own, f"{words}; set it to 0.")
        self.axis_name, self.share = axis_name, Share(own[0], own[-1] + 1, len(devices))
        self.mesh = Mesh(np.array(devices), (AXIS,))
        self._everywhere = NamedSharding(self.mesh, PartitionSpec())
        self._divided = NamedSharding(self.mesh, PartitionSpec(AXIS))

    def compile(self, step: Step, state: Any, batch: Any, key: np.ndarray) -> Step:
        """Compiles ``step(state, batch, key)`` for a state and a batch of these shapes; it consumes its state."""
        everywhere, divided, share = self._everywhere, self._divided, self.share

        def of_all(rows: Any) -> jax.ShapeDtypeStruct:
            count = len(rows) * share.of // (share.stop - share.start)
            return jax.ShapeDtypeStruct((count, *rows.shape[1:]), rows.dtype)

        if self.axis_name is not None:
            specs = (everywhere.spec, divided.spec, everywhere.spec)
            step = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=everywhere.spec)
        jitted = jax.jit(
            step, donate_argnums=0, in_shardings=(everywhere, divided, everywhere), out_shardings=everywhere
        )
        # Divided linear algebra asks the context for the mesh.
        with jax.set_mesh(self.mesh):
            compiled = jitted.lower(state, jax.tree.map(of_all, batch), key).compile()
        return lambda state, batch, key: compiled(state, _put(divided, batch), key)

    def place(self, state: Any) -> Any:
        """The state on all devices."""
        return _put(self._everywhere, jax.device_get(state))

    def whole(self, state: Any) -> Any:
        """A placed state with the shapes of one device's, for a checkpoint."""
        return state

    def local(self, state: Any) -> Any:
        """A placed state as one device of this process has it, to look at or to evaluate."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), state)


class Pmapped(Devices):
    """``jax.pmap``: as under ``shard_map``, and a placed state has a leading axis of the devices."""

    def compile(self, step: Step, state: Any, batch: Any, key: np.ndarray) -> Step:
        def divided(batch: Any) -> Any:
            return jax.tree.map(lambda rows: rows.reshape(self.share.of, -1, *rows.shape[1:]), batch)

        def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.share.of, *leaf.shape), leaf.dtype)

        # One device's loss stands for all of them.
        axes: dict[str, Any] = {
            "in_axes": (0, 0, None),
            "out_axes": (0, None),
            "devices": list(self.mesh.devices),
        }
        mapped = jax.pmap(step, AXIS, donate_argnums=0, **axes)
        compiled = mapped.lower(jax.tree.map(stacked, state), divided(batch), key).compile()
        return lambda state, batch, key: compiled(state, divided(batch), key)

    def place(self, state: Any) -> Any:
        copies = jax.pmap(lambda _, state: state, in_axes=(0, None), devices=list(self.mesh.devices))
        return copies(np.arange(self.share.of), jax.device_get(state))

    def whole(self, state: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], state)

    local = whole


def _put(sharding: NamedSharding, arrays: Any) -> Any:
    """This process's part of ``arrays`` as arrays of all processes."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), arrays)


def make_devices(config: ConfigDict) -> Devices:
    """The devices that ``config.devices`` describes; one without it."""
    settings = config.get("devices", ConfigDict({"mode": "one", "count": 0}))
    mode, count = chosen("config.devices.mode", settings.mode, _MODES), settings.count
    chosen("config.devices.distribute", settings.get("distribute", "none"), DISTRIBUTE)
    # In the order of the processes, so that the rows of one process lie side by side.
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    words = f"config.devices.count is {count}"
    several = "set the mode to 'sharded', 'pmap' or 'shard_map' to use several devices"
    require(mode != "one" or count <= 1, f"{words} and config.devices.mode is 'one'; {several}.")
    at_most = "set it to at most as many, or to 0 for all of them"
    require(0 <= count <= len(found), f"{words} and there are {len(found)} devices; {at_most}.")
    others = "which here runs in one process; set it to 'sharded' or 'shard_map' for several"
    require(mode != "pmap" or jax.process_count() == 1, f"config.devices.mode is 'pmap', {others}.")
    used = found[: 1 if mode == "one" else count or None]
    kind = Pmapped if mode == "pmap" else Devices
    return kind(used, AXIS if mode in ("pmap", "shard_map") else None)


def refuse_processes(config: ConfigDict, command: str) -> None:
    """Refuses several processes for a command that runs in one."""
    words = f"config.distributed is set, and '{command}' runs in one process; several are for 'train'."
    require(not config.get("distributed", False), words)


def check_divisible(devices: Devices, batch_size: int) -> None:
    """Refuses a batch that the devices cannot share evenly."""
    count = devices.share.of
    words = f"A batch has {batch_size} examples, which {count} devices cannot share evenly"
    advice = f"make config.batch_size a multiple of {count}, or set config.devices.count"
    require(batch_size % count == 0, f"{words}; {advice}.")


def join_processes(config: ConfigDict) -> None:
    """Joins the processes of ``config.distributed``, before any device is touched.

    ``config.cluster`` holds the coordinator's address ``host:port``, this process's number and how many there are. What is
    left out comes from the cluster's environment (Slurm, Open MPI, Kubernetes, TPU pods).
    """
    if not config.get("distributed", False) or jax.distributed.is_initialized():
        return
    mode, cluster = config.devices.mode, config.cluster
    words = f"config.distributed is set and config.devices.mode is '{mode}'; set the mode to 'sharded' or 'shard_map'"
    require(mode in ("sharded", "shard_map"), f"{words}, which several processes can share.")
    number, count = cluster.process_id, cluster.num_processes
    words = f"config.cluster.process_id is {number} of config.cluster.num_processes {count}"
    require(not cluster.coordinator or 0 <= number < count, f"{words}; the processes are numbered from 0.")
    try:
        jax.distributed.initialize(
            cluster.coordinator or None, count or None, number if number >= 0 else None
        )
    except ValueError as error:
        words = f"config.distributed is set and the cluster's environment does not say all ({str(error).rstrip('.')})"
        fields = "config.cluster.coordinator, config.cluster.process_id and config.cluster.num_processes"
        raise ExperimentError(f"{words}; set {fields}.") from error


def writes() -> bool:
    """Whether this process is the one that talks and writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them call this at the same time."""
    return (
        flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))
    )
