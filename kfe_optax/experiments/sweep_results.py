"""What a sweep leaves: its trials as a CSV file, a table and a picture, and the best setting as a config."""

from __future__ import annotations

import csv
import pprint
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table

from kfe_optax.experiments.report import plain_table

_SHOWN, _SLICES = 5, 4
# Viridis keeps its order of lightness for color-blind readers and in black and white; Okabe and Ito's vermilion is not on it.
_POINTS = {"s": 90, "cmap": "viridis", "edgecolors": "black"}
_DIVERGED = {"s": 90, "marker": "X", "color": "#D55E00", "label": "diverged"}
_BEST = {"s": 220, "marker": "*", "color": "white", "edgecolors": "black", "label": "best"}
_CONFIG = '''\
"""{heading}"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    return ConfigDict(FIELDS)


FIELDS = {fields}
'''


def write_results(
    trials: Sequence[FrozenTrial],
    best: ConfigDict,
    objective: str,
    folder: Path,
    title: str,
    console: Console,
) -> None:
    """Writes ``sweep.csv``, ``sweep.png`` and ``best.py`` to ``folder``, and prints a table of the best trials.

    ``trials`` come with the best first, whose config is ``best``.
    """
    _write_trials(trials, folder / "sweep.csv")
    plot_sweep(trials, folder / "sweep.png", title, objective)
    console.print(_table(trials, objective, title))
    words = "none: every setting diverged; lower config.sweep.learning_rate"
    (folder / "best.py").unlink(missing_ok=True)
    if not _diverged(trials[0]):
        words = str(folder / "best.py")
        heading = f"The best of {len(trials)} settings in a sweep: {objective} {trials[0].value:.5f}."
        fields = pprint.pformat(best.to_dict(), width=100, sort_dicts=False)
        text = _CONFIG.format(heading=heading, fields=fields)
        (folder / "best.py").write_text(text, encoding="utf-8")
    for label, text in (("trials", folder / "sweep.csv"), ("figure", folder / "sweep.png"), ("best", words)):
        console.print(f"{label:<10} {text}", highlight=False, soft_wrap=True)


def _diverged(trial: FrozenTrial) -> bool:
    return not trial.user_attrs


def _write_trials(trials: Sequence[FrozenTrial], path: Path) -> None:
    """Writes a row a trial, in the order in which they ran."""
    trials = sorted(trials, key=lambda trial: trial.number)
    measures = dict.fromkeys(name for trial in trials for name in trial.user_attrs)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("trial", *trials[0].params, "outcome", *measures))
        for index, trial in enumerate(trials):
            found = (trial.user_attrs.get(name) for name in measures)
            rows.writerow((index, *trial.params.values(), ("finished", "diverged")[_diverged(trial)], *found))


def _table(trials: Sequence[FrozenTrial], objective: str, title: str) -> Table:
    """The best trials, one a row; ``trials`` come with the best first."""
    shown = [name for name in trials[0].user_attrs if name.endswith(objective.partition("_")[2])]
    rows = []
    for place, trial in enumerate(trials[:_SHOWN], start=1):
        values = (f"{v:.4g}" if isinstance(v, float) else f"{v}" for v in trial.params.values())
        found = ["diverged"] if _diverged(trial) else [f"{trial.user_attrs[name]:.5f}" for name in shown]
        rows.append([f"{place}", *values, *found])
    caption = f"By {objective}. {len(trials)} settings, {sum(map(_diverged, trials))} of them diverged."
    header = (name.replace("_", " ") for name in (*trials[0].params, *(shown or [objective])))
    return plain_table(title, caption, ("place", *header), rows)


def plot_sweep(trials: Sequence[FrozenTrial], path: Path, title: str, objective: str) -> None:
    """Draws the trials over the plane of the first two numbers that vary, and over each field; the best comes first.

    Example::

        plot_sweep(outcome.trials, Path("sweep.png"), "K-FAC", "train_loss")
    """
    # The best last, on top of the others.
    kept = [trial for trial in reversed(trials) if not _diverged(trial)]
    lost = [trial for trial in trials if _diverged(trial)]
    worst = kept[0].value if kept else 1.0

    def column(name: str, of: Sequence[FrozenTrial]) -> list[Any]:
        if name == objective:
            return [worst if _diverged(trial) else trial.value for trial in of]
        return [value if _is_number(value := trial.params[name]) else str(value) for trial in of]

    fields = list(trials[0].params)
    fields = [name for name in fields if len(set(column(name, trials))) > 1] or fields[:1]
    numbers = [name for name in fields if _is_number(trials[0].params[name])]
    panels = [numbers[:2]] * (len(numbers) > 1) + [[name, objective] for name in fields[:_SLICES]]
    values = column(objective, kept)
    norm = LogNorm() if min(values, default=0) > 0 else Normalize()
    figure = Figure(figsize=(1 + 4.6 * len(panels), 4.8), dpi=150, layout="constrained")
    for names, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        points = axes.scatter(*(column(name, kept) for name in names), c=values, norm=norm, **_POINTS)
        axes.scatter(*(column(name, lost) for name in names), **_DIVERGED)
        axes.scatter(*(column(name, kept[-1:]) for name in names), **_BEST)
        for name, axis in zip(names, "xy", strict=True):
            axes.set(**{f"{axis}label": name})
            places = column(name, trials)
            if _is_number(places[0]) and 0 < min(places) < max(places):
                axes.set(**{f"{axis}scale": "log"})
    figure.colorbar(points, ax=figure.axes, label=objective)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
