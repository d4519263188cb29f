"""Primitives that stand in a traced loss where a layer was marked, a registered loss was met or a row mask begins.

They return what a plain program would have in their place, so that whatever is not replaced runs and is differentiated as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

OUTPUT, ELEMENTS = "output", "elements"
"""The two uses at a registered loss: its outputs z, and its elements, whose weights are counted."""

MET = "met"
"""Where parameters meet data in a way that is no use of a layer; no mark stands there."""

ROW_MASK = "kfe_row_mask_"
"""How the named scope of the equations in a `row_mask` inside the loss begins; its mark's serial number follows, or `LIFTED`."""
LIFTED = "lifted"

Vmaps = tuple[tuple[int, tuple[bool, ...]], ...]
"""The vmaps around a mark, innermost first: their sizes, and which of its operands they map (along the first axis)."""


def under_vmaps(function: Callable[..., Any], vmaps: Vmaps, *operands: Any) -> Any:
    """`function` of one mark's operands, inside the vmaps that were around it; mapped axes stand in front, outermost first."""
    for size, mapped in vmaps:
        axes = tuple(0 if is_mapped else None for is_mapped in mapped)
        function = jax.vmap(function, in_axes=axes, axis_size=size)
    return function(*operands)


def _batched(operands: Sequence[Any], dims: Sequence[Any]) -> tuple[list[Any], int, tuple[bool, ...]]:
    """The operands with the mapped axis in front, its size, and which have it."""
    size = next(v.shape[d] for v, d in zip(operands, dims, strict=True) if d is not None)
    moved = [v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(operands, dims, strict=True)]
    return moved, size, tuple(d is not None for d in dims)


def _mark(name: str) -> Any:
    """A primitive that returns its first operand."""
    primitive = Primitive(name)
    primitive.def_impl(lambda value, *rest, **params: value)
    primitive.def_abstract_eval(lambda value, *rest, **params: value)
    mlir.register_lowering(primitive, lambda ctx, value, *rest, **params: [value])

    def jvp(primals, tangents, **params):
        # What a derivative inside the loss adds is plain equations.
        return primitive.bind(*primals, **params), tangents[0]

    def batch(operands, dims, *, vmaps, **params):
        (first, *rest), size, mapped = _batched(operands, dims)
        if dims[0] is None:
            first = jnp.broadcast_to(first, (size, *first.shape))
        return primitive.bind(first, *rest, vmaps=(*vmaps, (size, mapped)), **params), 0

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


layer_mark = _mark("kfe_layer")  # operands: y, x, the layer's parameters as it used them, a row mask or none
mask_mark = _mark("kfe_mask")  # operands: a row mask, (n, ...)

loss_mark = Primitive(
    "kfe_loss"
)  # operands: the registered output z, the arrays among the loss's other arguments
loss_mark.def_impl(lambda *operands, program, **params: jaxpr_as_fun(program)(*operands)[0])
loss_mark.def_abstract_eval(lambda *operands, program, **params: program.out_avals[0])


def bind_loss(function: Callable[..., Any], vmaps: Vmaps, operands: Sequence[Any], **params: Any) -> Any:
    """The mark of a registered loss, `function(z, *arrays)` inside `vmaps`, with its plain program."""
    inside = functools.partial(under_vmaps, function, vmaps)
    program = jax.make_jaxpr(inside)(*operands)
    return loss_mark.bind(*operands, function=function, vmaps=vmaps, program=program, **params)


def _loss_jvp(primals, tangents, *, program, **params):
    # What a derivative inside the loss adds is plain equations.
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def plain(*given):
        operands = list(primals)
        for i, operand in zip(moving, given, strict=True):
            operands[i] = operand
        return jaxpr_as_fun(program)(*operands)[0]

    _, tangent = jax.jvp(plain, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))
    return loss_mark.bind(*primals, program=program, **params), tangent


def _loss_batch(operands, dims, *, function, vmaps, program, **params):
    del program
    moved, size, mapped = _batched(operands, dims)
    return bind_loss(function, (*vmaps, (size, mapped)), moved, **params), 0


def _loss_lowering(ctx, *operands, program, **params):
    return mlir.lower_fun(jaxpr_as_fun(program), multiple_results=True)(ctx, *operands)


ad.primitive_jvps[loss_mark] = _loss_jvp
batching.primitive_batchers[loss_mark] = _loss_batch
mlir.register_lowering(loss_mark, _loss_lowering)
