"""Where the library meets frameworks: parameter trees (Linen, plain JAX) and `nnx.Module`s.

`partition` splits what a loss is called with into the parameters that are differentiated and everything else that is traced.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from kfe_optax._tracing.adapters import nnx


class Call(NamedTuple):
    """What the loss function is called with.

    Attributes:
      params, args, kwargs: as in `loss_fn(params, *args, **kwargs)`.
      objects: the NNX objects among them, the model first.
    """

    params: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    objects: list[Any]

    def state(self) -> Any:
        """What the call may have moved: the state of the objects apart from the model's parameters; None without objects."""
        return nnx.other_state(self.objects, nnx.is_module(self.params)) if self.objects else None


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """The call of a loss function from its parts (see `partition`); hashable, so static under `jax.jit`."""

    has_model: bool
    graph: Any  # of the NNX objects, None where there are none

    def __call__(self, parameters: Any, rest: Any) -> Call:
        other, args, kwargs = rest
        if self.has_model:
            objects = nnx.merge(self.graph, parameters, other)
            params, others = objects[0], objects[1:]
        else:
            objects = others = [] if self.graph is None else nnx.merge(self.graph, None, other)
            params = parameters
        return Call(params, *nnx.put_objects((args, kwargs), others), objects)


def partition(
    params: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> tuple[Any, Any, Rebuild, list[Any]]:
    """Splits what a loss function is called with into (parameters, rest, rebuild, objects).

    `rest` is (other state, args, kwargs) and `rebuild(parameters, rest)` the call. Of an `nnx.Module` the parameters are
    the `nnx.State` of its `nnx.Param`s; the other state is what else it holds, and all that the NNX objects among the arguments
    hold. These objects, the model first, can be moved by a call (see `Call.state` and `nnx.update`).
    """
    (args, kwargs), objects = nnx.take_objects((args, kwargs or {}))
    has_model = nnx.is_module(params)
    if has_model:
        objects = [params, *objects]
    if not objects:
        return params, ((), args, kwargs), Rebuild(False, None), objects
    graph, own, other = nnx.split(objects, has_model)
    return own if has_model else params, (other, args, kwargs), Rebuild(has_model, graph), objects
