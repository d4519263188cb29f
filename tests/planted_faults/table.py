"""`TABLE.md`: every fault with the test files that see it."""

from __future__ import annotations

import json
import pathlib

from .faults import Fault
from .planting import FILES

TABLE = pathlib.Path(__file__).parent / "TABLE.md"


def write(faults: list[Fault], results: pathlib.Path) -> str:
    """Writes the table of what has been measured; returns a line that says how much that is."""
    rows, seen, measured = [], 0, 0
    for fault in faults:
        path = results / f"{fault.identity}.json"
        if not path.exists():
            rows.append((fault, "not measured", ""))
            continue
        found = json.loads(path.read_text())
        measured += 1
        seen += bool(found["seen"])
        ours = sorted(found["seen"])
        others = [file for file in found["files"] if file not in found["seen"]]
        rows.append((fault, ", ".join(map(_short, ours)) or "**none**", ", ".join(map(_short, others))))
    summary = f"{seen} of {len(faults)} faults are seen" + (
        "" if measured == len(faults) else f"; {len(faults) - measured} are not measured"
    )
    lines = [
        "# Planted faults",
        "",
        f"{summary}. Each was shown to the tests that execute its lines in at most {FILES} test files, the narrowest, and in",
        "each to the quickest of them; a fault that none of those saw, to more (`planting.py`). So a file that is not named may",
        "see it as well. The tests of CI alone count, not the nightly ones. Written by `python -m tests.planted_faults`.",
    ]
    for area in dict.fromkeys(fault.area for fault in faults):
        lines += [
            "",
            f"## {area.replace('_', ' ').capitalize()}",
            "",
            "| fault | seen by | not by |",
            "|---|---|---|",
        ]
        lines += [
            f"| {fault.name} | {ours} | {others} |" for fault, ours, others in rows if fault.area == area
        ]
    TABLE.write_text("\n".join(lines) + "\n")
    return summary


def _short(file: str) -> str:
    return "`" + file.removeprefix("tests/").replace("test_", "").removesuffix(".py") + "`"
