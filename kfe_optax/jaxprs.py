"""Following probes through a jaxpr: from a variable beside a parameter to the tags that read it.

A probe enters the traced loss with the parameter's own shape. On its way to a tag it may be sliced by scans (stacked layers),
have an axis batched by vmap, be cast, or be broadcast over a loop (shared parameters). A *trail* records this; an operation
that is not on the list ends the trail, with its name as the reason.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Primitive
from jax.interpreters import ad, batching

_CARRIED = frozenset(
    {"convert_element_type", "copy", "copy_p", "sharding_constraint", "pvary", "pcast", "reshard"}
)


@dataclasses.dataclass(frozen=True)
class Trail:
    """What happened to a probe so far.

    Attributes:
      path: the key path of the parameter that the probe stands for.
      dims: the parameter's axes that the variable still has, in its order.
      stack: the (axis, size) pairs that scans consumed, outermost first.
      broadcast: True inside a loop that uses the same value in each iteration.
      stopped: True behind a stop_gradient.
      lost: the operation that ended the trail.
    """

    path: tuple[str | int, ...]
    dims: tuple[int, ...]
    stack: tuple[tuple[int, int], ...] = ()
    broadcast: bool = False
    stopped: bool = False
    lost: str | None = None


@dataclasses.dataclass(frozen=True)
class Use:
    """One tag reached.

    Attributes:
      trail: that of its probe; None where none reaches it.
      parameters: those of the parameters that the layer used.
      info: what the mark holds.
      loops: how many loops it is in.
      constant: whether the layer's input depends on neither data nor parameters.
    """

    trail: Trail | None
    parameters: tuple[Trail | None, ...]
    info: dict[str, Any]
    loops: int
    constant: bool = False


class InnerDerivativeError(ValueError):
    """The loss function differentiates a tagged layer or a registered loss itself."""


def _raise_forward_mode(*_, **__):
    raise InnerDerivativeError(
        "A tagged layer or a registered loss is differentiated inside the loss function itself (jvp, grad, hessian or a "
        "gradient penalty). Curvature tags work for one reverse-mode differentiation of the whole loss: move the inner "
        "derivative to an untagged copy of the model (jax.lax.stop_gradient does not help), or leave those layers out."
    )


def _mark(name: str) -> Any:
    """A primitive that returns its first operand and records the vmaps around it in its parameter `vmaps`."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda value, *rest, **params: value)
    ad.primitive_jvps[primitive] = _raise_forward_mode

    def batch(operands, dims, *, vmaps, **params):
        size = next(v.shape[d] for v, d in zip(operands, dims, strict=True) if d is not None)
        first = jnp.moveaxis(operands[0], dims[0], 0) if dims[0] is not None else operands[0]
        if dims[0] is None:
            first = jnp.broadcast_to(first, (size, *first.shape))
        rest = [
            v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(operands[1:], dims[1:], strict=True)
        ]
        mapped = tuple(d is not None for d in dims)
        return primitive.bind(first, *rest, vmaps=(*vmaps, (size, mapped)), **params), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


layer_mark = _mark("kfe_layer")  # operands: y, probe, x, the layer's parameters
output_mark = _mark("kfe_output")  # operands: the registered output z
unsupported_mark = _mark("kfe_unsupported")  # operands: probe


# How a parameter meets data in a layer. (A loss may read parameters in any other way, a prior's squares for instance.)
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "gather"})


@dataclasses.dataclass
class Walk:
    """What was met on the way: the marks in order of execution, and the products of each parameter with data."""

    uses: list[Use] = dataclasses.field(default_factory=list)
    products: collections.Counter = dataclasses.field(default_factory=collections.Counter)


# What a variable depends on at most.
NOTHING, PARAMETERS, DATA = 0, 1, 2
# Of a variable: its trail, and what it depends on.
_Fact = tuple[Trail | None, int]


def follow(jaxpr: Any, trails: Sequence[Trail | None]) -> Walk:
    """Walks a closed jaxpr for the trails of its inputs; those without one are data, and so are arrays that it closes over."""
    walk = Walk()
    facts = [(trail, DATA if trail is None else PARAMETERS) for trail in trails]
    _walk(jaxpr.jaxpr, facts, walk, loops=0)
    return walk


def _walk(jaxpr: Any, facts: Sequence[_Fact], walk: Walk, loops: int) -> list[_Fact]:
    known = dict(zip(jaxpr.invars, facts, strict=True))
    known.update(dict.fromkeys(jaxpr.constvars, (None, DATA)))

    def read(variable) -> _Fact:
        if isinstance(variable, Literal):
            # An array that the loss closes over may stand in the program itself; it is data, where a number is not.
            return None, DATA if np.ndim(variable.val) else NOTHING
        return known.get(variable, (None, NOTHING))

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        trails = [trail for trail, _ in inputs]
        source = max((level for _, level in inputs), default=NOTHING)
        name = equation.primitive.name
        if equation.primitive in (layer_mark, output_mark, unsupported_mark):
            position = {layer_mark: 1, unsupported_mark: 0}.get(equation.primitive)
            trail = None if position is None else trails[position]
            info = {"mark": equation.primitive, **equation.params}
            if equation.primitive is layer_mark:
                walk.uses.append(Use(trail, tuple(trails[3:]), info, loops, inputs[2][1] == NOTHING))
            else:
                walk.uses.append(Use(trail, (), info, loops))
            known.update(dict.fromkeys(equation.outvars, (None, inputs[0][1])))
            continue
        if name in _PRODUCTS and source == DATA:
            walk.products.update(trail.path for trail in trails if trail is not None and not trail.lost)
        outputs = _inner(equation, name, inputs, walk, loops)
        if outputs is None:
            outputs = [(_step(equation, name, trails), source)] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=False))
    return [read(v) for v in jaxpr.outvars]


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
    source = max((level for _, level in inputs), default=NOTHING)
    if name == "scan":
        body = params["jaxpr"].jaxpr
        constants, carries = _scan_carry(equation, body)
        inner = []
        for i, (trail, level) in enumerate(inputs):
            # What a carry becomes may depend on all that goes in.
            level = source if constants <= i < constants + carries else level
            inner.append((_into_scan(trail, i, (constants, carries), params["length"]), level))
        _walk(body, inner, walk, loops + 1)
        return [(None, source)] * len(equation.outvars)
    if name == "while":
        skip = params["cond_nconsts"]
        inner = [(_broadcast(trail), source) for trail, _ in inputs[skip:]]
        _walk(params["body_jaxpr"].jaxpr, inner, walk, loops + 1)
        return [(None, source)] * len(equation.outvars)
    if name == "cond":
        results = [_walk(b.jaxpr, inputs[1:], walk, loops) for b in params["branches"]]
        return [
            (first[0] if all(first[0] == other[i][0] for other in results) else None, source)
            for i, first in enumerate(results[0])
        ]
    for value in params.values():
        inner_jaxpr = getattr(value, "jaxpr", value)
        if hasattr(inner_jaxpr, "eqns") and len(inner_jaxpr.invars) == len(inputs):
            return _walk(inner_jaxpr, inputs, walk, loops)
    return None


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
