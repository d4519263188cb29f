"""A traced loss, evaluated once more with a tag at each of its places.

Equations without a place in them are run as they are, and so are functions with derivatives of their own and `while` loops. A
call that holds a place (jit, remat, a scan, a branch, a shard_map) is made anew by JAX's public functions. The riders of stacked
layers enter a scan as their parameters do, sliced along the first axis; all enter a shard_map whole, so that JAX adds up over its
devices what tags yield.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax.extend.core import Literal

from kfe_optax._marks.marks import Vmaps
from kfe_optax._tracing import equations
from kfe_optax._tracing.orientation import Moves

Riders = Mapping[int, Any]


class Place(NamedTuple):
    """A place that is tagged (see `equations.places`).

    Attributes:
      number: of the layer, or of the registered loss.
      route: for each scan around it, outermost first, whether it slices the layer's parameters.
      x: of an equation that is itself a use, the operand that is the layer's input.
      label: of such a use.
      factor: the number that the kernel was multiplied with.
      mask: the place of the row mask that it is in, −1 where that is lifted; None where it is the one of the whole batch.
      vmaps: of such a use, the vmaps around it, as of a mark.
      kept: (place, operand) of the data with which the layer's input is multiplied (see `Trail`).
      moves: the order of its axes in the layer's layout; None where it is the layer's own (see `orientation`).
    """

    number: int
    route: tuple[bool, ...] = ()
    x: int = -1
    label: str = ""
    moves: Moves | None = None
    factor: float = 1.0
    mask: int | None = None
    vmaps: Vmaps = ()
    kept: tuple[int, int] | None = None


class Kept(NamedTuple):
    """A place of which tags behind it need the operands: a row mask, data that a parameter is multiplied with."""

    place: int


class Tagger(Protocol):
    """Puts the tags on."""

    def __call__(self, place: Place | Kept, equation: Any, operands: list[Any], riders: Riders) -> Any:
        """The tagged result of the equation at a place."""


class Rebuild:
    """Evaluates a jaxpr with tags at the given places.

    Attributes:
      places: {number of the place: what is there}.
      tagger: puts the tags on.
    """

    def __init__(self, places: Mapping[int, Place | Kept], tagger: Tagger):
        self._places = places
        self._order = sorted(places)
        self._tagger = tagger

    def __call__(self, program: Any, arguments: Sequence[Any], riders: Riders) -> list[Any]:
        """The outputs of a closed jaxpr; riders by the layer's number, stacked axes first."""
        return self._run(program.jaxpr, program.consts, arguments, riders, 0, 0)

    def _within(self, first: int, count: int) -> list[int]:
        start, end = (bisect.bisect_left(self._order, place) for place in (first, first + count))
        return self._order[start:end]

    def _run(self, program, constants, arguments, riders, place, depth) -> list[Any]:
        known = dict(zip(program.constvars, constants, strict=True))
        known.update(zip(program.invars, arguments, strict=True))
        last = {v: i for i, equation in enumerate(program.eqns) for v in equation.invars if _is_variable(v)}
        last |= {v: len(program.eqns) for v in program.outvars if _is_variable(v)}
        plain: list[Any] = []

        def read(variable):
            return known[variable] if _is_variable(variable) else variable.val

        def flush(index):
            if plain:
                made = [v for equation in plain for v in equation.outvars if last.get(v, -1) >= index]
                equations.run(plain, made, known)
                plain.clear()

        for index, equation in enumerate(program.eqns):
            count = equations.places(equation)
            if equations.is_rebuilt(equation) and self._within(place, count):
                flush(index)
                operands = [read(v) for v in equation.invars]
                with equations.context(equation):
                    results = self._call(equation, operands, riders, place, depth)
                known.update(zip(equation.outvars, results, strict=True))
            else:
                plain.append(equation)
            place += count
        flush(len(program.eqns))
        return [read(v) for v in program.outvars]

    def _call(self, equation, operands, riders, place, depth) -> list[Any]:
        if equations.is_place(equation):
            return [self._tagger(self._places[place], equation, operands, riders)]
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(equation, operands, riders, place, depth)
        if name == "cond":
            return self._cond(equation, operands, riders, place, depth)
        if name == "shard_map":
            return self._shard_map(equation, operands, riders, place, depth)
        (program,) = equations.inner(equation)

        def body(*operands):
            return self._run(program, equations.constants(equation), operands, riders, place, depth)

        if name in ("checkpoint", "remat", "remat2"):
            again = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])
            return again(*operands)
        return body(*operands)

    def _shard_map(self, equation, operands, riders, place, depth) -> list[Any]:
        params = equation.params
        (program,) = equations.inner(equation)
        within = [self._places[p] for p in self._within(place, equations.places(equation))]
        own = {p.number: riders[p.number] for p in within if isinstance(p, Place)}

        def body(operands, own):
            return self._run(program, (), operands, own, place, depth)

        mapped = jax.shard_map(
            body,
            mesh=params["mesh"],
            in_specs=(list(params["in_specs"]), jax.P()),
            out_specs=list(params["out_specs"]),
            axis_names=equations.manual_axes(equation),
        )
        return mapped(operands, own)

    def _cond(self, equation, operands, riders, place, depth) -> list[Any]:
        branches = []
        for branch, program in zip(equation.params["branches"], equations.inner(equation), strict=True):

            def body(*operands, branch=branch, place=place):
                return self._run(branch.jaxpr, branch.consts, operands, riders, place, depth)

            branches.append(body)
            place += sum(map(equations.places, program.eqns))
        return jax.lax.switch(operands[0], branches, *operands[1:])

    def _scan(self, equation, operands, riders, place, depth) -> list[Any]:
        params = equation.params
        constants, carries = equations.scan_carry(equation)
        given, carry = operands[:constants], operands[constants : constants + carries]
        within = [self._places[p] for p in self._within(place, equations.places(equation))]
        sliced = {
            p.number: riders[p.number]
            for p in within
            if isinstance(p, Place) and p.route[depth : depth + 1] == (True,)
        }

        def body(carry, along):
            xs, own = along
            program = params["jaxpr"]
            arguments = [*given, *carry, *xs]
            outputs = self._run(program.jaxpr, program.consts, arguments, {**riders, **own}, place, depth + 1)
            return outputs[:carries], outputs[carries:]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        xs = operands[constants + carries :]
        carry, stacked = jax.lax.scan(body, list(carry), (list(xs), sliced), **options)
        return [*carry, *stacked]


def _is_variable(variable: Any) -> bool:
    return not isinstance(variable, Literal)
