"""The figure of a comparison: training and validation loss against steps, epochs and seconds, with bands over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from kfe_optax.experiments.runs import Run, by_name, curve

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
