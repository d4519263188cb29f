"""The figure of a comparison: training and validation loss against steps, epochs and seconds, with bands over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from kfe_optax.experiments.runs import Run, by_name, curve

# Okabe and Ito's palette, which color-blind readers can tell apart; dashes and markers tell the curves apart in black
# and white, and from the eighth on alone.
_COLORS = ("#E69F00", "#7F7F7F", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7")
_DASHES, _MARKERS = ("-", "--", "-.", ":"), "os^DvPX<>ph*"
_MARKERS_A_CURVE = 8
_AXES = {
    "step": "training step",
    "epoch": "epoch",
    "seconds": "seconds of training (compilation and evaluation excluded)",
}


def plot_runs(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draws each optimizer's mean over seeds, with a band of a standard deviation, and writes the figure to ``path``.

    The figure is built without pyplot, so that neither a display nor a global state is involved.
    """
    measures = {"train_loss": "training loss", "validation_loss": "validation loss"}
    measures = {name: words for name, words in measures.items() if any(name in row for row in runs[0].rows)}
    seeds = len(runs) // len(by_name(runs))
    figure = Figure(figsize=(15.0, 4.6 * len(measures)), dpi=120, layout="constrained")
    for line, (measure, words) in zip(
        figure.subplots(len(measures), len(_AXES), sharey="row", squeeze=False), measures.items(), strict=True
    ):
        for index, own in enumerate(by_name(runs).values()):
            _draw(line, own, measure, index)
        line[0].set_ylabel(
            f"{words} ({runs[0].loss_name})" + f"\nmean and deviation over {seeds} seeds" * (seeds > 1)
        )
        _set_loss_range(line[0], runs, measure)
        for axes, label in zip(line, _AXES.values(), strict=True):
            _tidy(axes, label)
    figure.axes[-1].legend(frameon=False, fontsize=11)
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _draw(line: Sequence[Axes], own: Sequence[Run], measure: str, index: int) -> None:
    found = curve(own, measure)
    color = _COLORS[index % len(_COLORS)]
    lowest = min((row[measure] for run in own for row in run.rows if row.get(measure, 0) > 0), default=0.0)
    for axes, place in zip(line, _AXES, strict=True):
        axes.plot(
            getattr(found, place),
            found.mean,
            color=color,
            linestyle=_DASHES[(index + index // len(_COLORS)) % len(_DASHES)],
            linewidth=1.8,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
            markevery=max(1, len(found.mean) // _MARKERS_A_CURVE),
            label=own[0].name,
        )
        if len(own) > 1:
            # Not below what a seed had: the axis is logarithmic.
            low = np.maximum(found.mean - found.deviation, lowest)
            high = found.mean + found.deviation
            axes.fill_between(getattr(found, place), low, high, color=color, alpha=0.25, linewidth=0)


def _tidy(axes: Axes, label: str) -> None:
    """A logarithmic loss with readable ticks, a light grid, no box."""
    axes.set_xlabel(label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def _set_loss_range(axes: Axes, runs: Sequence[Run], measure: str) -> None:
    """Shows every curve from the common start downward; a diverged one leaves at the top."""
    losses = np.array([row[measure] for run in runs for row in run.rows if measure in row], float)
    start, positive = losses[0], losses[np.isfinite(losses) & (losses > 0)]
    if positive.size and np.isfinite(start) and positive.min() < start:
        axes.set_ylim(positive.min() * 0.93, start * 1.15)
