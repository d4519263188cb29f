"""Following probes through a jaxpr: from a variable beside a parameter to the tags that read it.

A probe enters the traced loss with the parameter's own shape. On its way to a tag it may be sliced by scans (stacked layers),
have an axis batched by vmap, be cast, or be broadcast over a loop (shared parameters). A *trail* records this; an operation
that is not on the list ends the trail, with its name as the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from kfe_optax import batch_axes, origins
from kfe_optax.batch_axes import UNKNOWN, Labels
from kfe_optax.flow import ANY, BEFORE, LAST, SAME
from kfe_optax.marks import elements_mark, layer_mark, output_mark, unsupported_mark
from kfe_optax.origins import NOWHERE, Origin, Origins
from kfe_optax.walks import Live, Trail, Use, Walk

_CARRIED = frozenset(
    {"convert_element_type", "copy", "copy_p", "sharding_constraint", "pvary", "pcast", "reshard"}
)
# Through these a derivative keeps its sign.
_POSITIVE = _CARRIED | {"add", "add_any", "reduce_sum", "cumsum", "psum", "psum_invariant", "reshape"}
_POSITIVE |= {"broadcast_in_dim", "squeeze", "transpose", "slice", "concatenate", "stack"}

# How a parameter meets data in a layer. (A loss may read parameters in any other way, a prior's squares for instance.)
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "gather"})


# What a variable depends on at most.
NOTHING, PARAMETERS, DATA = 0, 1, 2


class _Fact(NamedTuple):
    """Of a variable: its trail, what it depends on, what it comes from directly, what its derivative reaches, its examples."""

    trail: Trail | None
    level: int
    origins: Origins = NOWHERE
    live: Live = frozenset()
    batch: Labels = UNKNOWN
    number: Any = None  # what a constant is


_DATA = _Fact(None, DATA, origins.DATA)


def follow(jaxpr: Any, trails: Sequence[Trail | None]) -> Walk:
    """Walks a closed jaxpr for the trails of its inputs; those without one are data, and so are arrays that it closes over."""
    walk = Walk()
    facts = [_DATA if trail is None else _Fact(trail, PARAMETERS) for trail in trails]
    results = _walk(jaxpr.jaxpr, facts, walk, loops=0)
    walk.loss, walk.live = _union(results), _lives(results)
    return walk


def _walk(jaxpr: Any, facts: Sequence[_Fact], walk: Walk, loops: int) -> list[_Fact]:
    def own(fact: _Fact, variable: Any) -> _Fact:
        if not float_leaf(variable.aval):
            fact = fact._replace(live=frozenset())
        if fact.level == DATA:
            source = (walk.scope, id(variable))
            fact = fact._replace(batch=batch_axes.named(fact.batch, variable.aval, source))
        return fact

    def met(fact: _Fact, variable: Any) -> _Fact:
        if fact.level == DATA and not fact.batch:
            fact = fact._replace(batch=batch_axes.everywhere(variable.aval, (walk.scope, id(variable))))
        return own(fact, variable)

    given = [*zip(jaxpr.invars, facts, strict=True), *((v, _DATA) for v in jaxpr.constvars)]
    known = {variable: met(fact, variable) for variable, fact in given}

    def read(variable) -> _Fact:
        if isinstance(variable, Literal):
            # An array that the loss closes over may stand in the program itself; it is data, where a number is not.
            number = variable.val
            return met(_DATA, variable) if np.ndim(number) else _Fact(None, NOTHING, number=number)
        return known.get(variable, _Fact(None, NOTHING))

    scope = walk.scope
    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        trails = [fact.trail for fact in inputs]
        source = max((fact.level for fact in inputs), default=NOTHING)
        name = equation.primitive.name
        if equation.primitive in (layer_mark, output_mark, elements_mark, unsupported_mark):
            behind = _mark_reached(equation, inputs, walk, loops)
            known.update(dict.fromkeys(equation.outvars, behind))
            continue
        if name in _PRODUCTS and source == DATA:
            walk.products.update(trail.path for trail in trails if trail is not None and not trail.lost)
        walk.scope = (*scope, id(equation))
        outputs = _inner(equation, name, inputs, walk, loops)
        walk.scope = scope
        if outputs is None:
            behind = origins.behind(equation, [fact.origins for fact in inputs])
            live = _derivative(name, inputs)
            fact = _Fact(_step(equation, name, trails), source, behind, live)
            batches = batch_axes.behind(equation, [fact.batch for fact in inputs])
            outputs = [fact._replace(batch=batch) for batch in batches]
            if name in _CARRIED and len(inputs) == len(outputs) == 1:
                outputs[0] = outputs[0]._replace(number=inputs[0].number)
        for variable, fact in zip(equation.outvars, outputs, strict=False):
            known[variable] = own(fact, variable)
    return [read(v) for v in jaxpr.outvars]


def _mark_reached(equation: Any, inputs: Sequence[_Fact], walk: Walk, loops: int) -> _Fact:
    """Records the use, and the fact of the mark's output."""
    info = {"mark": equation.primitive, **equation.params}
    if equation.primitive is not layer_mark:
        trail = inputs[0].trail if equation.primitive is unsupported_mark else None
        walk.uses.append(Use(trail, (), info, loops, live=inputs[0].live, batch=inputs[0].batch))
        return inputs[0]._replace(trail=None, live=frozenset({(len(walk.uses) - 1, 1)}))
    x = inputs[2]
    parameters = tuple(fact.trail for fact in inputs[3:])
    index, level, fixed = len(walk.uses), inputs[0].level, x.level != DATA
    batch, out = x.batch, inputs[0].batch
    if fixed:
        # What is made for all examples shows where they are in what it feeds.
        source = (walk.scope, id(equation.outvars[0]))
        ahead = [sum(mapped[place] for _, mapped in info["vmaps"]) for place in (2, 0)]
        free = info["kind"].batch_axis(info["shapes"][0])
        batch |= batch_axes.at(ahead[0] + free, equation.invars[2].aval, source)
        out |= batch_axes.at(ahead[1], equation.outvars[0].aval, source)
    use = Use(inputs[1].trail, parameters, info, loops, x.level == NOTHING, fixed, x.origins, x.origins)
    walk.uses.append(dataclasses.replace(use, live=inputs[0].live, batch=batch))
    return _Fact(None, level, frozenset({Origin(index, SAME)}), frozenset({(index, 1)}), out)


