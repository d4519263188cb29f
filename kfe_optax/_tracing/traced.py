"""The loss as a program: one trace of it as a function of the parameters' leaves and of the arrays it is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from kfe_optax._jax import checks, varying_axes
from kfe_optax._statistics import tags
from kfe_optax._tracing import adapters, merging
from kfe_optax._tracing.adapters import linen


class Traced(NamedTuple):
    """A traced loss.

    Attributes:
      program: a closed jaxpr from the parameters' leaves and the arrays to the loss, `aux` and the state of NNX objects, equal
        equations as one.
      structure: of these outputs.
      registered: (spec, shape of the outputs, whether it has no weights) of each registered loss, in the order of tracing.
    """

    program: Any
    structure: Any
    registered: list[Any]


def trace(
    loss_fn: Any,
    rebuild: adapters.Rebuild,
    static: Any,
    has_aux: bool,
    parameters: Any,
    arrays: list[Any],
    row_mask: Any,
    axes: tuple[tuple[Any, int], ...] = (),
    varied: varying_axes.Axes = frozenset(),
    alone: bool = False,
) -> Traced:
    """Traces the loss with marks (see `marks`).

    `axes` are those of devices to bind, registered losses vary over those in `varied`, `alone` leaves out all but the loss.
    """
    listener = tags.Listener(varied)
    structures = []

    def function(leaves, arrays):
        call = rebuild(jax.tree.unflatten(container, leaves), static(arrays))
        loss, aux = checks.loss(loss_fn(call.params, *call.args, **call.kwargs), has_aux)
        outputs, structure = jax.tree.flatten(loss if alone else (loss, aux, call.state()))
        structures.append(structure)
        return outputs

    leaves, container = jax.tree.flatten(parameters)
    with tags.listening(listener), tags.masked_rows(row_mask), linen.intercepting():
        program = jax.make_jaxpr(function, axis_env=axes)(leaves, arrays)
    return Traced(merging.merged(program, len(leaves)), structures[-1], listener.registered)
