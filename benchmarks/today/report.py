"""What was found: a table and a figure a task, the random search, and one profile over all tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.today.results import best_factor, final, runs_of, trials_of
from benchmarks.today.tasks import OPTIMIZERS, RATES, TASKS

Records = list[dict[str, Any]]


def reached(curve: list[list[float]], loss: float) -> float | None:
    """The first step at which the curve is at or below a loss, between intervals linearly; None if it never is."""
    before = None
    for step, _, value in curve:
        if value <= loss:
            if before is None or before[1] <= value:
                return step
            return before[0] + (before[1] - loss) / (before[1] - value) * (step - before[0])
        before = (step, value)
    return None


def costs_of(records: Records, task: str) -> dict[str, float]:
    """{optimizer: milliseconds of a step}, of the last measurements of this task."""
    found: dict[str, float] = {}
    for record in records:
        if record["task"] == task and "costs" in record:
            found |= record["costs"]
    return found


def best(records: Records, task: str, optimizer: str) -> dict[str, Any] | None:
    """Seed 0 of the optimizer's best rate."""
    runs = runs_of(records, task, optimizer)
    return runs[best_factor(runs), 0] if any(seed == 0 for _, seed in runs) else None


def report(records: Records, figures: Path | None = None) -> str:
    """All tables in Markdown; the figures go to a folder."""
    tasks = [task for task in TASKS if any(record["task"] == task for record in records)]
    lines = []
    for task in tasks:
        lines += [f"### {task}, {TASKS[task].steps} steps", "", *table(records, task), ""]
    searched = search_table(records, tasks)
    if len(searched) > 2:
        lines += ["### Best of ten trials of a random search, training loss", "", *searched, ""]
    lines += ["### All tasks", "", *summary(records, tasks), ""]
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            draw_task(records, task, figures / f"{task}.png")
        draw_profile(records, tasks, figures / "profile.png")
    return "\n".join(lines)


def table(records: Records, task: str) -> list[str]:
    lines = [
        "| optimizer | best rate | training loss | validation loss | at the recommended rate | step, Adam's = 1 "
        "| steps to Adam's best | seconds, Adam's = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    adam, costs = best(records, task, "adam"), costs_of(records, task)
    for optimizer in OPTIMIZERS:
        runs = runs_of(records, task, optimizer)
        if not runs:
            continue
        factor = best_factor(runs)
        seeds = [own for (f, _), own in runs.items() if f == factor]
        middle = [final(own) for (f, _), own in runs.items() if f == 1.0]
        at = reached(runs[factor, 0]["curve"], final(adam)) if adam else None
        ratio = costs[optimizer] / costs["adam"] if {optimizer, "adam"} <= costs.keys() else None
        tried = sum(seed == 0 for _, seed in runs)
        rate = f"{factor * OPTIMIZERS[optimizer].unit:.3g}" + (
            "" if tried == len(RATES) else f" (of {tried})"
        )
        cells = [
            optimizer,
            rate,
            f"{np.mean([final(own) for own in seeds]):.4f} ({len(seeds)})",
            f"{np.mean([own['test']['loss'] for own in seeds]):.4f}",
            f"{np.mean(middle):.4f} ({len(middle)})" if middle else "–",
            f"{ratio:.2f}" if ratio else "–",
            f"{at:.0f}" if at else "–",
            f"{at * ratio / TASKS[task].steps:.2f}" if at and ratio else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def search_table(records: Records, tasks: list[str]) -> list[str]:
    lines = [f"| task | {' | '.join(OPTIMIZERS)} |", "|---" * (len(OPTIMIZERS) + 1) + "|"]
    for task in tasks:
        found = [trials_of(records, task, optimizer) for optimizer in OPTIMIZERS]
        if any(found):
            cells = [f"{min(map(final, own.values())):.4f} ({len(own)})" if own else "–" for own in found]
            lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def ratios(
    records: Records, tasks: list[str], optimizer: str, rival: str
) -> list[tuple[float, float | None]]:
    """For each task that both have run: the steps to the rival's best loss, and the seconds, as parts of the rival's."""
    found = []
    for task in tasks:
        own, other, costs = (
            best(records, task, optimizer),
            best(records, task, rival),
            costs_of(records, task),
        )
        if own is None or other is None:
            continue
        target = min(value for *_, value in other["curve"])
        at, needed = reached(own["curve"], target), reached(other["curve"], target)
        steps = at / needed if at and needed else float("inf")
        cost = costs[optimizer] / costs[rival] if {optimizer, rival} <= costs.keys() else None
        found.append((steps, cost and steps * cost))
    return found


def summary(records: Records, tasks: list[str]) -> list[str]:
    """Against Adam, and against the better of Muon and SOAP: how many tasks are won and the geometric mean of the ratios.

    A task on which the other's loss is never reached has no ratio; it counts as lost, and the mean is of the others.
    """
    lines = [
        "| optimizer | tasks | at the recommended rate at or below Adam's best | reaches Adam's best | in steps | in seconds "
        "| reaches Muon's | in steps | reaches SOAP's | in steps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for optimizer in OPTIMIZERS:
        own = [task for task in tasks if best(records, task, optimizer) and best(records, task, "adam")]
        if not own:
            continue
        middle = [
            (runs_of(records, task, optimizer).get((1.0, 0)), best(records, task, "adam")) for task in own
        ]
        won = sum(bool(run) and final(run) <= final(adam) for run, adam in middle if adam)
        cells = [optimizer, f"{len(own)}", f"{won} of {sum(bool(run) for run, _ in middle)}"]
        for rival in ("adam", "muon", "soap"):
            found = ratios(records, tasks, optimizer, rival)
            there = [pair for pair in found if np.isfinite(pair[0])]
            cells.append(f"{len(there)} of {len(found)}")
            cells.append(_mean([steps for steps, _ in there]))
            if rival == "adam":
                cells.append(_mean([seconds for _, seconds in there if seconds]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean(values: list[float]) -> str:
    return f"{np.exp(np.mean(np.log(values))):.2f}" if values else "–"


def _draw(path: Path, labels: tuple[str, str], curves: dict[str, tuple[Any, Any]], **scales: str) -> None:
    figure = Figure(figsize=(6.0, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    dashes = ("-", "--", "-.", ":")
    for i, (name, (x, y)) in enumerate(curves.items()):
        axes.plot(x, y, linestyle=dashes[i % 4], color=f"C{i % 10}", label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], **scales)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(path)


def draw_task(records: Records, task: str, path: Path) -> None:
    """The curve of each optimizer's best rate."""
    curves = {}
    for optimizer in OPTIMIZERS:
        run = best(records, task, optimizer)
        if run is not None:
            curve = np.array(run["curve"])
            # What diverges leaves the picture.
            curves[optimizer] = (curve[:, 0], np.where(curve[:, 2] <= 2 * curve[0, 2], curve[:, 2], np.nan))
    _draw(path, ("step", "training loss"), curves, yscale="log")


def draw_profile(records: Records, tasks: list[str], path: Path) -> None:
    """For each number τ, on how many tasks an optimizer reaches Adam's best loss in at most τ of Adam's steps."""
    curves = {}
    for optimizer in OPTIMIZERS:
        found = sorted(steps for steps, _ in ratios(records, tasks, optimizer, "adam"))
        if found:
            curves[optimizer] = (
                np.repeat([*found, 1.2], 2)[:-1].clip(max=1.2),
                np.repeat(np.arange(len(found) + 1), 2)[1:],
            )
    _draw(path, ("steps to Adam's best loss, as a part of Adam's", "tasks"), curves, xlim=(0, 1.2))