def _union(facts: Sequence[_Fact]) -> Origins:
    return NOWHERE.union(*(fact.origins for fact in facts))


def _lives(facts: Sequence[_Fact]) -> Live:
    return frozenset().union(*(fact.live for fact in facts))


def _derivative(name: str, inputs: Sequence[_Fact]) -> Live:
    """What the derivative of an equation's outputs reaches, and with which sign."""
    found: set[tuple[int, int]] = set()
    if name != "stop_gradient":
        for place, fact in enumerate(inputs):
            sign = _sign(name, place, inputs) if fact.live else 0
            found |= {(use, sign * before) for use, before in fact.live}
    return frozenset(found)


def _sign(name: str, place: int, inputs: Sequence[_Fact]) -> int:
    """The sign of an equation's derivative with respect to one of its operands; 0 where it is not known."""
    if name in _POSITIVE:
        return 1
    if name in ("neg", "sub"):
        return -1 if name == "neg" or place == 1 else 1
    if name in ("mul", "div") and (name, place) != ("div", 1):
        factor = inputs[1 - place].number
        return 0 if factor is None else int(factor > 0) - int(factor < 0)
    return 0


def _step(equation: Any, name: str, inputs: Sequence[Trail | None]) -> Trail | None:
    """The trail behind a primitive without an inner jaxpr."""
    present = [t for t in inputs if t is not None]
    if not present:
        return None
    trail = present[0]
    if len(present) > 1 or trail.lost:
        return dataclasses.replace(trail, lost=trail.lost or name)
    if name == "stop_gradient":
        return dataclasses.replace(trail, stopped=True)
    if name in _CARRIED:
        return trail
    if name == "transpose":
        return dataclasses.replace(trail, dims=tuple(trail.dims[i] for i in equation.params["permutation"]))
    return dataclasses.replace(trail, lost=name)


def _inner(equation: Any, name: str, inputs: list[_Fact], walk: Walk, loops: int) -> list[_Fact] | None:
    """Walks the jaxprs inside an equation; the facts of its outputs, or None when it has no inner jaxpr."""
    params = equation.params
    source = max((fact.level for fact in inputs), default=NOTHING)
    if name == "scan":
        return _scan(equation, inputs, source, walk, loops)
    if name == "while":
        return _while(equation, inputs, source, walk, loops)
    if name == "cond":
        results = [_walk(b.jaxpr, inputs[1:], walk, loops) for b in params["branches"]]
        joined = []
        for same in zip(*results, strict=True):
            trail = same[0].trail if all(fact.trail == same[0].trail for fact in same) else None
            chosen = origins.chosen(inputs[0].origins, _union(same))
            batch = batch_axes.joined([fact.batch for fact in same])
            joined.append(_Fact(trail, source, chosen, _lives(same), batch))
        return joined
    for value in params.values():
        inner_jaxpr = getattr(value, "jaxpr", value)
        if hasattr(inner_jaxpr, "eqns") and len(inner_jaxpr.invars) == len(inputs):
            if name == "shard_map":
                # Inside is a device's share of the examples.
                inputs = [fact._replace(batch=UNKNOWN) for fact in inputs]
            results = _walk(inner_jaxpr, inputs, walk, loops)
            if name == "shard_map":
                results = [fact._replace(batch=UNKNOWN) for fact in results]
            if name.startswith("custom_"):
                # A derivative of its own may reach what the function itself does not (a straight-through estimator).
                reached = frozenset((use, 0) for use, _ in _lives(inputs))
                results = [fact._replace(live=fact.live | reached) for fact in results]
            return results
    return None


