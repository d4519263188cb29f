"""The CSV file of a sweep: one row a trial, written as the trials end, and read again to resume."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.optimizers import METHODS
from kfe_optax.experiments.sweep_program import Losses
from kfe_optax.experiments.sweep_space import Trial

_DIVERGED, _FINISHED = "diverged", "finished"
# What a resumed sweep may change: where things lie, how they are written, and how many settings a
# random search draws, of which the first ones stay the same.
_FREE_FIELDS = ("title", "log_every", "checkpoint_every", "compare", "diagnose", "data_dir")
_FREE_SWEEP_FIELDS = ("chunk", "trials")


class Row(NamedTuple):
    """One trial with its result."""

    trial: Trial
    losses: Losses

    @property
    def diverged(self) -> bool:
        """Whether the final loss of either set is not finite."""
        return not (math.isfinite(self.losses.train_loss) and math.isfinite(self.losses.test_loss))


class SweepRecords:
    """``<workdir>/sweep.csv``, with ``sweep.json`` beside it, which says what sweep it belongs to.

    ``rows`` are the trials that are already there. A row that a kill cut off is dropped.

    Example::

        with SweepRecords(workdir, config, fields, dataset.fingerprint(), resume=True) as records:
            records.write([Row(trial, losses)])
    """

    def __init__(
        self, workdir: Path, config: ConfigDict, fields: Sequence[str], data_fingerprint: int, *, resume: bool
    ):
        path, identity_path = workdir / "sweep.csv", workdir / "sweep.json"
        identity = _identity(config, data_fingerprint)
        self._fields = tuple(fields)
        self.rows: list[Row] = []
        if path.exists():
            if not resume:
                raise ExperimentError(
                    f"'{workdir}' already holds a sweep; add --resume to continue it, or choose another --workdir."
                )
            _refuse_changes(identity_path, identity)
            self.rows = self._read(path)
        identity_path.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        # Written afresh beside the old file and then moved, so that no moment is without the rows.
        fresh = path.with_suffix(".csv.new")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(self._header())
            rows.writerows(self._cells(row) for row in self.rows)
        fresh.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")

    def __enter__(self) -> SweepRecords:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, rows: Sequence[Row]) -> None:
        """Appends the rows of a chunk and flushes them."""
        csv.writer(self._file).writerows(self._cells(row) for row in rows)
        self._file.flush()
        self.rows.extend(rows)

    def _header(self) -> list[str]:
        return ["trial", *self._fields, "seed", "outcome", *Losses._fields]

    def _cells(self, row: Row) -> list[str]:
        index, values, seed = row.trial
        outcome = _DIVERGED if row.diverged else _FINISHED
        # repr of a float reads back to the same float.
        return [str(index), *map(repr, values), str(seed), outcome, *map(repr, row.losses)]

    def _read(self, path: Path) -> list[Row]:
        with path.open(newline="", encoding="utf-8") as file:
            lines = file.readlines()
        # A last line without its end was cut off, and might still read as a shorter number.
        cells = list(csv.reader(line for line in lines if line.endswith("\n")))
        header, width = self._header(), len(self._fields)
        if cells and cells[0] != header:
            raise ExperimentError(
                f"'{path}' has the columns {', '.join(cells[0])} and this sweep writes {', '.join(header)}; "
                "choose another --workdir."
            )
        return [
            Row(
                Trial(int(row[0]), tuple(map(float, row[1 : 1 + width])), int(row[1 + width])),
                Losses(*map(float, row[3 + width :])),
            )
            for row in cells[1:]
            if len(row) == len(header)
        ]


def _identity(config: ConfigDict, data_fingerprint: int) -> dict[str, Any]:
    """All that fixes the trials and their results, flat, as JSON gives it back."""
    fields = json.loads(json.dumps(config.to_dict()))
    kept = {
        name: value
        for name, value in fields.items()
        if name not in _FREE_FIELDS and (name == config.optimizer or name not in METHODS)
    }
    kept["sweep"] = {name: value for name, value in kept["sweep"].items() if name not in _FREE_SWEEP_FIELDS}
    return {"config": _flat(kept, "config"), "data_fingerprint": data_fingerprint}


def _flat(fields: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = f"{prefix}.{name}"
        found |= _flat(value, inner) if isinstance(value, dict) else {inner: value}
    return found


def _refuse_changes(path: Path, identity: dict[str, Any]) -> None:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved_config, saved_data = saved["config"], saved["data_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"'{path}', which says what sweep the CSV file belongs to, is missing or damaged; choose "
            "another --workdir."
        ) from error
    current = identity["config"]
    for name in sorted(saved_config.keys() | current.keys()):
        old, new = saved_config.get(name), current.get(name)
        if old != new:
            raise ExperimentError(
                f"The sweep in '{path.parent}' was made with {name} = {old!r}, and it is {new!r} now; resume "
                "with the same settings, or start afresh in another --workdir."
            )
    if saved_data != identity["data_fingerprint"]:
        raise ExperimentError(
            f"The sweep in '{path.parent}' was made with other training images; point config.data_dir at the "
            "same data, or start afresh in another --workdir."
        )
