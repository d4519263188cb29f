"""Reads programs: the jaxprs inside a jaxpr's equations, and the instructions of a compiled program's text (HLO)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

# %name (parameters) -> result {
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# [ROOT] %name = result opcode(operands), attributes
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


class Instruction(NamedTuple):
    """One line of HLO: `name = result opcode(operands), attributes`; `result` is its type, as "f32[4,2]"."""

    name: str
    result: str
    opcode: str
    operands: str
    attributes: str

    def called(self) -> Iterator[str]:
        """The computations that it calls, branches and bodies of loops among them."""
        for names in _CALLED.findall(self.attributes):
            yield from re.findall(r"[\w.\-]+", names)


def instructions(compiled: Any) -> tuple[dict[str, list[Instruction]], str]:
    """{computation: its instructions} and the name of the entry.

    `compiled` is a compiled function (`jitted.lower(...).compile()`), or its text.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            body = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None and (found := _INSTRUCTION.match(line)):
            body.append(Instruction(*found.groups()[:3], *_parted(found[4])))
    if not entry:
        raise ValueError("The text has no entry computation: is it that of a compiled program?")
    return computations, entry


def _parted(rest: str) -> tuple[str, str]:
    """What stands inside an instruction's parentheses, of which the first is cut off, and what follows."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def inner_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters (`eqn.params.values()`): of branches, loops and calls."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from inner_jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
