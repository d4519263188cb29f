"""How many bytes each device sends in a compiled program, read from its text (HLO): in every call, and in conditionals alone.

A collective counts as a ring makes it, for n devices: an all-reduce of S bytes sends 2 S (n − 1)/n from each, an all-gather of S
bytes in all S (n − 1)/n, and so an all-to-all; a reduce-scatter what an all-gather of its operand would; a permutation S. What
stands in a loop counts as often as the loop is known to run, and of the branches of a conditional the one that sends most.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.programs import instructions

# Bytes sent by a device, from the bytes of a collective's result and the number of devices.
RING: dict[str, Callable[[float, int], float]] = {
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Bytes that each device sends: in every call, and in the branches of conditionals besides."""

    always: float = 0.0
    branches: float = 0.0


def traffic(compiled: Any, devices: int) -> Traffic:
    """That of a compiled function (`jitted.lower(...).compile()`) on so many devices, all of them in each collective."""
    computations, entry = instructions(compiled)

    @functools.cache
    def of(name: str) -> Traffic:
        always = branches = 0.0
        for instruction in computations[name]:
            # Of an asynchronous pair the end counts: the start's result holds its operands as well.
            ring = RING.get(instruction.opcode.removesuffix("-done"))
            if ring:
                always += ring(_bytes(instruction.result), devices)
                continue
            inner = [of(called) for called in instruction.called() if called in computations]
            if instruction.opcode == "conditional":
                branches += max(sum(found) for found in inner)
                continue
            trips = _TRIPS.search(instruction.attributes)
            times = int(trips[1]) if instruction.opcode == "while" and trips else 1
            always += times * sum(found.always for found in inner)
            branches += times * sum(found.branches for found in inner)
        return Traffic(always, branches)

    return of(entry)


def _bytes(result: str) -> float:
    """Of all arrays in the type of a result."""
    total = 0.0
    for kind, bits, dims in _SHAPE.findall(result):
        size = 1 if kind == "pred" else int(bits) / 8
        total += size * math.prod(int(d) for d in dims.split(",") if d)
    return total
