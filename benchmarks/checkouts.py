"""A K-FAC step of this checkout beside that of another: tracing, program, memory and time.

For each checkout a process of its own runs `benchmarks/step_worker.py`, this checkout's copy, with the checkout first in
PYTHONPATH. Both stay alive and take turns, one at a time, so that a noisy machine slows both alike; who begins changes from round
to round. Whether the two compiled programs are the same, or else the opcodes that differ in number, stands below the table.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.programs import instructions
from kfe_optax._layers.table import align, quantity

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).resolve().with_name("step_worker.py")
TRACES = 3
ROUNDS = 6
STEPS = 10  # a round: one update of the factors with scale_by_kfac's defaults, and the inverses in one round of five


class Child:
    """A worker that measures one checkout."""

    def __init__(self, model: str, checkout: Path):
        path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), model, str(checkout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.checkout = checkout

    def ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The worker of {self.checkout} ended; what it said stands above.")
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(
    model: str, checkouts: Sequence[Path], rounds: int = ROUNDS, steps: int = STEPS
) -> list[dict[str, Any]]:
    """For each checkout seconds of tracing and milliseconds of a step (medians), the program, its instructions, temporary bytes.

    The first of the rounds, which has the refreshes of the first steps, is not counted.
    """
    children: list[Child] = []
    try:
        for checkout in checkouts:
            children.append(Child(model, checkout))
        traces = _in_turn(children, TRACES, "trace")
        programs = [child.ask("compile") for child in children]
        runs = [own[1:] for own in _in_turn(children, rounds + 1, "run", steps)]
    finally:
        for child in children:
            child.end()
    for checkout, own in zip(checkouts, runs, strict=True):
        if not math.isfinite(own[-1]["loss"]):
            print(f"The loss of {checkout} ends at {own[-1]['loss']}.", file=sys.stderr)
    return [
        {
            "tracing": statistics.median(trace),
            **program,
            # Those of inner computations count as well.
            "instructions": sum(" = " in line for line in program["text"].splitlines()),
            "milliseconds": statistics.median(turn["milliseconds"] for turn in run),
        }
        for trace, program, run in zip(traces, programs, runs, strict=True)
    ]


def _in_turn(children: Sequence[Child], rounds: int, *request: Any) -> list[list[Any]]:
    answers: list[list[Any]] = [[] for _ in children]
    for turn in range(rounds):
        for i in range(len(children))[:: -1 if turn % 2 else 1]:
            answers[i].append(children[i].ask(*request))
    return answers


def table(measured: Sequence[dict[str, Any]]) -> str:
    """This checkout, and where there are two the other and the ratio of this one's to the other's."""
    shown = {
        "tracing, s": ("tracing", lambda value: f"{value:.2f}"),
        "HLO instructions": ("instructions", lambda value: f"{value:,}"),
        "temporary memory": ("bytes", lambda value: quantity(value, "B")),
        "a step, ms": ("milliseconds", lambda value: f"{value:.1f}"),
    }
    rows = []
    for words, (name, written) in shown.items():
        values = [own[name] for own in measured]
        ratio = [f"{values[0] / values[1]:.3f}"] if len(values) == 2 else []
        rows.append([words, *map(written, values), *ratio])
    header = ["", "this checkout", *(["the other", "ratio"] if len(measured) == 2 else [])]
    return align(header, rows, right=range(1, len(header)))


def difference(this: str, other: str) -> str:
    """What two programs' texts differ in, in words."""
    if _unnamed(this) == _unnamed(other):
        return "The two programs are the same, instruction by instruction."
    first, second = _opcodes(this), _opcodes(other)
    changed = [name for name in sorted(first | second) if first[name] != second[name]]
    counts = ", ".join(f"{name} {second[name]} → {first[name]}" for name in changed)
    return f"From the other's opcodes to this checkout's: {counts or 'as many of each'}."


def _unnamed(text: str) -> list[str]:
    """The lines of the computations without metadata, every name replaced by the place of its first appearance."""
    text = re.sub(r", metadata=\{(?:[^{}\"]|\"[^\"]*\")*\}", "", text)
    places: dict[str, str] = {}
    text = re.sub(r"%[\w.\-]+", lambda name: places.setdefault(name[0], f"%{len(places)}"), text)
    # What comes before the first computation is tables of file names and the module's own name.
    lines = text.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith(("%", "ENTRY"))) :]


def _opcodes(text: str) -> Counter[str]:
    return Counter(each.opcode for body in instructions(text)[0].values() for each in body)


def report(model: str, against: str | None, steps: int = STEPS) -> str:
    """The table of one model, and what the programs differ in, of this checkout alone or against another."""
    checkouts = [ROOT]
    if against is not None:
        other = Path(against).resolve()
        if not (other / "kfe_optax" / "__init__.py").is_file():
            raise SystemExit(f"--against {against}: there is no kfe_optax/__init__.py in it.")
        checkouts.append(other)
    measured = measure(model, checkouts, steps=steps)
    texts = [own["text"] for own in measured]
    return "\n".join([table(measured), *([difference(*texts)] if len(texts) == 2 else [])])
