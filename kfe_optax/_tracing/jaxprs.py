"""Following parameters through a jaxpr, to the marks and the equations that use them.

On its way a parameter may be sliced by scans (stacked layers), have an axis batched by vmap, be cast, transposed, or be broadcast
over a loop (shared parameters). A *trail* records this; an operation that is not on the list ends the trail, with its name as
the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from kfe_optax._layers.flow import SAME
from kfe_optax._marks import marks
from kfe_optax._marks.marks import layer_mark, loss_mark, mask_mark
from kfe_optax._tracing import batch_axes, data_contact, equations, matching, origins
from kfe_optax._tracing import loops as loops_lib
from kfe_optax._tracing.batch_axes import UNKNOWN
from kfe_optax._tracing.findings import Trail, Use, Walk
from kfe_optax._tracing.known import (
    DATA,
    GIVEN,
    NOTHING,
    PARAMETERS,
    Fact,
    all_unseen,
    derivative,
    float_leaf,
    lives,
    number_of,
    union,
    with_number,
)
from kfe_optax._tracing.origins import Origin
from kfe_optax._tracing.trails import CARRIED, left, step
from kfe_optax._tracing.untagged import NONE, Unseen


def follow(jaxpr: Any, trails: Sequence[Trail | None], masked: bool = False) -> Walk:
    """Walks a closed jaxpr, whose first output is the loss, for the trails of its inputs.

    Those without one are data, and so are arrays that it closes over. `masked`: a row mask of the whole batch is in force.
    """
    walk = Walk(masked=masked)
    facts = [
        GIVEN if trail is None else Fact(trail, PARAMETERS, unseen=Unseen(frozenset({trail.path})))
        for trail in trails
    ]
    results = _walk(jaxpr.jaxpr, facts, walk, loops=0)[:1]
    walk.loss, walk.live = union(results), lives(results)
    return walk


def _walk(jaxpr: Any, facts: Sequence[Fact], walk: Walk, loops: int) -> list[Fact]:
    def own(fact: Fact, variable: Any) -> Fact:
        if not float_leaf(variable.aval):
            fact = fact._replace(live=frozenset(), linear=None, unseen=NONE)
        if fact.level == DATA:
            source = (walk.scope, id(variable))
            fact = fact._replace(batch=batch_axes.named(fact.batch, variable.aval, source))
        return fact

    def met(fact: Fact, variable: Any) -> Fact:
        if fact.level == DATA and not fact.batch:
            fact = fact._replace(batch=batch_axes.everywhere(variable.aval, (walk.scope, id(variable))))
        return own(fact, variable)

    given = [*zip(jaxpr.invars, facts, strict=True), *((v, GIVEN) for v in jaxpr.constvars)]
    known = {variable: met(fact, variable) for variable, fact in given}

    def read(variable) -> Fact:
        if isinstance(variable, Literal):
            # An array that the loss closes over may stand in the program itself; it is data, where a number is not.
            number = variable.val
            if np.ndim(number):
                return met(GIVEN, variable)
            return Fact(None, NOTHING, number=None if np.iscomplexobj(number) else number)
        return known.get(variable, Fact(None, NOTHING))

    scope, ahead, multiplied = walk.scope, walk.place, walk.multiplied
    walk.multiplied = equations.multiplied(jaxpr)
    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        walk.place, ahead = ahead, ahead + equations.places(equation)
        if equation.primitive is mask_mark:
            walk.masks[equation.params["serial"]] = walk.place, scope
            continue
        if equation.primitive in (layer_mark, loss_mark):
            behind = _mark_reached(equation, inputs, walk, loops)
            known.update(dict.fromkeys(equation.outvars, behind))
            continue
        walk.scope, scoped = (*scope, id(equation)), walk.scoped
        walk.scoped = equations.row_mask_of(equation) or scoped
        outputs = _inner(equation, equation.primitive.name, inputs, walk, loops)
        walk.scope, walk.scoped = scope, scoped
        if outputs is None:
            other = walk.multiplied.get(equation.outvars[0]) if equation.outvars else None
            outputs = _plain(equation, inputs, known.get(other), walk, loops)
        for variable, fact in zip(equation.outvars, outputs, strict=False):
            known[variable] = own(fact, variable)
    walk.place, walk.multiplied = ahead, multiplied
    return [_left(read(v)) for v in jaxpr.outvars]


def _left(fact: Fact) -> Fact:
    """The fact of a program's output: data that a parameter was multiplied with in it stay behind."""
    if fact.trail is None or fact.trail.kept is None:
        return fact
    return fact._replace(trail=dataclasses.replace(fact.trail, lost="mul"))


def _plain(equation: Any, inputs: list[Fact], other: Fact | None, walk: Walk, loops: int) -> list[Fact]:
    """The facts of the outputs of an equation without a program inside; `other` multiplies its product, if anything does."""
    name = equation.primitive.name
    level = max((fact.level for fact in inputs), default=NOTHING)
    behind = origins.behind(equation, [fact.origins for fact in inputs])
    numbered = with_number(name, inputs)
    trail = numbered or step(equation, [fact.trail for fact in inputs])
    fact = Fact(trail, level, behind, derivative(name, inputs), number=number_of(name, inputs))
    batches = batch_axes.behind(equation, [fact.batch for fact in inputs])
    outputs = [fact._replace(batch=batch) for batch in batches]
    if name in CARRIED and len(inputs) == len(outputs) == 1:
        outputs[0] = outputs[0]._replace(number=inputs[0].number)
    if numbered is not None:
        return data_contact.followed(equation, inputs, outputs, walk, loops)
    return matching.recorded(equation, inputs, outputs, other, walk, loops)


