"""The file of results, and what has been run."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.today.tasks import RATES

RESULTS = Path(__file__).with_suffix(".jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def runs_of(
    records: list[dict[str, Any]], task: str, optimizer: str
) -> dict[tuple[float, int], dict[str, Any]]:
    """{(factor of the rate, seed): run} of the grid."""
    return {
        (r["factor"], r["seed"]): r
        for r in records
        if (r["task"], r.get("optimizer")) == (task, optimizer) and "factor" in r
    }


def trials_of(records: list[dict[str, Any]], task: str, optimizer: str) -> dict[int, dict[str, Any]]:
    """{number of the trial: run} of the random search."""
    return {
        r["trial"]: r
        for r in records
        if (r["task"], r.get("optimizer")) == (task, optimizer) and "trial" in r
    }


def final(run: dict[str, Any]) -> float:
    """The training loss of the last interval, infinite where it is not a number."""
    loss = run["curve"][-1][2]
    return loss if np.isfinite(loss) else float("inf")


def best_factor(runs: dict[tuple[float, int], dict[str, Any]]) -> float:
    return min((factor for factor, seed in runs if seed == 0), key=lambda factor: final(runs[factor, 0]))


def missing(
    records: list[dict[str, Any]], task: str, optimizer: str, seeds: int, factors: Sequence[int]
) -> Iterator[tuple[float, int]]:
    """What is still to be run of the grid; the records may grow in between."""
    for factor in (RATES[i] for i in factors):
        if (factor, 0) not in runs_of(records, task, optimizer):
            yield factor, 0
    for seed in range(1, seeds):
        for factor in sorted({best_factor(runs_of(records, task, optimizer)), 1.0}):
            if (factor, seed) not in runs_of(records, task, optimizer):
                yield factor, seed


class Results:
    """The records of a file, one a line, to which every new one is added at once."""

    def __init__(self, path: Path):
        self.path, self.records = path, read(path)

    def add(self, **record: Any) -> None:
        record["machine"] = f"{platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}"
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
