"""What an equation makes of a parameter: a use that a rule knows, the bias of a use before it, or neither.

A scale γ may be multiplied with data m before the layer's input x is, as deviations are in many a norm: its trail goes on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.flow import SAME
from kfe_optax._marks import marks
from kfe_optax._tracing import batch_axes, data_contact, equations, rules
from kfe_optax._tracing.findings import Use, Walk
from kfe_optax._tracing.known import DATA, NOTHING, PARAMETERS, Fact, lives
from kfe_optax._tracing.origins import Origin
from kfe_optax._tracing.rules import bias as added
from kfe_optax._tracing.rules.base import Found, Output
from kfe_optax._tracing.trails import CARRIED
from kfe_optax._tracing.untagged import Unseen

# These move the entries of a layer's output, and change none.
_MOVED = CARRIED | {"name", "optimization_barrier", "transpose", "reshape", "squeeze"}
_ADDED = ("add", "add_any")

GONE = -2
"""The place of a row mask that the program does not have where the use is, as in a derivative of a call that opens it."""


def recorded(
    equation: Any, inputs: list[Fact], outputs: list[Fact], other: Fact | None, walk: Walk, loops: int
) -> list[Fact]:
    """The facts of an equation's outputs where it uses a parameter by a rule, or adds a bias to such a use."""
    name = equation.primitive.name
    present = [fact.linear for fact in inputs if fact.linear is not None]
    if len(inputs) == 1 and present:
        moved = added.moved(present[0], equation) if name in _MOVED else None
        if moved:
            return [outputs[0]._replace(linear=moved)]
    if name in _ADDED and len(present) == 1 and any(fact.number == 0 for fact in inputs):
        return [outputs[0]._replace(linear=present[0])]
    walk.readers.update(output.use for output in present)
    behind = None
    # What is repeated before something is added to it is no output of the use any more.
    present = [
        fact.linear
        for fact, v in zip(inputs, equation.invars, strict=True)
        if fact.linear is not None and v.aval.shape == equation.outvars[0].aval.shape
    ]
    if name in _ADDED and present:
        if len(present) == 1 and _has_bias(equation, inputs, present[0], walk):
            return [outputs[0]._replace(trail=None)]
        # A product with a parameter that is stopped has no bias.
        free = [output for output in present if not _is_stopped(walk.uses[output.use])]
        behind = added.summed(free or present)
        if behind is not None:
            # Whoever reads the sum is the reader.
            walk.readers[behind.use] -= 1
            outputs = [outputs[0]._replace(linear=behind)]
    if name == "mul" and other is not None and other.level == DATA and not _whole(other):
        kept = _kept(equation, inputs, outputs[0], walk)
        if kept is not None:
            return [kept]
    found = rules.used(equation, [fact.trail for fact in inputs])
    if found is None or inputs[found.x].level == PARAMETERS:
        if outputs and outputs[0].level == DATA:
            data_contact.note(equation, inputs, walk)
            outputs = _lost(equation, inputs, outputs, walk, loops)
        return data_contact.followed(equation, inputs, outputs, walk, loops)
    return _used(equation, found, inputs, outputs[0], behind, walk, loops)


def _has_bias(equation: Any, inputs: list[Fact], output: Output, walk: Walk) -> bool:
    """Whether what is added to the output of a use is its bias; the use has it from now on."""
    place = 0 if inputs[0].linear == output else 1
    bias = inputs[1 - place].trail
    if bias is None or bias.lost or not bias.dims:
        return False
    use = added.with_bias(walk.uses[output.use], output, bias, equation.invars[1 - place].aval.shape)
    if use is not None:
        walk.uses[output.use] = use
    return use is not None


