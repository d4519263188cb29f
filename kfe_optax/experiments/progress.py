"""What the commands print: lines, tables, and a run's progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kfe_optax.experiments.records import SPLITS

# Lines that a run leaves in a log file or a notebook, where nothing can be redrawn.
_PLAIN_LINES = 5


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, highlight=False, soft_wrap=True)


def plain_table(
    title: str, caption: str | None, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    """A table with a line under its header; its first column is of words, the others are of numbers.

    Example::

        Console().print(plain_table("errors", None, ("method", "error"), [("kfac", "0.4")]))
    """
    # This padding is what fits the widest table into 80 columns.
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, caption_justify="left", padding=(0, 1, 0, 0)
    )
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        table.add_row(*row)
    return table


def measures_table(measures: Mapping[str, float], title: str) -> Table:
    """The final evaluation of one run: a row a measure, a column a set."""
    names = dict.fromkeys(name.partition("_")[2] for name in measures)
    splits = [split for split in SPLITS if f"{split}_loss" in measures]
    rows = [
        (name.replace("_", " "), *(f"{measures[f'{split}_{name}']:.5f}" for split in splits))
        for name in names
    ]
    header = {"train": "training set", "validation": "validation set", "test": "test set"}
    return plain_table(title, None, ("measure", *(header[split] for split in splits)), rows)


class ProgressDisplay:
    """A progress bar with loss, steps per second and damping; a few plain lines where there is no terminal."""

    def __init__(self, name: str, total: int, console: Console, start: int = 0):
        self._name, self._total, self._console, self._last_line = name, total, console, start
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=start, numbers="")

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, step: int, loss: float, steps_per_second: float, damping: float | None = None) -> None:
        """Moves the bar to ``step``, or prints a line whenever a fifth of the run has passed."""
        numbers = f"loss {loss:.5f}  {steps_per_second:.1f} steps/s"
        if damping is not None:
            numbers += f"  damping {damping:.3g}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step >= self._total or step - self._last_line >= self._total / _PLAIN_LINES:
            self._last_line = step
            self._console.print(f"{self._name}  step {step}/{self._total}  {numbers}", highlight=False)
