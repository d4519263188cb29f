"""The collectives of a compiled program, read from its HLO text: what they carry, and whether every step runs them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from benchmarks.programs import instructions

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_SHAPE = re.compile(r"\b(?:pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")

Shape = tuple[int, ...]


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`; the start of an asynchronous pair stands for the pair.
      operands: the shapes that a device hands in.
      results: the shapes that it gets.
      conditional: whether it is reached through the branch of a `conditional` alone.
      source: where in the traced program it comes from.
    """

    kind: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    conditional: bool
    source: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.operands + self.results


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled function (`jitted.lower(...).compile()`), or of its HLO text."""
    computations, entry = instructions(compiled)
    always = _reached(computations, entry, through_branches=False)
    found = []
    for name in sorted(_reached(computations, entry, through_branches=True)):
        shapes = {instruction.name: _shapes(instruction.result) for instruction in computations[name]}
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            operands = re.findall(r"%([\w.\-]+)", instruction.operands)
            assert operands, f"a collective without operands: {instruction}"
            source = re.search(r'op_name="([^"]*)"', instruction.attributes)
            found.append(
                Collective(
                    kind,
                    tuple(shape for operand in operands for shape in shapes[operand]),
                    shapes[instruction.name],
                    name not in always,
                    source[1] if source else "",
                )
            )
    return found


def conditionals(compiled: Any) -> int:
    """How many `conditional`s a compiled program has."""
    computations, _ = instructions(compiled)
    return sum(i.opcode == "conditional" for body in computations.values() for i in body)


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(tuple(int(d) for d in dims.split(",") if d) for dims in _SHAPE.findall(text))


def _reached(computations: dict[str, Any], entry: str, *, through_branches: bool) -> set[str]:
    reached, pending = set(), [entry]
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        for instruction in computations[name]:
            if instruction.opcode == "conditional" and not through_branches:
                continue
            pending += [called for called in instruction.called() if called in computations]
    return reached
