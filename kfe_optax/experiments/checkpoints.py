"""Checkpoints with Orbax: the train state, and beside it what a resumed run must agree on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError, require
from kfe_optax.experiments.job import TrainState
from kfe_optax.experiments.optimizers import METHODS

# Settings that say how long a run is, what it writes, on which devices it runs, and where its data lie
# (the data themselves are compared); all others fix its trajectory.
_FREE_FIELDS = {
    *("steps", "log_every", "checkpoint_every", "evaluate_every", "evaluate_examples", "title", "data_dir"),
    *("compare", "sweep", "diagnose", "devices", "distributed", "cluster"),
}


def identity(config: ConfigDict, data_fingerprint: int) -> dict[str, Any]:
    """The settings and the data that fix the trajectory, as JSON gives them back (tuples become lists)."""
    others = _FREE_FIELDS | (METHODS.keys() - {config.optimizer})
    fields = json.loads(json.dumps(config.to_dict()))
    own = {name: value for name, value in fields.items() if name not in others}
    return {"config": own, "data_fingerprint": data_fingerprint}


def refuse_changes(what: str, saved: Any, current: Any, place: str = "") -> None:
    """Refuses to continue what was made with another identity: no single config would describe it."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in sorted(saved.keys() | current.keys()):
            refuse_changes(what, saved.get(name), current.get(name), f"{place}.{name}".lstrip("."))
        return
    was = f"{place} = {saved!r}, and it is {current!r} now"
    was = "other training images" if place == "data_fingerprint" else was
    advice = "resume with the same settings and data, or start afresh in another --workdir"
    require(saved == current, f"The {what} was made with {was}; {advice}.")


class Checkpoints:
    """The checkpoints of one run, in ``<workdir>/checkpoints/<step>``; the last two are kept.

    Writes are synchronous and atomic: a checkpoint that is listed was whole, whatever interrupted
    the program. Several processes call every method together, and write each array once.
    """

    def __init__(self, workdir: Path, config: ConfigDict, data_fingerprint: int):
        self._run = identity(config, data_fingerprint)
        self._folder = (workdir / "checkpoints").absolute()
        self._folder.mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

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
        run = ocp.args.JsonSave(self._run | {"seconds": seconds})
        try:
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=run))
        except Exception as error:  # a full disk is of another class from library to library
            words = (
                f"The checkpoint of step {step} cannot be written to '{self._folder}' ({_in_short(error)})"
            )
            advice = "the earlier ones stand: make room, and continue with --resume"
            raise ExperimentError(f"{words}; {advice}.") from error

    def restore(self, like: TrainState) -> tuple[TrainState, int, float]:
        """The newest state in the structure of ``like``, on the devices on which that lies, its step and its seconds.

        Raises:
          ExperimentError: the data or a setting that fixes the trajectory has changed, or it cannot be read.
        """
        step = self.latest_step()
        if step is None:
            raise ExperimentError("There is no checkpoint to continue from; start the run without --resume.")
        # The record first: a changed model or optimizer would not fit the arrays.
        run = self._read(step, run=ocp.args.JsonRestore())
        refuse_changes("checkpoint", {name: run[name] for name in self._run}, self._run)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._read(step, state=ocp.args.StandardRestore(abstract))
        words = (
            f"The checkpoint '{self._folder / str(step)}' holds step {int(state.step)}; remove that folder."
        )
        require(int(state.step) == step, words)
        return state, step, run["seconds"]

    def _read(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint."""
        try:
            (found,) = self._manager.restore(step, args=ocp.args.Composite(**item)).values()
        except Exception as error:
            words = f"The checkpoint '{self._folder / str(step)}' is damaged or does not fit this program"
            advice = (
                "remove it, and --resume takes the one before, or continue with the versions that wrote it"
            )
            raise ExperimentError(f"{words} ({_in_short(error)}); {advice}.") from error
        return found


def _in_short(error: Exception) -> str:
    """The first line of an exception's message, of which Orbax and TensorStore write many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
