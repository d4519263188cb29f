"""Where a run's numbers go: a CSV file and TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

_FLUSH_SECONDS = 10
_events: Any = event_pb2  # protobuf makes its classes while it is imported


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
        # Written afresh beside the old file and then moved, so that no moment is without the rows.
        fresh = path.with_suffix(".csv.new")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Record._fields, *kept])
        fresh.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._board = _Board(workdir / "tensorboard", None if resume_at is None else resume_at + 1)

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


class _Board:
    """TensorBoard's file, written by the one who calls.

    tensorboardX's ``SummaryWriter`` leaves it to a thread: when a full disk ends that one, the caller waits for ever.
    Steps from ``purge_step`` on that earlier files hold are hidden.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        if purge_step is not None:
            self._writer.write_event(_events.Event(step=purge_step, file_version="brain.Event:2"))
            self._writer.write_event(
                _events.Event(
                    step=purge_step, session_log=_events.SessionLog(status=_events.SessionLog.START)
                )
            )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._writer.write_event(
            _events.Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value))
        )
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _rows_up_to(path: Path, step: int) -> list[list[str]]:
    """The rows of an earlier run's file up to ``step``; a row cut off by a kill is dropped."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    whole = [row for row in rows if len(row) == len(Record._fields) and row[0].isdigit()]
    return [row for row in whole if int(row[0]) <= step]
