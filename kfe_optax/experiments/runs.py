"""What a comparison knows of its runs: their rows, the mean and the deviation over seeds, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from kfe_optax.experiments.progress import plain_table
from kfe_optax.experiments.records import SPLITS, Row

# The optimizer that everyone knows, against which the others' speed is stated.
_REFERENCE = "adam"


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
