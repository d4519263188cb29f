"""Which values of a program are equal, whatever its inputs are: each value has a number, equal ones the same.

Two equations are equal where a primitive, its parameters and the numbers of its operands are. Calls by `jit` are looked through,
so that what a jitted activation makes of the same input is known to be the same in all of its calls; so are two loops or
branches with equal programs. No number is shared by equations with effects, with a derivative of their own (another rule may
have the same equations), by registered losses, and by a product to whose output parameters are added and one to whose output
none are: the bias belongs to the first alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from kfe_optax._marks.marks import loss_mark, mask_mark
from kfe_optax._tracing import equations
from kfe_optax._tracing.rules import RULES

_COMMUTATIVE = frozenset({"add", "add_any", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})
_ADDED = frozenset({"add", "add_any"})
_MOVED = frozenset({"convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "name"})

# A value depends on nothing, on the parameters, on other inputs, on both, or perhaps on either.
_PARAMETERS, _OTHERS, _BOTH, _ANY = 1, 2, 3, 7


@dataclasses.dataclass
class Numbered:
    """The numbers of a program, or of a call's at one of its places.

    Attributes:
      inputs: of its inputs.
      made: of the outputs of each equation.
      outputs: of its outputs.
      calls: {place of an equation that is looked through: its program's}.
      counts: how often each value of data and parameters is computed in it.
    """

    inputs: list[int]
    made: list[list[int]] = dataclasses.field(default_factory=list)
    outputs: list[int] = dataclasses.field(default_factory=list)
    calls: dict[int, Numbered] = dataclasses.field(default_factory=dict)
    counts: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)


class Numbering:
    """Gives numbers to the values of one program and of those inside it."""

    def __init__(self):
        self._new = itertools.count()
        self._known: dict[Hashable, tuple[Any, list[int]]] = {}
        self._depends: dict[int, int] = collections.defaultdict(int)

    def program(self, program: Any, constants: Sequence[Any] = (), parameters: int | None = None) -> Numbered:
        """The numbers of a program whose first inputs are parameters; None: any may depend on them."""
        count = len(program.invars)
        own = [_ANY] * count if parameters is None else [_PARAMETERS] * parameters
        given = [self._fresh(depends) for depends in own + [_OTHERS] * (count - len(own))]
        return self._numbered(program, given, [False] * len(program.outvars), constants)

    def _fresh(self, depends: int) -> int:
        number = next(self._new)
        self._depends[number] = depends
        return number

    def _numbered(
        self, program: Any, given: list[int], read: Sequence[bool], constants: Sequence[Any] = ()
    ) -> Numbered:
        found = Numbered(given)
        known = dict(zip(program.invars, given, strict=True))
        known.update((v, self._fresh(_OTHERS)) for v in program.constvars)
        known.update((v, self._array(v, each)) for v, each in zip(program.constvars, constants, strict=False))
        added = _added(program, read, [self._depends[number] for number in given])

        def number(variable: Any) -> int:
            return self._literal(variable) if isinstance(variable, Literal) else known[variable]

        for index, equation in enumerate(program.eqns):
            operands = [number(v) for v in equation.invars]
            behind = [v in added for v in equation.outvars]
            if is_looked_through(equation):
                (inner,) = equations.inner(equation)
                call = self._numbered(inner, operands, behind)
                found.calls[index], made = call, call.outputs
                found.counts.update(call.counts)
            else:
                made, shared = self._equation(equation, operands, behind)
                if shared and made and self._depends[made[0]] & _BOTH == _BOTH:
                    found.counts[made[0]] += 1
            found.made.append(made)
            known.update(zip(equation.outvars, made, strict=True))
        found.outputs = [number(v) for v in program.outvars]
        return found

    def _literal(self, literal: Any) -> int:
        return self._of((str(literal.aval), _exact(literal.val, literal.aval)), literal, [0])[1][0]

    def _array(self, variable: Any, value: Any) -> int:
        return self._of((str(variable.aval), _exact(value, variable.aval)), variable, [_OTHERS])[1][0]

    def _of(self, key: Hashable, made_by: Any, outputs: Sequence[int]) -> tuple[Any, list[int]]:
        """What is known under a key, and before that nothing is: this, with new numbers."""
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = made_by, [self._fresh(depends) for depends in outputs]
        return found

    def _equation(self, equation: Any, operands: list[int], behind: Sequence[bool]) -> tuple[list[int], bool]:
        """The numbers of an equation's outputs, and whether another equation may have them, too."""
        depends = 0
        for operand in operands:
            depends |= self._depends[operand]
        new = [depends] * len(equation.outvars)
        name = equation.primitive.name
        params = _hashable(equation.params) if may_be_shared(equation) else None
        if params is not None:
            first = sorted(operands) if name in _COMMUTATIVE else operands
            use = any(behind) if name in RULES else None
            same, numbers = self._of((equation.primitive, params, tuple(first), use), equation, new)
            if same is equation or _alike(same, equation):
                return numbers, True
        return [self._fresh(each) for each in new], False


def _exact(value: Any, aval: Any) -> Hashable:
    """The bits of a number or of a small NumPy array; of anything else (on a device, traced) which array it is."""
    known = aval.size <= 64 and not isinstance(value, jax.Array)
    return np.asarray(value).tobytes() if known else id(value)


def is_looked_through(equation: Any) -> bool:
    """Whether a call is nothing but its equations: a plain jit, of no `row_mask`."""
    if equation.primitive.name not in ("jit", "pjit") or equation.effects or equations.constants(equation):
        return False
    params = equation.params
    placed = (*params["in_shardings"], *params["out_shardings"])
    plain = all(type(each).__name__ == "UnspecifiedValue" for each in placed)
    options = any(params["donated_invars"]) or params.get("compiler_options_kvs")
    return plain and not options and equations.row_mask_of(equation) is None


def may_be_shared(equation: Any) -> bool:
    """Whether one equation may stand for all that are equal to it."""
    name = equation.primitive.name
    if equation.effects or equation.primitive in (loss_mark, mask_mark):
        return False
    if equations.row_mask_of(equation) is not None:
        return False  # the same function may be called with another mask
    own = name.startswith("custom_") or "callback" in name
    return not own and name not in ("optimization_barrier", "rng_uniform")


def _alike(first: Any, second: Any) -> bool:
    """Whether equal equations make values of the same type under the same circumstances."""
    types = ([v.aval for v in equation.outvars] for equation in (first, second))
    scoped = (equations.row_mask_of(equation) for equation in (first, second))
    circumstances = (getattr(equation, "ctx", None) for equation in (first, second))
    return all(a == b for a, b in (types, scoped, circumstances))


def _hashable(params: Any) -> Hashable | None:
    """An equation's parameters, programs by their structure; None where they cannot be compared."""
    try:
        key = tuple((name, type(value), _value(value)) for name, value in sorted(params.items()))
        hash(key)
    except TypeError:
        return None
    return key


def _value(value: Any) -> Hashable:
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return tuple(map(_value, value))
    program = getattr(value, "jaxpr", value)
    return _structure(program, getattr(value, "consts", ())) if hasattr(program, "eqns") else value


def _structure(program: Any, constants: Sequence[Any]) -> Hashable:
    """A program up to the names of its variables.

    Raises:
      TypeError: it holds what cannot be compared.
    """
    names: dict[Any, int] = {}

    def name(variable: Any) -> Hashable:
        if isinstance(variable, Literal):
            return str(variable.aval), np.asarray(variable.val).tobytes()
        return names.setdefault(variable, len(names))

    def typed(variables: Sequence[Any]) -> Hashable:
        return tuple((name(v), v.aval) for v in variables)

    found = [typed(program.constvars), tuple(map(id, constants)), typed(program.invars)]
    for equation in program.eqns:
        inner = is_looked_through(equation) or may_be_shared(equation)
        params = _hashable(equation.params) if inner else None
        if params is None:
            raise TypeError("an equation of its own")
        operands = tuple(map(name, equation.invars))
        found.append((equation.primitive, params, operands, typed(equation.outvars)))
    return (*found, tuple(map(name, program.outvars)))


def _added(program: Any, read: Sequence[bool], given: Sequence[int]) -> set[Any]:
    """The variables to which parameters are added, as they are or moved.

    `read`: which of the outputs are so outside; `given`: what the inputs depend on.
    """
    depends = dict(zip(program.invars, given, strict=True)) | dict.fromkeys(program.constvars, _OTHERS)
    for equation in program.eqns:
        own = [0 if isinstance(v, Literal) else depends[v] for v in equation.invars]
        behind = functools.reduce(operator.or_, own, 0)
        depends.update(dict.fromkeys(equation.outvars, behind))
    found = {v for v, flag in zip(program.outvars, read, strict=True) if flag and not isinstance(v, Literal)}
    for equation in reversed(program.eqns):
        name = equation.primitive.name
        own = [0 if isinstance(v, Literal) else depends[v] for v in equation.invars]
        flags = [v in found for v in equation.outvars]
        if name in _ADDED:
            passed = [other in (_PARAMETERS, _ANY) for other in reversed(own)]
        elif name in _MOVED:
            passed = flags * len(equation.invars)
        elif is_looked_through(equation):
            (inner,) = equations.inner(equation)
            through = _added(inner, flags, own)
            passed = [v in through for v in inner.invars]
        else:
            continue
        pairs = zip(equation.invars, passed, strict=True)
        found |= {v for v, flag in pairs if flag and not isinstance(v, Literal)}
    return found
