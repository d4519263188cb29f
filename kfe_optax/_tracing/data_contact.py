"""Where parameters meet the examples otherwise than by a use that a tag sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfe_optax._marks import marks
from kfe_optax._tracing import equations
from kfe_optax._tracing import untagged as rules
from kfe_optax._tracing.findings import Live, Use, Walk
from kfe_optax._tracing.known import DATA, PARAMETERS, Fact, lives


def note(equation: Any, inputs: list[Fact], walk: Walk) -> None:
    """Notes the parameters that meet data in an equation of which no rule makes a use."""
    for fact in inputs:
        trail = fact.trail
        if fact.level != PARAMETERS or trail is None:
            continue
        if trail.path not in walk.others:
            lost = trail.lost or ("rev" if trail.flipped else None)
            behind = f"{lost}, then " if lost else ""
            walk.others[trail.path] = behind + equations.written(equation)


def followed(
    equation: Any, inputs: Sequence[Fact], outputs: list[Fact], walk: Walk, loops: int
) -> list[Fact]:
    """The facts of an equation's outputs, where parameters may meet data in a way that no tag sees."""
    given, data = [fact.unseen for fact in inputs], [fact.level == DATA for fact in inputs]
    rest, paths = rules.behind(equation, given, data)
    outputs = [fact._replace(unseen=rest) for fact in outputs]
    return met(equation, paths, lives(inputs), outputs, walk, loops)


def met(
    equation: Any, paths: frozenset[Any], live: Live, outputs: list[Fact], walk: Walk, loops: int
) -> list[Fact]:
    """The facts of outputs where these parameters have met data; it counts if the loss's derivative reaches one of them."""
    if not paths:
        return outputs
    info = {"mark": marks.MET, "paths": paths, "rule": equations.written(equation)}
    met = frozenset({(len(walk.uses), 0)})
    walk.uses.append(Use(None, (), info, walk.place, loops, live=live))
    return [fact._replace(live=fact.live | met) for fact in outputs]


def open_in(facts: Sequence[Fact], variables: Sequence[Any]) -> frozenset[Any]:
    """The parameters that reach one of these values otherwise than by uses, single numbers apart."""
    pairs = zip(facts, variables, strict=True)
    return frozenset().union(*(fact.unseen.paths for fact, v in pairs if rules.size(v.aval) > 1))


def read_by(facts: Sequence[Fact], walk: Walk) -> None:
    """Notes that outputs of uses are read, where nothing behind that is followed."""
    walk.readers.update(fact.linear.use for fact in facts if fact.linear is not None)
