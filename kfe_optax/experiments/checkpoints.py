"""Checkpoints with Orbax: the train state, and beside it what a resumed run must agree on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import TrainState
from kfe_optax.experiments.optimizers import METHODS

# Settings that say how long a run is, what it writes, on which devices it runs, and where its data lie
# (the data themselves are compared); all others fix its trajectory.
_FREE_FIELDS = (
    "steps",
    "log_every",
    "checkpoint_every",
    "compare",
    "sweep",
    "diagnose",
    "title",
    "data_dir",
    "devices",
    "distributed",
    "cluster",
)


class Restored(NamedTuple):
    """What a checkpoint gives back: the state, and the training seconds spent up to it."""

    state: TrainState
    step: int
    seconds: float


class Checkpoints:
    """The checkpoints of one run, in ``<workdir>/checkpoints/<step>``; the last two are kept.

    Writes are synchronous and atomic: a checkpoint that is listed is whole, whatever interrupted
    the program. Several processes call every method together, and write each array once.

    Example::

        with Checkpoints(workdir, config, dataset.fingerprint()) as checkpoints:
            checkpoints.save(step, state, seconds)
    """

    def __init__(self, workdir: Path, config: ConfigDict, data_fingerprint: int):
        self._config = _trajectory_settings(config)
        self._data_fingerprint = data_fingerprint
        self._seed = config.seed
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, seconds: float) -> None:
        """Writes a checkpoint unless the newest one is of this very step."""
        if step == self.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                run=ocp.args.JsonSave(
                    {
                        "seed": self._seed,
                        "seconds": seconds,
                        "config": self._config,
                        "data_fingerprint": self._data_fingerprint,
                    }
                ),
            ),
        )

    def restore(self, like: TrainState) -> Restored:
        """Reads the newest checkpoint into the structure of ``like``, onto the devices on which that lies.

        Refuses when the data or a setting that fixes the trajectory has changed: continuing would
        give a run that no single config describes.
        """
        step = self.latest_step()
        if step is None:
            raise ExperimentError("There is no checkpoint to continue from; start the run without --resume.")
        # The record first: a changed model or optimizer would not fit the arrays.
        items = ocp.args.Composite(run=ocp.args.JsonRestore())
        run = self._manager.restore(step, args=items)["run"]
        _refuse_changes(run["config"], self._config)
        if run["data_fingerprint"] != self._data_fingerprint:
            raise ExperimentError(
                "The checkpoint was made with other training images; point config.data_dir at the "
                "same data, or start afresh in another --workdir."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self._manager.restore(step, args=items)["state"]
        return Restored(state, step, run["seconds"])


def _trajectory_settings(config: ConfigDict) -> dict[str, Any]:
    """The settings that fix a run's trajectory, as JSON gives them back (tuples become lists)."""
    fields = json.loads(json.dumps(config.to_dict()))
    other_optimizers = METHODS.keys() - {config.optimizer}
    return {
        name: value
        for name, value in fields.items()
        if name not in _FREE_FIELDS and name not in other_optimizers
    }


def _refuse_changes(saved: dict[str, Any], current: dict[str, Any], prefix: str = "config") -> None:
    for name in sorted(saved.keys() | current.keys()):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_changes(old, new, f"{prefix}.{name}")
        elif old != new:
            raise ExperimentError(
                f"The checkpoint was made with {prefix}.{name} = {old!r}, and it is {new!r} now; "
                "resume with the same settings, or start afresh in another --workdir."
            )
