"""The picture of a sweep: the final loss colored over learning rate and damping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from kfe_optax.experiments.sweep_best import Setting

# Viridis keeps its order of lightness for color-blind readers and in black and white; Okabe and
# Ito's vermilion is not on it.
_COLORS = "viridis"
_DIVERGED_COLOR = "#D55E00"
_MOST_NUMBERS = 64
_PREFERRED = ("learning_rate", "damping")


def plot_sweep(
    settings: Sequence[Setting], fields: Sequence[str], path: Path, title: str, loss_name: str
) -> None:
    """Draws the settings, ranked by ``rank_settings``, and writes the picture to ``path``.

    Over learning rate and damping where both vary: a tile for each pair of a grid with its loss
    written on it, a point for each draw of a random search. Where only one of them varies, the
    loss over it. A place that several settings share (they differ in another field) shows the best.
    Losses above the start's have the color of the start's.
    """
    names = _axes_fields(settings, fields)
    places: dict[tuple[float, ...], Setting] = {}
    for setting in settings:  # the best first: it keeps its place
        places.setdefault(tuple(setting.values[fields.index(name)] for name in names), setting)
    figure = Figure(figsize=(8.0, 6.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    label = f"final training loss ({loss_name})"
    if len(names) == 2:
        _draw_plane(figure, axes, places, label)
    else:
        _draw_line(axes, places, label)
    for name, axis, set_scale in zip(names, ("x", "y"), (axes.set_xscale, axes.set_yscale), strict=False):
        values = sorted({place["xy".index(axis)] for place in places})
        getattr(axes, f"set_{axis}label")(name.replace("_", " "))
        if values[0] > 0 and values[-1] > values[0]:
            set_scale("log")
        if (len(values) <= 10 and len(places) > len(values)) or len(values) <= 6:
            getattr(axes, f"{axis}axis").set_minor_locator(NullLocator())
            getattr(axes, f"set_{axis}ticks")(values, [f"{value:.3g}" for value in values])
        getattr(axes, f"{axis}axis").set_minor_formatter(NullFormatter())
    others = [name for name in fields if name not in names]
    if others and len(places) < len(settings):
        title += f"\nbest over {', '.join(others)}"
    axes.set_title(title, fontsize=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _axes_fields(settings: Sequence[Setting], fields: Sequence[str]) -> list[str]:
    """Learning rate and damping as far as they vary, or else the first field."""
    varying = [
        name for index, name in enumerate(fields) if len({setting.values[index] for setting in settings}) > 1
    ]
    return [name for name in _PREFERRED if name in varying] or (varying or list(fields))[:1]


def _draw_plane(figure: Figure, axes: Axes, places: dict[tuple[float, ...], Setting], label: str) -> None:
    finished = {place: setting for place, setting in places.items() if not setting.diverged}
    low, high = _range(list(finished.values()))
    norm = LogNorm(low, high) if low > 0 else Normalize(low, high)
    columns, rows = (sorted({place[axis] for place in places}) for axis in (0, 1))
    grid = len(places) == len(columns) * len(rows)
    if grid:
        losses = np.full((len(rows), len(columns)), np.nan)
        for (x, y), setting in finished.items():
            losses[rows.index(y), columns.index(x)] = setting.train_loss
        colored = axes.pcolormesh(
            _edges(columns), _edges(rows), np.ma.masked_invalid(losses), cmap=_COLORS, norm=norm
        )
    else:
        # The best last, on top of the others.
        points = list(reversed(finished.items()))
        colored = axes.scatter(
            [place[0] for place, _ in points],
            [place[1] for place, _ in points],
            c=[setting.train_loss for _, setting in points],
            s=110,
            cmap=_COLORS,
            norm=norm,
            edgecolors="black",
            linewidths=0.6,
        )
    numbered = grid and len(places) <= _MOST_NUMBERS
    if numbered:
        for (x, y), setting in finished.items():
            dark = norm(min(setting.train_loss, high)) < 0.6
            axes.annotate(
                f"{setting.train_loss:.4g}",
                (x, y),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    _mark_diverged(axes, [place for place, setting in places.items() if setting.diverged])
    if finished:
        best = next(iter(finished))
        _mark_best(axes, best, next(iter(finished.values())).train_loss)
        above = any(setting.train_loss > high for setting in finished.values())
        bar = figure.colorbar(colored, ax=axes, label=label, extend="max" if above else "neither")
        if low > 0:
            ticks = np.geomspace(low, high, 6)
            bar.ax.yaxis.set_minor_locator(NullLocator())
            bar.set_ticks(list(ticks), labels=[f"{tick:.4g}" for tick in ticks])


def _draw_line(axes: Axes, places: dict[tuple[float, ...], Setting], label: str) -> None:
    finished = sorted(
        (place[0], setting.train_loss) for place, setting in places.items() if not setting.diverged
    )
    diverged = [place[0] for place, setting in places.items() if setting.diverged]
    axes.set_ylabel(label)
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    top = 1.0
    if finished:
        xs, losses = zip(*finished, strict=True)
        low, high = _range(list(places.values()))
        axes.plot(xs, losses, color="#0072B2", linewidth=1.8, marker="o", markersize=6)
        margin = 0.06 * (high - low)
        top = high + margin
        axes.set_ylim(low - margin, high + 2 * margin)
        best = min(finished, key=lambda point: point[1])
        _mark_best(axes, best, best[1])
    _mark_diverged(axes, [(x, top) for x in diverged])


def _range(settings: Sequence[Setting]) -> tuple[float, float]:
    """From the best loss to the worst one, but not beyond the highest start."""
    losses = [setting.train_loss for setting in settings if not setting.diverged]
    if not losses:
        return 0.0, 1.0
    starts = [row.losses.start_loss for setting in settings for row in setting.rows]
    low, high = min(losses), min(max(losses), max(starts))
    if high <= low:  # one loss, or none below the start
        high = max(losses) if max(losses) > low else low + max(abs(low), 1e-12) * 0.01
    return low, high


def _edges(centers: Sequence[float]) -> np.ndarray:
    """The borders of the tiles around ``centers``: geometric means where all are positive."""
    logarithmic = centers[0] > 0
    middle = np.log(centers) if logarithmic else np.asarray(centers, float)
    between = (middle[1:] + middle[:-1]) / 2
    edges = np.concatenate([[2 * middle[0] - between[0]], between, [2 * middle[-1] - between[-1]]])
    return np.exp(edges) if logarithmic else edges


def _mark_best(axes: Axes, place: tuple[float, ...], loss: float) -> None:
    axes.scatter(
        *place, marker="*", s=260, color="white", edgecolors="black", zorder=4, label=f"best: {loss:.5g}"
    )


def _mark_diverged(axes: Axes, places: Sequence[tuple[float, ...]]) -> None:
    if places:
        axes.scatter(
            *zip(*places, strict=True),
            marker="X",
            s=110,
            color=_DIVERGED_COLOR,
            edgecolors="black",
            linewidths=0.6,
            zorder=3,
            label="diverged",
        )
