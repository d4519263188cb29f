"""Where a training step runs: on one device, or on several that share each batch.

All modes take the same global batch, draw the same sampled targets, and therefore make the same run, up to rounding. What
differs is who is told about the devices: under ``sharded`` nobody, because the compiler divides the program of one device;
under ``pmap`` and ``shard_map`` the loss sees a device's own examples, and averages are taken over the axis ``AXIS``. There a
batch norm normalizes by the statistics of a device's own examples, as is usual, and dropout differs from device to device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError

T = TypeVar("T")
Step = Callable[[Any, Any, Any], tuple[Any, jax.Array]]

AXIS = "devices"
MODES = ("one", "sharded", "pmap", "shard_map")
DISTRIBUTE = ("none", "inverses", "inverses_and_apply")


class Share(NamedTuple):
    """The rows of a batch that this process draws: those from ``start`` to ``stop`` of every ``of``."""

    start: int = 0
    stop: int = 1
    of: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch of this size, which ``of`` divides."""
        return slice(batch_size * self.start // self.of, batch_size * self.stop // self.of)

    def count(self, batch_size: int) -> int:
        """How many rows they are."""
        return len(range(batch_size)[self.rows(batch_size)])


WHOLE = Share()


class Devices(Protocol):
    """How a step is compiled for some devices, and where its arguments lie.

    A *placed* state is one that the compiled step takes and returns.
    """

    @property
    def axis_name(self) -> str | None:
        """The mapped axis over which the step averages, None where there is none."""
        ...

    @property
    def share(self) -> Share:
        """What of a batch this process draws."""
        ...

    def compile(self, step: Step, state: Any, batch: Any, key: np.ndarray) -> Step:
        """Compiles ``step(state, batch, key)`` for a state and a batch of these shapes; it consumes its state."""
        ...

    def place(self, state: T) -> T:
        """The state on all devices."""
        ...

    def whole(self, state: T) -> T:
        """A placed state with the shapes of one device's, for a checkpoint."""
        ...

    def local(self, state: T) -> T:
        """A placed state as one device of this process has it, to look at or to evaluate."""
        ...


def make_devices(config: ConfigDict) -> Devices:
    """The devices that ``config.devices`` describes; one without it.

    Example::

        config.devices.mode = "sharded"
        make_devices(config)
    """
    settings = config.get("devices", ConfigDict({"mode": "one", "count": 0}))
    if settings.mode not in MODES:
        raise ExperimentError(f"config.devices.mode is '{settings.mode}'; choose one of {', '.join(MODES)}.")
    if settings.mode == "one":
        if settings.count > 1:
            raise ExperimentError(
                f"config.devices.count is {settings.count} and config.devices.mode is 'one'; set the mode to 'sharded', "
                "'pmap' or 'shard_map' to use several devices."
            )
        return OneDevice()
    # In the order of the processes, so that the rows of one process lie side by side.
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if not 0 <= settings.count <= len(found):
        raise ExperimentError(
            f"config.devices.count is {settings.count} and there are {len(found)} devices; set it to at most as many, or to 0 "
            "for all of them."
        )
    chosen = found[: settings.count or None]
    return {"sharded": Sharded, "pmap": Pmapped, "shard_map": ShardMapped}[settings.mode](chosen)


def distribution(config: ConfigDict) -> str:
    """``config.devices.distribute``, checked: which linear algebra the devices divide among themselves."""
    found = config.get("devices", {}).get("distribute", "none")
    if found not in DISTRIBUTE:
        raise ExperimentError(
            f"config.devices.distribute is '{found}'; choose one of {', '.join(DISTRIBUTE)}."
        )
    return found


def refuse_devices(config: ConfigDict, command: str) -> None:
    """Refuses several devices for a command that runs on one."""
    mode = config.get("devices", {}).get("mode", "one")
    if mode != "one":
        raise ExperimentError(
            f"config.devices.mode is '{mode}', and '{command}' runs on one device; set --config.devices.mode=one for it."
        )
    refuse_processes(config, command)


def refuse_processes(config: ConfigDict, command: str) -> None:
    """Refuses several processes for a command that runs in one."""
    if config.get("distributed", False):
        raise ExperimentError(
            f"config.distributed is set, and '{command}' runs in one process; several are for 'train'."
        )


def check_divisible(devices: Devices, batch_sizes: Sequence[int]) -> None:
    """Refuses batches that the devices cannot share evenly."""
    count = devices.share.of
    for size in batch_sizes:
        if size % count:
            raise ExperimentError(
                f"A batch has {size} examples, which {count} devices cannot share evenly; make config.batch_size, and every "
                f"size of config.batch_growth, a multiple of {count}, or set config.devices.count."
            )


class OneDevice:
    """The first device; everything is as JAX does it by itself."""

    axis_name = None
    share = WHOLE

    def compile(self, step: Step, state: Any, batch: Any, key: np.ndarray) -> Step:
        return jax.jit(step, donate_argnums=0).lower(state, batch, key).compile()

    def place(self, state: T) -> T:
        return state

    whole = local = place


class Sharded:
    """``jax.jit`` over a mesh: the batch is divided, parameters and state are on every device."""

    axis_name: str | None = None

    def __init__(self, devices: Sequence[jax.Device]):
        self.share = _share(devices)
        self.mesh = Mesh(np.array(devices), (AXIS,))
        self._everywhere = NamedSharding(self.mesh, PartitionSpec())
        self._divided = NamedSharding(self.mesh, PartitionSpec(AXIS))

    def compile(self, step: Step, state: Any, batch: Any, key: np.ndarray) -> Step:
        jitted = jax.jit(
            self._mapped(step),
            in_shardings=(self._everywhere, self._divided, self._everywhere),
            out_shardings=(self._everywhere, self._everywhere),
            donate_argnums=0,
        )
        # Divided linear algebra asks the context for the mesh.
        with jax.set_mesh(self.mesh):
            compiled = jitted.lower(_shapes(state), _shapes(batch, self.share), key).compile()

        def run(state: Any, batch: Any, key: Any) -> tuple[Any, jax.Array]:
            return compiled(state, _put(self._divided, batch), key)

        return run

    def _mapped(self, step: Step) -> Step:
        return step

    def place(self, state: T) -> T:
        return _put(self._everywhere, jax.device_get(state))

    def whole(self, state: T) -> T:
        return state

    def local(self, state: T) -> T:
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), state)