def _scan(equation: Any, inputs: list[_Fact], source: int, walk: Walk, loops: int) -> list[_Fact]:
    body, length = equation.params["jaxpr"].jaxpr, equation.params["length"]
    constants, carries = _scan_carry(equation, body)
    inner = []
    for i, fact in enumerate(inputs):
        # What a carry becomes may depend on all that goes in.
        level = source if constants <= i < constants + carries else fact.level
        trail = _into_scan(fact.trail, i, (constants, carries), length)
        whole = i < constants + carries
        batch = fact.batch if whole else batch_axes.sliced(fact.batch)
        behind = fact.origins if whole else origins.moved(fact.origins)
        inner.append(_Fact(trail, level, behind, fact.live, batch))
    start = len(walk.uses)
    results = _iterate(body, inner, (constants, carries if length > 1 else 0), walk, loops)
    if not equation.params["reverse"]:
        walk.uses[start:] = [
            dataclasses.replace(use, loop=start + 1) if use.loops == loops + 1 else use
            for use in walk.uses[start:]
        ]
    outputs = []
    for i, fact in enumerate(results):
        # The carry comes from the last iteration, what is stacked from all of them.
        if i < carries:
            outputs.append(_Fact(None, source, _later(fact.origins, start, LAST), fact.live, fact.batch))
        else:
            behind = origins.moved(_later(fact.origins, start, ANY))
            outputs.append(_Fact(None, source, behind, fact.live, batch_axes.stacked(fact.batch)))
    return outputs


def _while(equation: Any, inputs: list[_Fact], source: int, walk: Walk, loops: int) -> list[_Fact]:
    body = equation.params["body_jaxpr"].jaxpr
    skip = equation.params["cond_nconsts"]
    inner = [
        fact._replace(trail=_broadcast(fact.trail), level=source, batch=UNKNOWN) for fact in inputs[skip:]
    ]
    start = len(walk.uses)
    constants = len(inner) - len(body.outvars)
    results = _iterate(body, inner, (constants, len(body.outvars)), walk, loops)
    # Without an iteration the carry is what went in.
    behind = _later(_union([*inputs, *results]), start, ANY)
    return [_Fact(None, source, behind, _lives([*inputs, *results]))] * len(equation.outvars)


def _iterate(body: Any, facts: list[_Fact], carried: tuple[int, int], walk: Walk, loops: int) -> list[_Fact]:
    """Walks a loop's body as its first iteration and as a later one; the facts of the outputs of the later one.

    What a later iteration's carry comes from is known when a walk leaves it as it was. Each use is recorded once.
    """
    constants, carries = carried
    start, products = len(walk.uses), walk.products.copy()
    results = _walk(body, facts, walk, loops + 1)
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
        walk.products = products.copy()
        inside = [*facts[:constants], *around, *facts[constants + carries :]]
        results = _walk(body, inside, walk, loops + 1)
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


def _scan_carry(equation: Any, body: Any) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan.

    Releases of JAX name these differently; the shapes say it in all of them: what is scanned over, in or out, has an axis
    more outside the body than inside.
    """
    whole = sum(o.aval.shape == i.aval.shape for o, i in zip(equation.invars, body.invars, strict=True))
    carries = sum(o.aval.shape == i.aval.shape for o, i in zip(equation.outvars, body.outvars, strict=True))
    return whole - carries, carries


def _into_scan(trail: Trail | None, index: int, carried: tuple[int, int], length: int) -> Trail | None:
    if trail is None:
        return None
    constants, carries = carried
    if index < constants:
        return _broadcast(trail)
    if index < constants + carries:
        return dataclasses.replace(trail, lost="the carry of a scan")
    axis = trail.dims[0]
    return dataclasses.replace(trail, dims=trail.dims[1:], stack=(*trail.stack, (axis, length)))


def _broadcast(trail: Trail | None) -> Trail | None:
    return None if trail is None else dataclasses.replace(trail, broadcast=True)


def float_leaf(leaf: Any) -> bool:
    """Whether a parameter can be differentiated."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jnp.inexact)
