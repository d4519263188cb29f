"""Checkpoints with Orbax: the train state, and beside it what a resumed run must agree on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from kfe_optax.experiments.checksums import find_damage, write_checksums
from kfe_optax.experiments.errors import ExperimentError, require
from kfe_optax.experiments.job import TrainState
from kfe_optax.experiments.optimizers import METHODS
from kfe_optax.experiments.parallel import any_process, writes

# Settings that say how long a run is, what it writes, on which devices it runs, and where its data lie
# (the data themselves are compared); all others fix its trajectory.
_FREE_FIELDS = {
    *("steps", "log_every", "checkpoint_every", "evaluate_every", "evaluate_examples", "title", "data_dir"),
    *("compare", "sweep", "diagnose", "devices", "distributed", "cluster"),
}


class Restored(NamedTuple):
    """What a checkpoint gives back: the state, and the training seconds spent up to it.

    ``damaged`` says of newer checkpoints why they were not taken, and where they are now.
    """

    state: TrainState
    step: int
    seconds: float
    damaged: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run, in ``<workdir>/checkpoints/<step>``; the last two are kept.

    Writes are synchronous and atomic: a checkpoint that is listed was whole, whatever interrupted
    the program, and checksums tell whether it still is. Several processes call every method together, and write each array once.
    """

    def __init__(self, workdir: Path, config: ConfigDict, data_fingerprint: int):
        # The settings that fix the trajectory, as JSON gives them back (tuples become lists).
        others = _FREE_FIELDS | (METHODS.keys() - {config.optimizer})
        fields = json.loads(json.dumps(config.to_dict()))
        self._run: dict[str, Any] = {
            "config": {name: value for name, value in fields.items() if name not in others},
            "data_fingerprint": data_fingerprint,
        }
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
            if writes():
                write_checksums(self._folder / str(step))
        except Exception as error:  # a full disk is of another class from library to library
            words = (
                f"The checkpoint of step {step} cannot be written to '{self._folder}' ({_in_short(error)})"
            )
            raise ExperimentError(
                f"{words}; the earlier ones stand: make room, and continue with --resume."
            ) from error

    def restore(self, like: TrainState) -> Restored:
        """Reads the newest whole checkpoint into the structure of ``like``, onto the devices on which that lies.

        Damaged ones are put aside, so that the run writes theirs again. Refuses when the data or a setting that
        fixes the trajectory has changed: continuing would give a run that no single config describes.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            damage = find_damage(self._folder / str(step))
            if damage is not None:
                damaged[step] = damage
                continue
            # The record first: a changed model or optimizer would not fit the arrays.
            run = self._read(step, run=ocp.args.JsonRestore())
            _refuse_changes(run["config"], self._run["config"])
            words = (
                "The checkpoint was made with other training images; point config.data_dir at the same data"
            )
            same = run["data_fingerprint"] == self._run["data_fingerprint"]
            require(same, f"{words}, or start afresh in another --workdir.")
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            state = self._read(step, state=ocp.args.StandardRestore(abstract))
            if int(state.step) != step:  # a folder under another's name
                damaged[step] = f"it holds step {int(state.step)}"
                continue
            return Restored(state, step, run["seconds"], self._put_aside(damaged))
        require(damaged, "There is no checkpoint to continue from; start the run without --resume.")
        step, damage = max(damaged.items())
        words = f"No checkpoint in '{self._folder}' is whole (of that of step {step}, {damage})"
        raise ExperimentError(
            f"{words}; restore the folder from a copy, or start afresh in another --workdir."
        )

    def _read(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint whose files are as they were written."""
        try:
            (found,) = self._manager.restore(step, args=ocp.args.Composite(**item)).values()
        except Exception as error:
            words = (
                f"The checkpoint of step {step} in '{self._folder}' is whole and does not fit this program"
            )
            advice = "continue with the versions that wrote it, or start afresh in another --workdir"
            raise ExperimentError(f"{words} ({_in_short(error)}); {advice}.") from error
        return found

    def _put_aside(self, damaged: dict[int, str]) -> tuple[str, ...]:
        """Moves damaged checkpoints out of the list; what became of them in words."""
        said, parent = [], self._folder.parent
        for step, damage in damaged.items():
            any_process(False)  # waits for all: who still looks for damage, or counts, shall find the same
            before = len(list(parent.glob(f"damaged_checkpoint_{step}*")))
            target = parent / f"damaged_checkpoint_{step}{f'_{before + 1}' if before else ''}"
            any_process(False)
            if writes():
                (self._folder / str(step)).rename(target)
            said.append(f"the checkpoint of step {step} ({damage}), now '{target}'")
        any_process(False)
        self._manager.reload()
        return tuple(said)


def _in_short(error: Exception) -> str:
    """The first line of an exception's message, of which Orbax and TensorStore write many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


def _refuse_changes(saved: dict[str, Any], current: dict[str, Any], prefix: str = "config") -> None:
    for name in sorted(saved.keys() | current.keys()):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_changes(old, new, f"{prefix}.{name}")
            continue
        words = f"The checkpoint was made with {prefix}.{name} = {old!r}, and it is {new!r} now"
        require(old == new, f"{words}; resume with the same settings, or start afresh in another --workdir.")
