"""Where a run's numbers go: a CSV file and TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

_FLUSH_SECONDS = 10
_events: Any = event_pb2  # protobuf makes its classes while it is imported

# What was measured after a step; what is not known is an empty cell.
Row = Mapping[str, float | int]
SPLITS = ("train", "validation", "test")
FIELDS = (
    "step",  # steps taken so far
    "epoch",  # passes over the training set so far
    "seconds",  # of training so far, without compilation, evaluation and checkpoints
    "steps_per_second",
    "loss",  # of the last batch
    # Of `config.evaluate_examples` training images, and of all validation and test images.
    *(f"{split}_{measure}" for split in SPLITS for measure in ("loss", "accuracy", "squared_error")),
    # What `kfe.info` tells.
    *("damping", "kl_factor", "last_refresh", "failures", "nonfinite"),
)


class Recorder:
    """Writes rows to ``<workdir>/metrics.csv`` and to TensorBoard's files beside it.

    With ``resume_at``, rows after that step are dropped first: an interrupted run may have logged
    further than its last checkpoint, and each step belongs in the file once.
    """

    def __init__(self, workdir: Path, resume_at: int | None = None):
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.csv"
        kept = _rows_up_to(path, resume_at) if resume_at is not None and path.exists() else []
        # Written afresh beside the old file and then moved, so that no moment is without the rows.
        fresh = path.with_suffix(".csv.new")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([FIELDS, *kept])
        fresh.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, FIELDS)
        # tensorboardX's ``SummaryWriter`` leaves writing to a thread: when a full disk ends that one, the caller waits
        # for ever.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._flushed = time.monotonic()
        if resume_at is not None:  # later steps that earlier files hold are hidden
            start = _events.SessionLog(status=_events.SessionLog.START)
            self._board.write_event(_events.Event(step=resume_at + 1, file_version="brain.Event:2"))
            self._board.write_event(_events.Event(step=resume_at + 1, session_log=start))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # An error that is on its way says more than that these files cannot be closed either.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            try:
                self._file.close()
            finally:
                self._board.close()

    def write(self, row: Row) -> None:
        """Appends a row and flushes it, so that a killed run keeps its history."""
        # A float reads back to the same float, so that runs can be compared bit by bit.
        self._rows.writerow(row)
        self._file.flush()
        self.show("run", {name: value for name, value in row.items() if name != "step"}, int(row["step"]))

    def show(self, group: str, values: Row, step: int) -> None:
        """Writes values to TensorBoard alone, as ``group/name``."""
        for name, value in values.items():
            if math.isfinite(value):
                found = summary.scalar(f"{group}/{name}", value)
                self._board.write_event(_events.Event(wall_time=time.time(), step=step, summary=found))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._board.flush()
            self._flushed = time.monotonic()


def _rows_up_to(path: Path, step: int) -> list[list[str]]:
    """The rows of an earlier run's file up to ``step``; a row cut off by a kill is dropped."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [row for row in rows if len(row) == len(FIELDS) and row[0].isdigit() and int(row[0]) <= step]
