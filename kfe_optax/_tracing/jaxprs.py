"""Following parameters through a jaxpr, to the marks and the equations that use them.

On its way a parameter may be sliced by scans (stacked layers), have an axis batched by vmap, be cast, transposed, or be broadcast
over a loop (shared parameters). A *trail* records this; an operation that is not on the list ends the trail, with its name as
the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from kfe_optax._layers.flow import ANY, BEFORE, LAST, SAME
from kfe_optax._marks import marks
from kfe_optax._marks.marks import layer_mark, loss_mark, unsupported_mark
from kfe_optax._tracing import batch_axes, equations, origins, rules
from kfe_optax._tracing import unseen as unseen_rules
from kfe_optax._tracing.batch_axes import UNKNOWN, Labels
from kfe_optax._tracing.origins import NOWHERE, Origin, Origins
from kfe_optax._tracing.rules import bias as added
from kfe_optax._tracing.rules.base import Output
from kfe_optax._tracing.trails import CARRIED, into_scan, left, step
from kfe_optax._tracing.unseen import NONE, Unseen
from kfe_optax._tracing.walks import Live, Trail, Use, Walk

# Through these a derivative keeps its sign.
_POSITIVE = CARRIED | {"add", "add_any", "reduce_sum", "cumsum", "psum", "psum_invariant", "reshape"}
_POSITIVE |= {"broadcast_in_dim", "squeeze", "transpose", "slice", "concatenate", "stack"}

# These move the entries of a layer's output, and change none.
_MOVED = CARRIED | {"name", "optimization_barrier", "transpose", "reshape", "squeeze"}

# What is made of numbers, such as 1/√d.
_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda number: 1 / np.sqrt(number),
}

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
    linear: Output | None = None  # the use that no mark stands at whose output it is
    unseen: Unseen = NONE  # the parameters that reach it otherwise than by uses


_DATA = _Fact(None, DATA, origins.DATA)


def follow(jaxpr: Any, trails: Sequence[Trail | None], masked: bool = False) -> Walk:
    """Walks a closed jaxpr, whose first output is the loss, for the trails of its inputs.

    Those without one are data, and so are arrays that it closes over. `masked`: a row mask of the whole batch is in force.
    """
    walk = Walk(masked=masked)
    facts = [
        _DATA if trail is None else _Fact(trail, PARAMETERS, unseen=Unseen(frozenset({trail.path})))
        for trail in trails
    ]
    results = _walk(jaxpr.jaxpr, facts, walk, loops=0)[:1]
    walk.loss, walk.live = _union(results), _lives(results)
    return walk


def _walk(jaxpr: Any, facts: Sequence[_Fact], walk: Walk, loops: int) -> list[_Fact]:
    def own(fact: _Fact, variable: Any) -> _Fact:
        if not float_leaf(variable.aval):
            fact = fact._replace(live=frozenset(), linear=None, unseen=NONE)
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

    scope, ahead = walk.scope, walk.place
    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        trails = [fact.trail for fact in inputs]
        source = max((fact.level for fact in inputs), default=NOTHING)
        name = equation.primitive.name
        walk.place, ahead = ahead, ahead + equations.places(equation)
        if equation.primitive in (layer_mark, loss_mark, unsupported_mark):
            behind = _mark_reached(equation, inputs, walk, loops)
            known.update(dict.fromkeys(equation.outvars, behind))
            continue
        walk.scope, scoped = (*scope, id(equation)), walk.scoped
        walk.scoped = scoped or equations.in_scope(equation, marks.ROW_MASK)
        outputs = _inner(equation, name, inputs, walk, loops)
        walk.scope, walk.scoped = scope, scoped
        if outputs is None:
            behind = origins.behind(equation, [fact.origins for fact in inputs])
            live = _derivative(name, inputs)
            numbered = _with_number(name, inputs)
            fact = _Fact(
                numbered or step(equation, trails), source, behind, live, number=_number(name, inputs)
            )
            batches = batch_axes.behind(equation, [fact.batch for fact in inputs])
            outputs = [fact._replace(batch=batch) for batch in batches]
            if name in CARRIED and len(inputs) == len(outputs) == 1:
                outputs[0] = outputs[0]._replace(number=inputs[0].number)
            how = _used if numbered is None else _unseen
            outputs = how(equation, inputs, outputs, walk, loops)
        for variable, fact in zip(equation.outvars, outputs, strict=False):
            known[variable] = own(fact, variable)
    walk.place = ahead
    return [read(v) for v in jaxpr.outvars]


def _used(equation: Any, inputs: list[_Fact], outputs: list[_Fact], walk: Walk, loops: int) -> list[_Fact]:
    """The facts of an equation's outputs where it uses a parameter by a rule, or adds a bias to such a use."""
    name, linear = equation.primitive.name, [fact.linear for fact in inputs]
    present = [output for output in linear if output is not None]
    if len(inputs) == 1 and present:
        moved = added.moved(present[0], equation) if name in _MOVED else None
        if moved:
            return [outputs[0]._replace(linear=moved)]
    if name in ("add", "add_any") and len(present) == 1 and any(fact.number == 0 for fact in inputs):
        return [outputs[0]._replace(linear=present[0])]
    walk.readers.update(output.use for output in present)
    if name in ("add", "add_any") and len(present) == 1:
        place = 0 if linear[0] is not None else 1
        bias = inputs[1 - place].trail
        if bias is not None and not bias.lost and bias.dims:
            shape = equation.invars[1 - place].aval.shape
            use = added.with_bias(walk.uses[present[0].use], present[0], bias, shape)
            if use is not None:
                walk.uses[present[0].use] = use
                return [outputs[0]._replace(trail=None)]
    found = rules.used(equation, [fact.trail for fact in inputs])
    if found is None or inputs[found.x].level == PARAMETERS:
        if outputs and outputs[0].level == DATA:
            _unruled(equation, inputs, walk)
        return _unseen(equation, inputs, outputs, walk, loops)
    x, index, out = inputs[found.x], len(walk.uses), outputs[0]
    fixed = x.level != DATA
    batch, labels = found.labels(x.batch), out.batch or found.labels_behind(x.batch)
    if fixed:
        # What is made for all examples shows where they are in what it feeds.
        source = (walk.scope, id(equation.outvars[0]))
        axis = found.kind.batch_axis(found.shapes[0])
        batch |= batch_axes.at(axis, jax.ShapeDtypeStruct(found.shapes[0], jnp.float32), source)
        labels |= batch_axes.at(0, equation.outvars[0].aval, source)
    info = {
        "mark": layer_mark,
        "rule": equations.written(equation),
        "x": found.x,
        "kind": found.kind,
        "roles": (found.role,),
        "shapes": found.shapes,
        "masked": walk.masked,
        "scoped": walk.scoped or equations.in_scope(equation, marks.ROW_MASK),
        "vmaps": (),
    }
    use = Use(
        found.trail, (found.trail,), info, walk.place, loops, x.level == NOTHING, fixed, x.origins, x.origins
    )
    walk.uses.append(dataclasses.replace(use, live=x.live, batch=batch))
    fact = _Fact(None, out.level, frozenset({Origin(index, SAME)}), frozenset({(index, 1)}), labels)
    paths = x.unseen.paths if x.level == DATA else frozenset()
    return _met(equation, paths, x.live, [fact._replace(linear=found.output(index))], walk, loops)


