"""What a comparison knows of its runs and shows of them: the mean and the deviation over seeds, a table, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from rich.table import Table

from kfe_optax.experiments.progress import plain_table
from kfe_optax.experiments.records import SPLITS, Row

# The optimizer that everyone knows, against which the others' speed is stated.
_REFERENCE = "adam"
# Okabe and Ito's palette, which color-blind readers can tell apart; dashes and markers tell the curves apart in black
# and white.
_STYLES = cycler(
    color=("#E69F00", "#7F7F7F", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#000000")
)
_STYLES += cycler(linestyle=("-", "--", "-.", ":") * 2, marker=tuple("os^DvPX<"))
_MARKERS_A_CURVE = 8
_MEASURES = {"train_loss": "training loss", "validation_loss": "validation loss"}
_AXES = {
    "step": "training step",
    "epoch": "epoch",
    "seconds": "seconds of training (compilation and evaluation excluded)",
}


class Run(NamedTuple):
    """One optimizer's rows from one seed, and the task's measures over the whole sets at its end."""

    name: str
    seed: int
    rows: list[Row]
    compile_seconds: float
    measures: dict[str, float]
    loss_name: str

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self.rows[-1]["step"])

    @property
    def seconds(self) -> float:
        """Training time, without compilation and evaluation."""
        return self.rows[-1]["seconds"]


class Curve(NamedTuple):
    """A measure's mean and standard deviation over seeds, where all of them have it; each an array."""

    step: np.ndarray
    epoch: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    def first_at_or_below(self, value: float) -> int | None:
        """The first place where the mean is at most ``value``, or None."""
        return next((place for place, mean in enumerate(self.mean) if mean <= value), None)


def curve(runs: Sequence[Run], measure: str) -> Curve:
    """The curve of one optimizer's runs."""
    found = [{row["step"]: row for row in run.rows if measure in row} for run in runs]
    steps = [step for step in found[0] if all(step in rows for rows in found)]

    def over_seeds(name: str) -> np.ndarray:
        return np.array([[rows[step][name] for step in steps] for rows in found], float)

    places = [over_seeds(name).mean(axis=0) for name in ("step", "epoch", "seconds")]
    return Curve(*places, *mean_and_deviation(over_seeds(measure)))


def mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis; the deviation of one value is 0."""
    return values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Each optimizer's runs."""
    return {
        name: [run for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)
    }


def comparison_table(runs: Sequence[Run], title: str) -> Table:
    """One row an optimizer; the best final losses are bold."""
    groups, measures = by_name(runs), runs[0].measures
    losses = [f"{split}_loss" for split in SPLITS if f"{split}_loss" in measures]
    accuracy, reference = "test_accuracy" in measures, None
    header = ["optimizer", *(name.removesuffix("_loss") for name in losses), *["accuracy"] * accuracy]
    header += ["steps", "seconds", "ms/step"]
    caption = f"Loss: {runs[0].loss_name}, over all images at the last step. Seconds exclude compilation and evaluation."
    if len(runs) > len(groups):
        caption += f" Mean and standard deviation over {len(runs) // len(groups)} seeds."
    if _REFERENCE in groups:
        reference = curve(groups[_REFERENCE], "train_loss").mean[-1]
        header.append(f"{_REFERENCE}'s loss\nat step, after")
        caption += f" The last column: when an optimizer first had {_REFERENCE}'s final loss."
    ends = {
        name: {key: mean_and_deviation(np.array([run.measures[key] for run in own])) for key in measures}
        for name, own in groups.items()
    }
    best = {key: np.nanmin([np.inf, *(end[key][0] for end in ends.values())]) for key in losses}
    rows = []
    for name, own in groups.items():
        several = len(own) > 1
        cells = [name]
        for key in losses:
            mean, deviation = ends[name][key]
            text = f"{mean:.5f}" + f" ± {deviation:.5f}" * several
            cells.append(f"[bold]{text}[/bold]" if mean == best[key] else text)
        if accuracy:
            mean, deviation = ends[name]["test_accuracy"]
            cells.append(f"{mean:.2%}" + f" ± {deviation:.2%}" * several)
        steps, seconds = (np.mean([getattr(run, field) for run in own]) for field in ("steps", "seconds"))
        cells += [f"{steps:.0f}", f"{seconds:.1f}", f"{1000 * seconds / steps:.1f}"]
        if reference is not None:
            course = curve(own, "train_loss")
            place = course.first_at_or_below(reference)
            at = "never" if place is None else f"{course.step[place]:.0f}, {course.seconds[place]:.1f} s"
            cells.append(at)
        rows.append(cells)
    return plain_table(title, caption, header, rows)


def plot_runs(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draws each optimizer's mean over seeds, with a band of a standard deviation, and writes the figure to ``path``.

    The figure is built without pyplot, so that neither a display nor a global state is involved.
    """
    measures = [name for name in _MEASURES if any(name in row for row in runs[0].rows)]
    seeds = len(runs) // len(by_name(runs))
    figure = Figure(figsize=(15.0, 4.6 * len(measures)), dpi=120, layout="constrained")
    lines = figure.subplots(len(measures), len(_AXES), sharey="row", squeeze=False)
    for line, measure in zip(lines, measures, strict=True):
        for axes, place in zip(line, _AXES, strict=True):
            _draw(axes, runs, measure, place)
        over_seeds = f"\nmean and deviation over {seeds} seeds" * (seeds > 1)
        line[0].set_ylabel(f"{_MEASURES[measure]} ({runs[0].loss_name}){over_seeds}")
        # Every curve from the common start downward; a diverged one leaves at the top.
        losses = np.array([row[measure] for run in runs for row in run.rows if measure in row], float)
        start, positive = losses[0], losses[np.isfinite(losses) & (losses > 0)]
        if positive.size and np.isfinite(start) and positive.min() < start:
            line[0].set_ylim(positive.min() * 0.93, start * 1.15)
    figure.axes[-1].legend(frameon=False, fontsize=11)
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _draw(axes: Axes, runs: Sequence[Run], measure: str, place: str) -> None:
    """The curves of all optimizers: a logarithmic loss with readable ticks, a light grid, no box."""
    axes.set_prop_cycle(_STYLES)
    for name, own in by_name(runs).items():
        found = curve(own, measure)
        places, every = getattr(found, place), max(1, len(found.mean) // _MARKERS_A_CURVE)
        (drawn,) = axes.plot(places, found.mean, linewidth=1.8, markersize=4.5, markevery=every, label=name)
        if len(own) > 1:
            low, high = found.mean - found.deviation, found.mean + found.deviation
            axes.fill_between(places, low, high, color=drawn.get_color(), alpha=0.25, linewidth=0)
    axes.set(xlabel=_AXES[place], yscale="log")
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
