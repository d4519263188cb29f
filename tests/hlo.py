"""The collectives of a compiled program, read from its HLO text: what they carry, and whether every step runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# %name (parameters) -> result {
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# [ROOT] %name = shape opcode(operands), attributes
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
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


class _Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    rest: str


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled function (`jitted.lower(...).compile()`), or of its HLO text."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = _parse(text)
    always = _reached(computations, entry, through_branches=False)
    found = []
    for name in sorted(_reached(computations, entry, through_branches=True)):
        shapes = {instruction.name: instruction.shapes for instruction in computations[name]}
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            operands = re.findall(r"%([\w.\-]+)", _arguments(instruction.rest))
            assert operands, f"a collective without operands: {instruction}"
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            found.append(
                Collective(
                    kind,
                    tuple(shape for operand in operands for shape in shapes[operand]),
                    instruction.shapes,
                    name not in always,
                    source[1] if source else "",
                )
            )
    return found


def conditionals(compiled: Any) -> int:
    """How many `conditional`s a compiled program has."""
    computations, _ = _parse(compiled.as_text())
    return sum(i.opcode == "conditional" for body in computations.values() for i in body)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """{computation: its instructions}, and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry, body = None, None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            body = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None and (match := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = match.groups()
            body.append(_Instruction(name, _shapes(shape), opcode, rest))
    assert entry is not None, "no entry computation: is this the text of a compiled program?"
    return computations, entry


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(tuple(int(d) for d in dims.split(",") if d) for dims in _SHAPE.findall(text))


def _arguments(rest: str) -> str:
    """What stands inside an instruction's parentheses, of which the first is cut off."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:i]
    return rest


def _called(instruction: _Instruction) -> Iterator[tuple[str, bool]]:
    """The computations that an instruction calls, and whether as the branch of a conditional."""
    attributes = instruction.rest[len(_arguments(instruction.rest)) :]
    for _, names in _CALLED.findall(attributes):
        for name in re.findall(r"[\w.\-]+", names):
            yield name, instruction.opcode == "conditional"


def _reached(computations: dict[str, Any], entry: str, *, through_branches: bool) -> set[str]:
    reached, pending = set(), [entry]
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        for instruction in computations[name]:
            for called, branch in _called(instruction):
                if called in computations and (through_branches or not branch):
                    pending.append(called)
    return reached