def _used(
    equation: Any, found: Found, inputs: list[Fact], out: Fact, behind: Output | None, walk: Walk, loops: int
) -> list[Fact]:
    """Records a use; the fact of its output. `behind`: the use to whose output it is added."""
    x, index = _input(inputs, found), len(walk.uses)
    fixed = x.level != DATA
    batch, labels = found.labels(x.batch), out.batch or found.labels_behind(x.batch)
    if fixed:
        # What is made for all examples shows where they are in what it feeds.
        source = (walk.scope, id(equation.outvars[0]))
        sizes = [size for size, mapped in reversed(found.vmaps) if mapped[1]]
        axis = len(sizes) + found.kind.batch_axis(found.shapes[0])
        batch |= batch_axes.at(axis, jax.ShapeDtypeStruct((*sizes, *found.shapes[0]), jnp.float32), source)
        labels |= batch_axes.at(0, equation.outvars[0].aval, source)
    info = {
        "mark": marks.layer_mark,
        "rule": equations.written(equation),
        "x": found.x,
        "kind": found.kind,
        "roles": (found.role,),
        "shapes": found.shapes,
        "masked": walk.masked,
        "mask": None,
        **_masked(equation, walk),
        "vmaps": found.vmaps,
        "divided": walk.divided,
    }
    use = Use(
        found.trail, (found.trail,), info, walk.place, loops, x.level == NOTHING, fixed, x.origins, x.origins
    )
    walk.uses.append(dataclasses.replace(use, live=x.live, batch=batch))
    fact = Fact(None, out.level, frozenset({Origin(index, SAME)}), frozenset({(index, 1)}), labels)
    paths = x.unseen.paths if x.level == DATA else frozenset()
    linear = found.output(index) if found.role != "bias" else behind
    return data_contact.met(equation, paths, x.live, [fact._replace(linear=linear)], walk, loops)


def _kept(equation: Any, inputs: list[Fact], out: Fact, walk: Walk) -> Fact | None:
    """The fact of m γ, which data x alone will multiply: γ's trail goes on to x (m γ) = (x m) γ; None where it is a use."""
    trails = [fact.trail for fact in inputs]
    factors = [fact for fact in inputs if not _whole(fact) and fact.level != PARAMETERS]
    found = [trail for trail in trails if trail is not None and not trail.lost and trail.kept is None]
    if len(factors) != 1 or len(found) != 1 or found[0].flipped:
        return None
    place, own = inputs.index(factors[0]), trails.index(found[0])
    shape, wide = equation.invars[own].aval.shape, equation.outvars[0].aval.shape
    # Where m has the examples and the features itself, m γ is a use.
    if (
        len(shape) != len(wide)
        or equation.invars[place].aval.shape == walk.multiplied[equation.outvars[0]].aval.shape
    ):
        return None
    sizes = zip(found[0].dims, shape, wide, strict=True)
    trail = added.without_axes(found[0], shape, [dim >= 0 and a == 1 != b for dim, a, b in sizes])
    trail = dataclasses.replace(trail, kept=(walk.place, place))
    paths = factors[0].unseen.paths | {trail.path}
    return out._replace(trail=trail, unseen=Unseen(paths))


def _lost(equation: Any, inputs: list[Fact], outputs: list[Fact], walk: Walk, loops: int) -> list[Fact]:
    """The facts of outputs where a parameter that was multiplied with data is read by no use after all."""
    kept = [fact.trail for fact in inputs if fact.trail is not None and fact.trail.kept is not None]
    on = [fact.trail for fact in outputs if fact.trail is not None and not fact.trail.lost]
    paths = frozenset(trail.path for trail in kept if trail not in on)
    return data_contact.met(equation, paths, lives(inputs), outputs, walk, loops)


def _whole(fact: Fact) -> bool:
    return fact.trail is not None and not fact.trail.lost


def _input(inputs: list[Fact], found: Found) -> Fact:
    """The fact of the layer's input: of x m, where the parameter was multiplied with m before."""
    x = inputs[found.x]
    if found.trail.kept is None:
        return x
    (m,) = filter(_whole, inputs)
    unseen = Unseen(x.unseen.paths | m.unseen.paths - {found.trail.path})
    live, origins, batch = x.live | m.live, x.origins | m.origins, x.batch | m.batch
    return x._replace(level=DATA, live=live, origins=origins, batch=batch, unseen=unseen)


def _masked(equation: Any, walk: Walk) -> dict[str, Any]:
    """Whether rows of a use are masked by a `row_mask` inside the loss, and the place of the mask; {} where they are in none."""
    scope = equations.row_mask_of(equation) or walk.scoped
    if scope is None:
        return {}
    if scope == marks.LIFTED:
        return {"masked": False, "mask": -1}
    place, around = walk.masks.get(scope, (None, ()))
    if place is None or walk.scope[: len(around)] != around:
        return {"masked": True, "mask": GONE}
    return {"masked": True, "mask": place}


def _is_stopped(use: Use) -> bool:
    return use.trail is not None and use.trail.stopped
