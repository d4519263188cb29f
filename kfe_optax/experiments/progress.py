"""Shows a run's progress: a live bar in a terminal, a few plain lines everywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# Lines that a run leaves in a log file or a notebook, where nothing can be redrawn.
_PLAIN_LINES = 5


class ProgressDisplay:
    """A progress bar with loss, steps per second and damping.

    Example::

        with ProgressDisplay("ekfac", total=980, console=Console()) as display:
            display.show(10, loss=0.3, steps_per_second=9.5, damping=0.01)
    """

    def __init__(self, name: str, total: int, console: Console, start: int = 0):
        self._name = name
        self._total = total
        self._console = console
        self._last_line = start
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(name, total=total, completed=start, numbers="")

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, loss: float, steps_per_second: float, damping: float | None = None) -> None:
        """Moves the bar to ``step``, or prints a line whenever a fifth of the run has passed."""
        numbers = f"loss {loss:.5f}  {steps_per_second:.1f} steps/s"
        if damping is not None:
            numbers += f"  damping {damping:.3g}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step >= self._total or step - self._last_line >= self._total / _PLAIN_LINES:
            self._last_line = step
            self._console.print(f"{self._name}  step {step}/{self._total}  {numbers}", highlight=False)