class ShardMapped(Sharded):
    """``jax.shard_map`` over a mesh: the step is one device's, with its part of the batch."""

    axis_name = AXIS

    def _mapped(self, step: Step) -> Step:
        everywhere, divided = PartitionSpec(), PartitionSpec(AXIS)
        return jax.shard_map(
            step, mesh=self.mesh, in_specs=(everywhere, divided, everywhere), out_specs=everywhere
        )


class Pmapped:
    """``jax.pmap``: as ``shard_map``, and a placed state has a leading axis of the devices."""

    axis_name = AXIS

    def __init__(self, devices: Sequence[jax.Device]):
        if jax.process_count() > 1:
            raise ExperimentError(
                "config.devices.mode is 'pmap', which here runs in one process; set it to 'sharded' or 'shard_map' for several."
            )
        self.share = Share(0, len(devices), len(devices))
        self._devices = devices

    def compile(self, step: Step, state: Any, batch: Any, key: np.ndarray) -> Step:
        mapped = jax.pmap(
            step,
            AXIS,
            in_axes=(0, 0, None),
            # One device's loss stands for all of them.
            out_axes=(0, None),
            devices=self._devices,
            donate_argnums=0,
        )
        stacked = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((self.share.of, *leaf.shape), leaf.dtype), state
        )
        compiled = mapped.lower(stacked, self._divided(batch), key).compile()

        def run(state: Any, batch: Any, key: Any) -> tuple[Any, jax.Array]:
            return compiled(state, self._divided(batch), key)

        return run

    def _divided(self, batch: Any) -> Any:
        return jax.tree.map(lambda rows: rows.reshape(self.share.of, -1, *rows.shape[1:]), batch)

    def place(self, state: T) -> T:
        copies = jax.pmap(lambda _, state: state, in_axes=(0, None), devices=self._devices)
        return copies(np.arange(self.share.of), jax.device_get(state))

    def whole(self, state: T) -> T:
        return jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], state)

    local = whole


def _share(devices: Sequence[jax.Device]) -> Share:
    """What of a batch belongs to this process, whose devices stand side by side."""
    own = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
    if not own:
        raise ExperimentError(
            f"config.devices.count is {len(devices)}, which leaves process {jax.process_index()} without a device; set it to 0."
        )
    return Share(own[0], own[-1] + 1, len(devices))


def _put(sharding: NamedSharding, arrays: T) -> T:
    """This process's part of ``arrays`` as arrays of all processes."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), arrays)


def _shapes(arrays: Any, share: Share | None = None) -> Any:
    """The shapes of ``arrays``, of which rows were given for ``share`` of a batch."""

    def shape(array: Any) -> jax.ShapeDtypeStruct:
        rows = array.shape
        if share is not None:
            rows = (rows[0] * share.of // (share.stop - share.start), *rows[1:])
        return jax.ShapeDtypeStruct(rows, array.dtype)

    return jax.tree.map(shape, arrays)