def _unruled(equation: Any, inputs: list[_Fact], walk: Walk) -> None:
    """Notes the parameters that meet data in an equation of which no rule makes a use."""
    for fact in inputs:
        trail = fact.trail
        if fact.level != PARAMETERS or trail is None:
            continue
        if trail.path not in walk.others:
            behind = f"{trail.lost}, then " if trail.lost else ""
            walk.others[trail.path] = behind + equations.written(equation)


def _unseen(
    equation: Any, inputs: Sequence[_Fact], outputs: list[_Fact], walk: Walk, loops: int
) -> list[_Fact]:
    """The facts of an equation's outputs, where parameters may meet data in a way that no tag sees."""
    given, data = [fact.unseen for fact in inputs], [fact.level == DATA for fact in inputs]
    rest, paths = unseen_rules.behind(equation, given, data)
    outputs = [fact._replace(unseen=rest) for fact in outputs]
    return _met(equation, paths, _lives(inputs), outputs, walk, loops)


def _met(
    equation: Any, paths: frozenset[Any], live: Live, outputs: list[_Fact], walk: Walk, loops: int
) -> list[_Fact]:
    """The facts of outputs where these parameters have met data; it counts if the loss's derivative reaches one of them."""
    if not paths:
        return outputs
    info = {"mark": marks.MET, "paths": paths, "rule": equations.written(equation)}
    met = frozenset({(len(walk.uses), 0)})
    walk.uses.append(Use(None, (), info, walk.place, loops, live=live))
    return [fact._replace(live=fact.live | met) for fact in outputs]


