"""The figures of comparisons: loss against steps and against seconds, of one run or over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from kfe_optax.experiments.repeats import Curves, band
from kfe_optax.experiments.runs import Run

# Okabe and Ito's palette, which color-blind readers can tell apart; markers and dashes tell the
# curves apart in black and white.
_STYLES = (
    ("#E69F00", "-", "o"),
    ("#7F7F7F", "--", "s"),
    ("#56B4E9", "-", "^"),
    ("#D55E00", "-", "D"),
    ("#009E73", "-.", "v"),
    ("#0072B2", "--", "P"),
    ("#CC79A7", "-", "X"),
    # The palette has no more colors: dashes and markers tell these from the first ones.
    ("#E69F00", ":", "<"),
    ("#56B4E9", "--", ">"),
    ("#D55E00", ":", "p"),
    ("#009E73", "--", "h"),
    ("#0072B2", ":", "*"),
)
_MARKERS_A_CURVE = 8


def plot_runs(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draws the runs' curves side by side and writes them to ``path``.

    The figure is built without pyplot, so that neither a display nor a global state is involved.

    Example::

        plot_runs(runs, Path("compare.png"), title="MNIST autoencoder")
    """
    figure = Figure(figsize=(11.0, 4.6), dpi=150, layout="constrained")
    by_step, by_seconds = figure.subplots(1, 2, sharey=True)
    for index, run in enumerate(runs):
        color, dashes, marker = _STYLES[index % len(_STYLES)]
        losses = [point.loss for point in run.curve]
        for axes, positions in (
            (by_step, [point.step for point in run.curve]),
            (by_seconds, [point.seconds for point in run.curve]),
        ):
            axes.plot(
                positions,
                losses,
                color=color,
                linestyle=dashes,
                linewidth=1.8,
                marker=marker,
                markersize=4.5,
                markevery=max(1, len(losses) // _MARKERS_A_CURVE),
                label=run.name,
            )
    by_seconds.set_xlabel("seconds of training (compilation and evaluation excluded)")
    by_step.set_ylabel(f"training loss ({runs[0].loss_name})")
    _set_loss_range(by_step, runs)
    _finish(figure, by_step, by_seconds, path, title)


def plot_repeats(curves: Sequence[Curves], path: Path, title: str, loss_name: str) -> None:
    """Draws each optimizer's mean over seeds with its 95 % confidence band.

    Example::

        plot_repeats(repeat(config, names, dataset, seeds=range(5), every=20), path, config.title, "squared error")
    """
    figure = Figure(figsize=(11.0, 4.6), dpi=150, layout="constrained")
    by_step, by_seconds = figure.subplots(1, 2, sharey=True)
    for index, runs in enumerate(curves):
        color, dashes, marker = _STYLES[index % len(_STYLES)]
        mean, low, high = band(runs.losses)
        every = max(1, len(mean) // _MARKERS_A_CURVE)
        for axes, positions in ((by_step, runs.steps), (by_seconds, runs.seconds.mean(axis=0))):
            axes.fill_between(positions, low, high, color=color, alpha=0.25, linewidth=0)
            axes.plot(
                positions,
                mean,
                color=color,
                linestyle=dashes,
                linewidth=1.6,
                marker=marker,
                markersize=4.5,
                markevery=every,
                label=runs.name,
            )
    by_seconds.set_xlabel("seconds of training (compilation excluded)")
    seeds = len(curves[0].losses)
    by_step.set_ylabel(f"training loss ({loss_name}),\nmean and 95 % band over {seeds} seeds")
    _finish(figure, by_step, by_seconds, path, title)


def _finish(figure: Figure, by_step: Axes, by_seconds: Axes, path: Path, title: str) -> None:
    by_step.set_xlabel("training step")
    for axes in (by_step, by_seconds):
        _tidy(axes)
    by_seconds.legend(frameon=False, fontsize=11)
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _tidy(axes: Axes) -> None:
    """A logarithmic loss with readable ticks, a light grid, no box."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _set_loss_range(axes: Axes, runs: Sequence[Run]) -> None:
    """Shows every curve from the common start downward; a diverged one leaves at the top."""
    losses = np.array([point.loss for run in runs for point in run.curve], float)
    losses = losses[np.isfinite(losses) & (losses > 0)]
    start = runs[0].curve[0].loss
    if losses.size and np.isfinite(start) and losses.min() < start:
        axes.set_ylim(losses.min() * 0.93, start * 1.15)
