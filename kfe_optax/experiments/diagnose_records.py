"""The numbers of a ``diagnose`` run: as series for tables and pictures, and as a CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np


class Series:
    """Every method's values of every quantity over the measured steps; NaN where there is none.

    Example::

        series.steps                                    # [0, 5, 10]
        series.of("error", "kfac")                      # array of three numbers
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._values: dict[str, dict[str, list[float]]] = {}

    def append(self, step: int, values: dict[str, dict[str, Any]]) -> None:
        """Adds a measurement: {quantity: {method: number}}."""
        self.steps.append(step)
        for quantity, methods in values.items():
            for method, value in methods.items():
                self._values.setdefault(quantity, {}).setdefault(method, []).append(float(value))

    def methods(self, quantity: str) -> list[str]:
        """The methods that have the quantity, in the order of the measurement."""
        return list(self._values[quantity])

    def of(self, quantity: str, method: str) -> np.ndarray:
        """One method's values, one a measured step."""
        return np.array(self._values[quantity][method])


class DiagnoseRecorder:
    """Writes ``<workdir>/diagnose.csv``, a row a number, as the measurements come.

    Example::

        with DiagnoseRecorder(workdir) as recorder:
            recorder.write(0, {"error": {"kfac": 0.4}})
    """

    def __init__(self, workdir: Path):
        self.path = workdir / "diagnose.csv"
        self._file = self.path.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(("step", "method", "quantity", "value"))

    def __enter__(self) -> DiagnoseRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, step: int, values: dict[str, dict[str, Any]]) -> None:
        """Appends a measurement and flushes it; what was not computed is an empty field."""
        for quantity, methods in values.items():
            for method, value in methods.items():
                number = float(value)
                text = "" if math.isnan(number) else f"{number:.9g}"
                self._rows.writerow((step, method, quantity, text))
        self._file.flush()
