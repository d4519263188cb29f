"""Equal equations of a traced loss as one.

Forward mode in the loss traces a network once more for each direction, and so do a value and its derivatives that are asked for
apart: the products W x of the network itself stand in the program many times. They are one use of W whose cotangent is the sum
of theirs, and as such Σ ā gᵀ over the uses is still the gradient, while A = E[ā āᵀ] and G = E[g gᵀ] are those of a forward
Laplacian, which carries the value once. A program without equal equations stays as it is.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal

from kfe_optax._tracing import equations
from kfe_optax._tracing.numbering import Numbered, Numbering


def merged(program: Any, parameters: int | None = None) -> Any:
    """A closed program with equal equations as one.

    Calls by `jit` that share values with what is around them give way to their equations; the programs of loops, branches and
    `checkpoint` are merged within themselves.

    Args:
      program: a closed jaxpr.
      parameters: how many of its inputs, the first ones, are parameters; None: any may be.
    """
    own = _merged(program.jaxpr, {}, program.consts, parameters)
    return program if own is program.jaxpr else ClosedJaxpr(own, program.consts)


def _merged(
    program: Any,
    cache: dict[int, tuple[Any, Any]],
    constants: Sequence[Any] = (),
    parameters: int | None = None,
) -> Any:
    numbered = Numbering().program(program, constants, parameters)
    return _Merging(numbered.counts, cache).program(program, numbered)


@dataclasses.dataclass
class _Scope:
    """What a program makes so far.

    Attributes:
      values: {number: its variable}.
      eqns: the equations that remain.
      changed: whether that are others than before.
    """

    values: dict[int, Any]
    eqns: list[Any] = dataclasses.field(default_factory=list)
    changed: bool = False


class _Merging:
    """One numbered program and its calls.

    Attributes:
      counts: how often each value of data and parameters is computed.
      cache: {id of a program inside: (the program, the merged one)}.
    """

    def __init__(self, counts: collections.Counter[int], cache: dict[int, tuple[Any, Any]]):
        self._counts = counts
        self._cache = cache

    def program(self, program: Any, numbered: Numbered) -> Any:
        """A program whose equal equations are one; the program itself where it has none."""
        scope = _Scope(dict(zip(reversed(numbered.inputs), reversed(program.invars), strict=True)))
        outputs = self._into(scope, program, numbered, {}, copy=False)
        if not scope.changed:
            return program
        return program.replace(eqns=scope.eqns, outvars=outputs)

    def _into(
        self, scope: _Scope, program: Any, numbered: Numbered, names: dict[Any, Any], copy: bool
    ) -> list[Any]:
        """Adds a program's equations to a scope; its outputs there. `names`: what its variables are there, if not themselves.

        `copy`: with new variables, since the program may be called more than once.
        """

        def name(variable: Any) -> Any:
            return variable if isinstance(variable, Literal) else names.get(variable, variable)

        for index, equation in enumerate(program.eqns):
            made = numbered.made[index]
            wanted = [
                (v, n) for v, n in zip(equation.outvars, made, strict=True) if not equations.is_dropped(v)
            ]
            known = {v: scope.values[n] for v, n in wanted if n in scope.values}
            if wanted and len(known) == len(wanted):
                names.update(known)
                scope.changed = True
                continue
            if not wanted and made and index not in numbered.calls and self._counts[made[0]] > 1:
                # Nothing reads it, and it would only be one more that reads its operands.
                scope.changed = True
                continue
            operands = [name(v) for v in equation.invars]
            call = numbered.calls.get(index)
            if call is not None and self._is_shared(call):
                (inner,) = equations.inner(equation)
                outputs = self._into(
                    scope, inner, call, dict(zip(inner.invars, operands, strict=True)), copy=True
                )
                names.update(zip(equation.outvars, outputs, strict=True))
                scope.changed = True
                continue
            params = self._params(equation, call)
            outvars = [equations.renewed(v) for v in equation.outvars] if copy else equation.outvars
            if copy or params is not equation.params or _differ(operands, equation.invars):
                equation, before = (
                    equation.replace(invars=operands, outvars=outvars, params=params),
                    equation.outvars,
                )
                scope.changed = True
                names.update(zip(before, outvars, strict=True))
            scope.eqns.append(equation)
            # A call that is kept may return what is known already.
            names.update(known)
            for (v, n), variable in zip(wanted, [name(v) for v, _ in wanted], strict=True):
                if v not in known:
                    scope.values.setdefault(n, variable)
        outputs = [name(v) for v in program.outvars]
        scope.changed |= _differ(outputs, program.outvars)
        return outputs

    def _is_shared(self, call: Numbered) -> bool:
        """Whether something that a call computes is computed outside of it as well."""
        return any(count < self._counts[number] for number, count in call.counts.items())

    def _params(self, equation: Any, call: Numbered | None) -> dict[str, Any]:
        """An equation's parameters with the programs inside merged; those that they were where nothing is."""
        if call is not None:
            (inner,) = equations.inner(equation)
            return equations.with_programs(equation, [self.program(inner, call)])
        if not equations.is_rebuilt(equation) or equations.is_place(equation):
            return equation.params
        return equations.with_programs(equation, [self._inside(inner) for inner in equations.inner(equation)])

    def _inside(self, program: Any) -> Any:
        """A program of a loop, a branch or a `checkpoint`, which shares nothing with what is around it."""
        found = self._cache.get(id(program))
        if found is None:
            found = self._cache[id(program)] = program, _merged(program, self._cache)
        return found[1]


def _differ(own: Sequence[Any], others: Sequence[Any]) -> bool:
    return any(a is not b for a, b in zip(own, others, strict=True))
