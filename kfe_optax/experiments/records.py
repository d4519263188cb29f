"""Where a run's numbers go: a CSV file and TensorBoard."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple, Protocol

from tensorboardX import SummaryWriter


class Record(NamedTuple):
    """One row of ``metrics.csv``; what an optimizer does not have is an empty cell."""

    step: int  # steps taken so far
    epoch: int
    loss: float  # of the last batch, as reported
    seconds: float  # training time so far, without compilation, evaluation and checkpoints
    steps_per_second: float
    damping: float | None = None
    kl_factor: float | None = None
    last_refresh: int | None = None
    failures: int | None = None
    nonfinite: int | None = None


class Records(Protocol):
    """What the training loop asks of a recorder."""

    def write(self, record: Record) -> None: ...

    def write_final(self, measures: dict[str, float], step: int) -> None: ...


class NoRecorder:
    """The recorder of a process that leaves writing to another."""

    def __enter__(self) -> NoRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, record: Record) -> None:
        """Writes nothing."""

    def write_final(self, measures: dict[str, float], step: int) -> None:
        """Writes nothing."""


class Recorder:
    """Writes records to ``<workdir>/metrics.csv`` and to TensorBoard's files beside it.

    With ``resume_at``, rows after that step are dropped first: an interrupted run may have logged
    further than its last checkpoint, and each step belongs in the file once.

    Example::

        with Recorder(workdir) as recorder:
            recorder.write(Record(step=10, epoch=0, loss=0.3, seconds=1.0, steps_per_second=10.0))
    """

    def __init__(self, workdir: Path, resume_at: int | None = None):
        path = workdir / "metrics.csv"
        kept = _rows_up_to(path, resume_at) if resume_at is not None and path.exists() else []
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(Record._fields)
        self._rows.writerows(kept)
        self._file.flush()
        purge = None if resume_at is None else resume_at + 1
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, record: Record) -> None:
        """Appends a record and flushes it, so that a killed run keeps its history."""
        # repr of a float reads back to the same float: a resumed run can be compared bit by bit.
        self._rows.writerow("" if value is None else repr(value) for value in record)
        self._file.flush()
        for name, value in zip(record._fields, record, strict=True):
            if name not in ("step", "epoch") and value is not None and math.isfinite(value):
                self._board.add_scalar(f"train/{name}", value, record.step)

    def write_final(self, measures: dict[str, float], step: int) -> None:
        """Writes the final evaluation to TensorBoard."""
        for name, value in measures.items():
            self._board.add_scalar(f"final/{name}", value, step)


def _rows_up_to(path: Path, step: int) -> list[list[str]]:
    """The rows of an earlier run's file up to ``step``; a row cut off by a kill is dropped."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    whole = [row for row in rows if len(row) == len(Record._fields) and row[0].isdigit()]
    return [row for row in whole if int(row[0]) <= step]