def _open(facts: Sequence[_Fact], variables: Sequence[Any]) -> frozenset[Any]:
    """The parameters that reach one of these values otherwise than by uses, single numbers apart."""
    pairs = zip(facts, variables, strict=True)
    return frozenset().union(*(fact.unseen.paths for fact, v in pairs if unseen_rules.size(v.aval) > 1))


def _read_by(facts: Sequence[_Fact], walk: Walk) -> None:
    """Notes that outputs of uses are read, where nothing behind that is followed."""
    walk.readers.update(fact.linear.use for fact in facts if fact.linear is not None)


def _mark_reached(equation: Any, inputs: Sequence[_Fact], walk: Walk, loops: int) -> _Fact:
    """Records the use, and the fact of the mark's output."""
    info = {"mark": equation.primitive, **equation.params}
    first = inputs[0]
    if equation.primitive is unsupported_mark:
        walk.uses.append(Use(first.trail, (), info, walk.place, loops))
        return first
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
    return _Fact(None, level, frozenset({Origin(index, SAME)}), frozenset({(index, 1)}), out)


def _loss_reached(
    equation: Any, inputs: Sequence[_Fact], info: dict[str, Any], walk: Walk, loops: int
) -> _Fact:
    """A registered loss: its outputs z are a use, and its elements, whose derivative reaches z and what else it is given."""
    _read_by(inputs, walk)
    open_ = _open(inputs, equation.invars)
    (z,) = _met(equation, open_, _lives(inputs), [inputs[0]], walk, loops)
    index = len(walk.uses)
    walk.uses.append(
        Use(None, (), info | {"mark": marks.OUTPUT}, walk.place, loops, live=z.live, batch=z.batch)
    )
    if not info["elements"]:
        return z._replace(trail=None, linear=None, unseen=NONE, live=frozenset({(index, 1)}))
    live = frozenset({(index, 1)}) | {(use, 0) for use, _ in _lives(inputs[1:])}
    rank = len(equation.outvars[0].aval.shape)
    batch = frozenset(label for label in z.batch if label.axis < rank)
    level = max(fact.level for fact in inputs)
    walk.uses.append(
        Use(None, (), info | {"mark": marks.ELEMENTS}, walk.place, loops, live=live, batch=batch)
    )
    return _Fact(None, level, _union(inputs), frozenset({(index + 1, 1)}), batch)


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


def _with_number(name: str, inputs: list[_Fact]) -> Trail | None:
    """The trail of a parameter to which a number is added, or by which it is multiplied; None where it is something else."""
    if name == "neg":
        inputs = [*inputs, _Fact(None, NOTHING, number=-1.0)]
    if len(inputs) != 2:
        return None
    place = 0 if inputs[1].number is not None else 1
    trail, number = inputs[place].trail, inputs[1 - place].number
    if trail is None or trail.lost or number is None:
        return None
    factors = {"mul": number, "neg": number, "add": 1.0, "sub": (1.0, -1.0)[place]}
    if (name, place) == ("div", 0) and number:
        factors["div"] = 1 / number
    factor = factors.get(name)
    return None if factor is None else dataclasses.replace(trail, factor=trail.factor * float(factor))


