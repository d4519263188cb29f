"""Shows a run's progress: a live bar in a terminal, a few plain lines everywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# Lines that a run leaves in a log file or a notebook, where nothing can be redrawn.
_PLAIN_LINES = 5


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, highlight=False, soft_wrap=True)


class ProgressDisplay:
    """A progress bar with loss, steps per second and damping."""

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
