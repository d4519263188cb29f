"""The form of jaxprs: the programs inside an equation, how equations are evaluated, where they were written.

All that JAX may change between releases.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax import core
from jax.extend.core import ClosedJaxpr, Literal, Var

from kfe_optax._marks.marks import ROW_MASK, layer_mark, loss_mark, mask_mark
from kfe_optax._tracing.rules import RULES

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})


def is_place(equation: Any) -> bool:
    """Whether an equation may be a use of a layer, a registered loss or the mark of a row mask."""
    return equation.primitive in (layer_mark, loss_mark, mask_mark) or equation.primitive.name in RULES


def is_rebuilt(equation: Any) -> bool:
    """Whether uses inside an equation can be tagged: what is none of these stays as it is (see `rebuild`)."""
    name = equation.primitive.name
    if name == "shard_map":
        # Without types it is not known on which devices a value is the same.
        return bool(equation.params["check_vma"]) and not any(map(_has_marks, inner(equation)))
    return is_place(equation) or name in _CALLS or name in ("scan", "cond")


def _has_marks(program: Any) -> bool:
    """Whether there is a registered loss or a row mask in a program."""
    return any(
        equation.primitive in (loss_mark, mask_mark) or any(map(_has_marks, inner(equation)))
        for equation in program.eqns
    )


def manual_axes(equation: Any) -> frozenset[Any]:
    """The axes over which a `shard_map` divides; JAX 0.8 and 0.9 name them otherwise than later releases."""
    params = equation.params
    return params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]


def is_divided(spec: Any) -> bool:
    """Whether a partition spec divides an array over devices."""
    return any(part is not None and part != () for part in spec)


def inner(equation: Any) -> list[Any]:
    """The programs inside an equation that are run with its operands (of a loop its body, of a branch all of them)."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return [params["jaxpr"].jaxpr]
    if name == "while":
        return [params["body_jaxpr"].jaxpr]
    if name == "cond":
        return [branch.jaxpr for branch in params["branches"]]
    if equation.primitive is loss_mark:
        return []
    for value in params.values():
        program = getattr(value, "jaxpr", value)
        if hasattr(program, "eqns") and len(program.invars) == len(equation.invars):
            return [program]
    return []


def constants(equation: Any) -> Sequence[Any]:
    """The values that the program inside a call closes over."""
    for value in equation.params.values():
        if hasattr(value, "jaxpr"):
            return value.consts
    return ()


def with_programs(equation: Any, programs: Sequence[Any]) -> dict[str, Any]:
    """An equation's parameters with other programs inside, in the order of `inner`; the same where those are the same."""
    others = {id(old): new for old, new in zip(inner(equation), programs, strict=True) if old is not new}
    if not others:
        return equation.params

    def replaced(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(replaced, value)) if any(hasattr(each, "jaxpr") for each in value) else value
        own = getattr(value, "jaxpr", value)
        if id(own) not in others:
            return value
        return others[id(own)] if own is value else ClosedJaxpr(others[id(own)], value.consts)

    return {name: replaced(value) for name, value in equation.params.items()}


def is_dropped(variable: Any) -> bool:
    """Whether nothing can read a variable."""
    return type(variable).__name__ == "DropVar"


def renewed(variable: Any) -> Any:
    """A variable of the same type, for an equation that is put into a program once more."""
    return variable if is_dropped(variable) else Var(variable.aval)


_CAST = ("convert_element_type", "pvary", "pcast")


def multiplied(program: Any) -> dict[Any, Any]:
    """{result of a product: what another product, its only reader but for casts, multiplies it with}."""
    made: dict[Any, Any] = {}  # what is a product, as it is or cast: the product
    readers = [v for v in program.outvars if not isinstance(v, Literal)]
    found = {}
    for equation in program.eqns:
        read = [v for v in equation.invars if not isinstance(v, Literal)]
        readers += read
        if equation.primitive.name == "mul":
            if len(read) == 2:
                found |= {v: other for v, other in zip(read, reversed(read), strict=True) if v in made}
            made[equation.outvars[0]] = equation.outvars[0]
        elif equation.primitive.name in _CAST and len(read) == 1 and read[0] in made:
            made[equation.outvars[0]] = made[read[0]]
    counts = collections.Counter(readers)
    several = {made[v] for v in made if counts[v] != 1}
    return {made[v]: other for v, other in found.items() if made[v] not in several}


def places(equation: Any) -> int:
    """How many places an equation has: uses are told apart by theirs, counted in the order of the program."""
    return is_place(equation) or sum(map(_places_of, inner(equation)))


def _places_of(program: Any) -> int:
    return sum(map(places, program.eqns))


def scan_carry(equation: Any) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan.

    Releases of JAX name these differently; the shapes say it in all of them: what is scanned over, in or out, has an axis
    more outside the body than inside.
    """
    body = equation.params["jaxpr"].jaxpr
    whole = sum(o.aval.shape == i.aval.shape for o, i in zip(equation.invars, body.invars, strict=True))
    carries = sum(o.aval.shape == i.aval.shape for o, i in zip(equation.outvars, body.outvars, strict=True))
    return whole - carries, carries


def context(equation: Any) -> contextlib.AbstractContextManager[Any]:
    """What was in force where the equation was traced (a mesh, the default precision)."""
    own = getattr(equation, "ctx", None)
    return contextlib.nullcontext() if own is None else own.manager


@functools.cache
def _empty() -> Any:
    return jax.make_jaxpr(lambda: 0)().jaxpr


def run(equations: Sequence[Any], wanted: Sequence[Any], known: dict[Any, Any]) -> None:
    """Evaluates equations, and adds the wanted ones of their variables to the known ones."""
    read: dict[Any, None] = {}
    made: set[Any] = set()
    for equation in equations:
        read.update(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal) and v not in made))
        made.update(equation.outvars)
    effects = frozenset().union(*(equation.effects for equation in equations))
    program = _empty().replace(eqns=list(equations), invars=list(read), outvars=list(wanted), effects=effects)
    results = core.eval_jaxpr(program, (), *(known[v] for v in read))
    known.update(zip(wanted, results, strict=True))


def result(equation: Any, operands: Sequence[Any]) -> Any:
    """The value of an equation of one output at these operands."""
    known = {
        v: value for v, value in zip(equation.invars, operands, strict=True) if not isinstance(v, Literal)
    }
    run([equation], equation.outvars, known)
    return known[equation.outvars[0]]


def row_mask_of(equation: Any) -> str | None:
    """The serial number of the innermost `row_mask` inside the loss in which an equation was traced, or `marks.LIFTED`."""
    found = re.findall(rf"{ROW_MASK}(\w+)", str(equation.source_info.name_stack))
    return found[-1] if found else None


def written(equation: Any) -> str:
    """The primitive, with the line of the user's program that it comes from, where it is known."""
    name = equation.primitive.name
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        file = Path(frame.file_name)
        if not _libraries() & set(file.parents):
            return f"{name} at {file.name}:{frame.line_num}"
    return name


@functools.cache
def _libraries() -> frozenset[Path]:
    """The folders of the packages whose lines are not the user's."""
    found = (importlib.util.find_spec(name) for name in ("jax", "flax", "optax", "kfe_optax"))
    return frozenset(Path(spec.origin).parent for spec in found if spec is not None and spec.origin)
