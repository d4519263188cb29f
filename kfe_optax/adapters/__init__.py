"""Where riders meet frameworks: parameter trees (Linen, plain JAX) and `nnx.Module`s.

The rest of the library sees a *box* per slot, {parent key path: {name: array}}, and these functions:
`insert` puts boxes beside parameters, `strip` takes them out, `intercepting` makes Flax layers call `tags.tag`, `partition`
splits what a user differentiates into parameters and everything else that is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

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


def partition(params: Any) -> tuple[Any, Any, Callable[[Any, Any, Boxes], Any]]:
    """Splits `params` into (parameters, other traced state, rebuild).

    `rebuild(parameters, other, boxes)` gives what the loss function takes. For a parameter tree `other` is empty; for an
    `nnx.Module` the parameters are the `nnx.State` of its `nnx.Param`s and `other` the rest of its state.
    """
    if nnx.is_module(params):
        return nnx.partition(params)
    return params, (), _rebuild_tree


def _rebuild_tree(parameters: Any, other: Any, boxes: Boxes) -> Any:
    del other
    return insert_tree(parameters, boxes)


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
