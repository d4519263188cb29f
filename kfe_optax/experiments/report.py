"""The tables that the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table

from kfe_optax.experiments.runs import Run

# The optimizer that everyone knows, against which the others' speed is stated.
_REFERENCE = "adam"


def comparison_table(runs: Sequence[Run], title: str) -> Table:
    """One row an optimizer; the best final losses are bold.

    Example::

        Console().print(comparison_table(runs, title="MNIST autoencoder"))
    """
    reference = next((run for run in runs if run.name == _REFERENCE), None)
    accuracy = "test_accuracy" in runs[0].measures
    caption = (
        f"Loss: {runs[0].loss_name}, over all images at the last step. Seconds exclude "
        "compilation and evaluation."
    )
    if reference is not None:
        caption += f" The last column: when an optimizer first had {_REFERENCE}'s final loss."
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        padding=(0, 1, 0, 0),  # what fits the widest table into 80 columns
    )
    table.add_column("optimizer", no_wrap=True)
    numeric = ["train", "test"] + ["accuracy"] * accuracy + ["steps", "seconds", "ms/step"]
    if reference is not None:
        numeric.append(f"{_REFERENCE}'s loss\nat step, after")
    for name in numeric:
        table.add_column(name, justify="right")
    best = {
        key: min((run.measures[key] for run in runs), key=_nan_last) for key in ("train_loss", "test_loss")
    }
    for run in runs:
        cells = [run.name]
        for key, lowest in best.items():
            text = f"{run.measures[key]:.5f}"
            cells.append(f"[bold]{text}[/bold]" if run.measures[key] == lowest else text)
        if accuracy:
            cells.append(f"{run.measures['test_accuracy']:.2%}")
        cells += [f"{run.steps}", f"{run.seconds:.1f}", f"{1000 * run.seconds / run.steps:.1f}"]
        if reference is not None:
            reached = run.first_at_or_below(reference.curve[-1].loss)
            cells.append("never" if reached is None else f"{reached.step}, {reached.seconds:.1f} s")
        table.add_row(*cells)
    return table


def measures_table(measures: Mapping[str, float], title: str) -> Table:
    """The final evaluation of one run: a row a measure, a column a set."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("measure", no_wrap=True)
    table.add_column("training set", justify="right")
    table.add_column("test set", justify="right")
    names = [name.removeprefix("train_") for name in measures if name.startswith("train_")]
    for name in names:
        table.add_row(
            name.replace("_", " "),
            f"{measures[f'train_{name}']:.5f}",
            f"{measures[f'test_{name}']:.5f}",
        )
    return table


def _nan_last(value: float) -> float:
    """A key under which a diverged run is never the best."""
    return value if np.isfinite(value) else np.inf
