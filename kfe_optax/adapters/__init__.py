"""Where riders meet frameworks: parameter trees (Linen, plain JAX) and `nnx.Module`s.

The rest of the library sees a *box* per slot, {parent key path: {name: array}}, and these functions:
`insert` puts boxes beside parameters, `strip` takes them out, `intercepting` makes Flax layers call `tags.tag`, `partition`
splits what a loss is called with into the parameters that are differentiated and everything else that is traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from flax.core import meta

from kfe_optax import layer as layer_lib
from kfe_optax import tags
from kfe_optax.adapters import linen, nnx

Boxes = Mapping[layer_lib.Path, dict[str, Any]]


@contextlib.contextmanager
def intercepting() -> Generator[None]:
    """Tags every supported Flax layer that is called in this context."""
    with linen.intercepting(), nnx.intercepting():
        yield


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
    """The call of a loss function from its parts (see `partition`), with riders; hashable, so static under `jax.jit`."""

    has_model: bool
    graph: Any  # of the NNX objects, None where there are none

    def __call__(self, parameters: Any, rest: Any, boxes: Boxes) -> Call:
        other, args, kwargs = rest
        if self.has_model:
            objects = nnx.merge(self.graph, parameters, other, boxes)
            params, others = objects[0], objects[1:]
        else:
            objects = others = [] if self.graph is None else nnx.merge(self.graph, None, other, {})
            params = insert_tree(parameters, boxes)
        return Call(params, *nnx.put_objects((args, kwargs), others), objects)


def partition(
    params: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> tuple[Any, Any, Rebuild, list[Any]]:
    """Splits what a loss function is called with into (parameters, rest, rebuild, objects).

    `rest` is (other state, args, kwargs) and `rebuild(parameters, rest, boxes)` the call. Of an `nnx.Module` the parameters are
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


def insert_tree(tree: Any, boxes: Boxes, path: layer_lib.Path = ()) -> Any:
    """The tree with a slot in each mapping named by `boxes`; lists, tuples and mappings are descended."""

    def child(key, value):
        return insert_tree(value, boxes, (*path, key))

    if isinstance(tree, Mapping):
        new = {key: child(key, value) for key, value in tree.items()}
        if path in boxes:
            new[tags.SLOT] = dict(boxes[path])
        # Linen's FrozenDict, OrderedDict and the like are built from a dict.
        return new if type(tree) is dict else type(tree)(new)
    if isinstance(tree, list):
        return [child(i, value) for i, value in enumerate(tree)]
    if isinstance(tree, tuple):
        children = [child(i, value) for i, value in enumerate(tree)]
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return tree


def strip(params: Any) -> Any:
    """`params` without slots."""
    if nnx.is_module(params):
        return nnx.strip(params)
    if isinstance(params, Mapping):
        new = {key: strip(value) for key, value in params.items() if key != tags.SLOT}
        return new if type(params) is dict else type(params)(new)
    if isinstance(params, list):
        return [strip(value) for value in params]
    if isinstance(params, tuple):
        children = [strip(value) for value in params]
        return type(params)(*children) if hasattr(params, "_fields") else tuple(children)
    return params


def slots(params: Any) -> dict[layer_lib.Path, tuple[str, ...]]:
    """{parent key path: names of its own parameters} for every place that can take a slot."""
    found: dict[layer_lib.Path, tuple[str, ...]] = {}
    if nnx.is_module(params):
        return nnx.slots(params)

    def visit(tree, path):
        if isinstance(tree, Mapping):
            # A parameter with metadata (partitioned over a mesh) stands in a box of Flax's.
            arrays = {key: meta.unbox(value) for key, value in tree.items()}
            own = tuple(k for k, v in arrays.items() if hasattr(v, "shape") and hasattr(v, "dtype"))
            if own and all(isinstance(k, str) for k in own):
                found[path] = own
            items = tree.items()
        elif isinstance(tree, list | tuple):
            items = enumerate(tree)
        else:
            return
        for key, value in items:
            visit(value, (*path, key))

    visit(params, ())
    return found