def _divided(fact: Fact, spec: Any) -> Fact:
    """The fact of what enters or leaves a `shard_map`, inside of which is a device's share of the examples."""
    trail = fact.trail
    if trail is not None and equations.is_divided(spec):
        trail = dataclasses.replace(trail, lost=trail.lost or "divided over devices by a shard_map")
    return fact._replace(trail=trail, batch=UNKNOWN)


def _mark_reached(equation: Any, inputs: Sequence[Fact], walk: Walk, loops: int) -> Fact:
    """Records the use, and the fact of the mark's output."""
    info: dict[str, Any] = {"mark": equation.primitive, **equation.params, "divided": walk.divided}
    first = inputs[0]
    if equation.primitive is loss_mark:
        return _loss_reached(equation, inputs, info, walk, loops)
    x = inputs[1]
    parameters = tuple(fact.trail for fact in inputs[2 : 2 + len(info["roles"])])
    index, level, fixed = len(walk.uses), first.level, x.level != DATA
    batch, out = x.batch, first.batch
    if fixed:
        # What is made for all examples shows where they are in what it feeds.
        source = (walk.scope, id(equation.outvars[0]))
        ahead = [sum(mapped[place] for _, mapped in info["vmaps"]) for place in (1, 0)]
        free = info["kind"].batch_axis(info["shapes"][0])
        batch |= batch_axes.at(ahead[0] + free, equation.invars[1].aval, source)
        out |= batch_axes.at(ahead[1], equation.outvars[0].aval, source)
    place = walk.place
    use = Use(parameters[0], parameters, info, place, loops, x.level == NOTHING, fixed, x.origins, x.origins)
    walk.uses.append(dataclasses.replace(use, live=first.live, batch=batch))
    return Fact(None, level, frozenset({Origin(index, SAME)}), frozenset({(index, 1)}), out)


def _loss_reached(
    equation: Any, inputs: Sequence[Fact], info: dict[str, Any], walk: Walk, loops: int
) -> Fact:
    """A registered loss: its outputs z are a use, and its elements, whose derivative reaches z and what else it is given."""
    data_contact.read_by(inputs, walk)
    open_ = data_contact.open_in(inputs, equation.invars)
    (z,) = data_contact.met(equation, open_, lives(inputs), [inputs[0]], walk, loops)
    index = len(walk.uses)
    walk.uses.append(
        Use(None, (), info | {"mark": marks.OUTPUT}, walk.place, loops, live=z.live, batch=z.batch)
    )
    if not info["elements"]:
        return z._replace(trail=None, linear=None, unseen=NONE, live=frozenset({(index, 1)}))
    live = frozenset({(index, 1)}) | {(use, 0) for use, _ in lives(inputs[1:])}
    rank = len(equation.outvars[0].aval.shape)
    batch = frozenset(label for label in z.batch if label.axis < rank)
    level = max(fact.level for fact in inputs)
    walk.uses.append(
        Use(None, (), info | {"mark": marks.ELEMENTS}, walk.place, loops, live=live, batch=batch)
    )
    return Fact(None, level, union(inputs), frozenset({(index + 1, 1)}), batch)


def _inner(equation: Any, name: str, inputs: list[Fact], walk: Walk, loops: int) -> list[Fact] | None:
    """Walks the jaxprs inside an equation; the facts of its outputs, or None when it has no inner jaxpr."""
    params = equation.params
    source = max((fact.level for fact in inputs), default=NOTHING)
    if name == "scan":
        return loops_lib.scan(equation, inputs, source, walk, loops, _walk)
    if name == "while":
        return loops_lib.while_loop(equation, inputs, source, walk, loops, _walk)
    if name == "cond":
        results = [_walk(b.jaxpr, inputs[1:], walk, loops) for b in params["branches"]]
        joined, chosen_of = [], []
        for same, variable in zip(zip(*results, strict=True), equation.outvars, strict=True):
            trail = same[0].trail if all(fact.trail == same[0].trail for fact in same) else None
            chosen = origins.chosen(inputs[0].origins, union(same))
            batch = batch_axes.joined([fact.batch for fact in same])
            fact = Fact(trail, source, chosen, lives(same), batch)
            data_contact.read_by(same, walk)
            if trail is not None or source != DATA:
                fact = fact._replace(unseen=all_unseen(same))
            else:
                chosen_of += [(one, variable) for one in same]
            joined.append(fact)
        paths = data_contact.open_in(*zip(*chosen_of, strict=True)) if chosen_of else frozenset()
        return data_contact.met(equation, paths, frozenset(), joined, walk, loops)
    for program in equations.inner(equation):
        around, paths, unknown = walk.divided, frozenset(), not equations.is_rebuilt(equation)
        if name == "shard_map":
            walk.divided = True
            inputs = [_divided(*each) for each in zip(inputs, equation.params["in_specs"], strict=True)]
        if unknown:
            # Its derivative may be another one than that of its equations.
            data_contact.read_by(inputs, walk)
            paths, kept = data_contact.open_in(inputs, equation.invars), all_unseen(inputs)
            inputs = [
                fact._replace(trail=left(fact.trail, name), linear=None, unseen=NONE) for fact in inputs
            ]
        results = _walk(program, inputs, walk, loops)
        if unknown and source == DATA:
            results = data_contact.met(equation, paths, lives(inputs), results, walk, loops)
        elif unknown:
            results = [fact._replace(unseen=kept) for fact in results]
        if name == "shard_map":
            walk.divided = around
            results = [_divided(*each) for each in zip(results, equation.params["out_specs"], strict=True)]
        if name.startswith("custom_"):
            # A derivative of its own may reach what the function itself does not (a straight-through estimator).
            reached = frozenset((use, 0) for use, _ in lives(inputs))
            results = [fact._replace(live=fact.live | reached) for fact in results]
        return results
    return None
