"""Loops: a body is walked as its first iteration and as a later one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kfe_optax._layers.flow import ANY, BEFORE, LAST, SAME
from kfe_optax._tracing import batch_axes, data_contact, equations, origins
from kfe_optax._tracing.batch_axes import UNKNOWN
from kfe_optax._tracing.findings import Use, Walk
from kfe_optax._tracing.known import DATA, Fact, all_unseen, lives, union
from kfe_optax._tracing.origins import NOWHERE, Origin, Origins
from kfe_optax._tracing.trails import into_scan, left
from kfe_optax._tracing.untagged import NONE

Into = Callable[[Any, list[Fact], Walk, int], list[Fact]]
"""Walks a program with the facts of its inputs, so many loops deep; those of its outputs."""


def scan(equation: Any, inputs: list[Fact], source: int, walk: Walk, loops: int, into: Into) -> list[Fact]:
    body, length = equation.params["jaxpr"].jaxpr, equation.params["length"]
    constants, carries = equations.scan_carry(equation)
    inner = []
    for i, fact in enumerate(inputs):
        # What a carry becomes may depend on all that goes in.
        level = source if constants <= i < constants + carries else fact.level
        trail = into_scan(fact.trail, i, (constants, carries), length)
        whole = i < constants + carries
        batch = fact.batch if whole else batch_axes.sliced(fact.batch)
        behind = fact.origins if whole else origins.moved(fact.origins)
        # What a parameter in a carry becomes is not followed.
        rest = NONE if constants <= i < constants + carries and source == DATA else fact.unseen
        inner.append(Fact(trail, level, behind, fact.live, batch, unseen=rest))
    data_contact.read_by(inputs, walk)
    carried = slice(constants, constants + carries)
    start = len(walk.uses)
    results = _iterate(body, inner, (constants, carries if length > 1 else 0), walk, loops, into)
    if not equation.params["reverse"]:
        walk.uses[start:] = [
            dataclasses.replace(use, loop=start + 1) if use.loops == loops + 1 else use
            for use in walk.uses[start:]
        ]
    data_contact.read_by(results, walk)
    outputs = []
    for i, fact in enumerate(results):
        # The carry comes from the last iteration, what is stacked from all of them.
        if i < carries:
            outputs.append(Fact(None, source, _later(fact.origins, start, LAST), fact.live, fact.batch))
        else:
            behind = origins.moved(_later(fact.origins, start, ANY))
            outputs.append(Fact(None, source, behind, fact.live, batch_axes.stacked(fact.batch)))
    if source != DATA:
        return [fact._replace(unseen=all_unseen([*inputs, *results])) for fact in outputs]
    live = lives(inputs)
    for i in range(carries, len(outputs)):
        # NNX returns its parameters from a scan, too, where nothing reads them.
        paths = data_contact.open_in(results[i : i + 1], body.outvars[i : i + 1])
        outputs[i : i + 1] = data_contact.met(equation, paths, live, outputs[i : i + 1], walk, loops)
    paths = data_contact.open_in(inputs[carried], equation.invars[carried])
    paths |= data_contact.open_in(results[:carries], body.outvars[:carries])
    return data_contact.met(equation, paths, live, outputs, walk, loops)


def while_loop(
    equation: Any, inputs: list[Fact], source: int, walk: Walk, loops: int, into: Into
) -> list[Fact]:
    """No derivative goes back through it, so that what it reads of a parameter is said but counts for nothing."""
    body = equation.params["body_jaxpr"].jaxpr
    if source == DATA:
        data_contact.note(equation, inputs, walk)
    skip = equation.params["cond_nconsts"]
    inner = [
        fact._replace(trail=left(fact.trail, "while"), level=source, batch=UNKNOWN, unseen=NONE)
        for fact in inputs[skip:]
    ]
    start = len(walk.uses)
    constants = len(inner) - len(body.outvars)
    results = _iterate(body, inner, (constants, len(body.outvars)), walk, loops, into)
    # Without an iteration the carry is what went in.
    behind = _later(union([*inputs, *results]), start, ANY)
    return [Fact(None, source, behind, lives([*inputs, *results]))] * len(equation.outvars)


def _iterate(
    body: Any, facts: list[Fact], carried: tuple[int, int], walk: Walk, loops: int, into: Into
) -> list[Fact]:
    """Walks a loop's body as its first iteration and as a later one; the facts of the outputs of the later one.

    What a later iteration's carry comes from is known when a walk leaves it as it was. Each use is recorded once.
    """
    constants, carries = carried
    start, place = len(walk.uses), walk.place
    results = into(body, facts, walk, loops + 1)
    if not carries:
        return results
    first, around = walk.uses[start:], None
    while True:
        new = []
        for i, fact in enumerate(results[:carries]):
            before = facts[constants + i] if around is None else around[i]
            origin = _later(fact.origins, start, BEFORE) | (NOWHERE if around is None else before.origins)
            # A loop's carry may start as constants.
            batch = fact.batch if around is None and not before.batch else before.batch & fact.batch
            new.append(before._replace(origins=origin, live=before.live | fact.live, batch=batch))
        if new == around:
            break
        around = new
        del walk.uses[start:]
        for use in [use for use in walk.readers if use >= start]:
            del walk.readers[use]
        walk.place = place
        inside = [*facts[:constants], *around, *facts[constants + carries :]]
        results = into(body, inside, walk, loops + 1)
    walk.uses[start:] = [_joined(a, b, loops + 1) for a, b in zip(first, walk.uses[start:], strict=True)]
    return results


def _joined(first: Use, later: Use, loops: int) -> Use:
    """A use from the first and a later iteration; in a loop inside the loop both iterations are any."""
    if later.loops == loops:
        return dataclasses.replace(later, first=first.first)
    return dataclasses.replace(later, first=first.first | later.first, later=first.later | later.later)


def _later(found: Origins, start: int, when: str) -> Origins:
    """Origins as seen an iteration later, or after the loop: those made in the loop (from use `start` on) have become older."""
    if all(origin.use < start for origin in found):
        return found
    return frozenset(
        origin if origin.use < start else Origin(origin.use, when if origin.when == SAME else ANY)
        for origin in found
    )