def _number(name: str, inputs: list[_Fact]) -> Any:
    """What an equation makes of numbers alone; None where it is not known."""
    numbers = [fact.number for fact in inputs]
    known = name in _ARITHMETIC and numbers and all(number is not None for number in numbers)
    return _ARITHMETIC[name](*numbers) if known else None


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
        joined, chosen_of = [], []
        for same, variable in zip(zip(*results, strict=True), equation.outvars, strict=True):
            trail = same[0].trail if all(fact.trail == same[0].trail for fact in same) else None
            chosen = origins.chosen(inputs[0].origins, _union(same))
            batch = batch_axes.joined([fact.batch for fact in same])
            fact = _Fact(trail, source, chosen, _lives(same), batch)
            _read_by(same, walk)
            if trail is not None or source != DATA:
                fact = fact._replace(unseen=_all_unseen(same))
            else:
                chosen_of += [(one, variable) for one in same]
            joined.append(fact)
        paths = _open(*zip(*chosen_of, strict=True)) if chosen_of else frozenset()
        return _met(equation, paths, frozenset(), joined, walk, loops)
    for program in equations.inner(equation):
        if name == "shard_map":
            # Inside is a device's share of the examples.
            inputs = [fact._replace(batch=UNKNOWN) for fact in inputs]
        paths, unknown = frozenset(), not equations.is_rebuilt(equation)
        if unknown:
            # Its derivative may be another one than that of its equations.
            _read_by(inputs, walk)
            paths, kept = _open(inputs, equation.invars), _all_unseen(inputs)
            inputs = [
                fact._replace(trail=left(fact.trail, name), linear=None, unseen=NONE) for fact in inputs
            ]
        results = _walk(program, inputs, walk, loops)
        if unknown and source == DATA:
            results = _met(equation, paths, _lives(inputs), results, walk, loops)
        elif unknown:
            results = [fact._replace(unseen=kept) for fact in results]
        if name == "shard_map":
            results = [fact._replace(batch=UNKNOWN) for fact in results]
        if name.startswith("custom_"):
            # A derivative of its own may reach what the function itself does not (a straight-through estimator).
            reached = frozenset((use, 0) for use, _ in _lives(inputs))
            results = [fact._replace(live=fact.live | reached) for fact in results]
        return results
    return None


def _all_unseen(facts: Sequence[_Fact]) -> Unseen:
    return Unseen(frozenset().union(*(fact.unseen.paths for fact in facts)))


def _scan(equation: Any, inputs: list[_Fact], source: int, walk: Walk, loops: int) -> list[_Fact]:
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
        inner.append(_Fact(trail, level, behind, fact.live, batch, unseen=rest))
    _read_by(inputs, walk)
    carried = slice(constants, constants + carries)
    start = len(walk.uses)
    results = _iterate(body, inner, (constants, carries if length > 1 else 0), walk, loops)
    if not equation.params["reverse"]:
        walk.uses[start:] = [
            dataclasses.replace(use, loop=start + 1) if use.loops == loops + 1 else use
            for use in walk.uses[start:]
        ]
    _read_by(results, walk)
    outputs = []
    for i, fact in enumerate(results):
        # The carry comes from the last iteration, what is stacked from all of them.
        if i < carries:
            outputs.append(_Fact(None, source, _later(fact.origins, start, LAST), fact.live, fact.batch))
        else:
            behind = origins.moved(_later(fact.origins, start, ANY))
            outputs.append(_Fact(None, source, behind, fact.live, batch_axes.stacked(fact.batch)))
    if source != DATA:
        return [fact._replace(unseen=_all_unseen([*inputs, *results])) for fact in outputs]
    live = _lives(inputs)
    for i in range(carries, len(outputs)):
        # NNX returns its parameters from a scan, too, where nothing reads them.
        paths = _open(results[i : i + 1], body.outvars[i : i + 1])
        outputs[i : i + 1] = _met(equation, paths, live, outputs[i : i + 1], walk, loops)
    paths = _open(inputs[carried], equation.invars[carried])
    paths |= _open(results[:carries], body.outvars[:carries])
    return _met(equation, paths, live, outputs, walk, loops)


def _while(equation: Any, inputs: list[_Fact], source: int, walk: Walk, loops: int) -> list[_Fact]:
    body = equation.params["body_jaxpr"].jaxpr
    skip = equation.params["cond_nconsts"]
    inner = [
        fact._replace(trail=left(fact.trail, "while"), level=source, batch=UNKNOWN, unseen=NONE)
        for fact in inputs[skip:]
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
    start, place = len(walk.uses), walk.place
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
        for use in [use for use in walk.readers if use >= start]:
            del walk.readers[use]
        walk.place = place
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


def float_leaf(leaf: Any) -> bool:
    """Whether a parameter can be differentiated."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jnp.inexact)
