"""Flax NNX: objects are split into arrays and merged again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from kfe_optax._layers.paths import leaves_by_path


def is_module(params: Any) -> bool:
    return isinstance(params, nnx.Module)


@dataclasses.dataclass(frozen=True)
class Object:
    """Stands where an NNX object stood among the loss's arguments."""

    index: int


def take_objects(arguments: Any) -> tuple[Any, list[Any]]:
    """(arguments with an `Object` for each NNX object, the objects): streams of random numbers, metrics, further models."""
    # An `nnx.State` is values, as a tree of arrays is: a call does not move it.
    kinds = (nnx.Pytree, nnx.Variable)
    leaves, structure = jax.tree.flatten(
        arguments, is_leaf=lambda leaf: isinstance(leaf, (*kinds, nnx.State))
    )
    objects = [leaf for leaf in leaves if isinstance(leaf, kinds)]
    places = map(Object, range(len(objects)))
    return jax.tree.unflatten(
        structure, [next(places) if isinstance(v, kinds) else v for v in leaves]
    ), objects


def put_objects(arguments: Any, objects: list[Any]) -> Any:
    """The inverse of `take_objects`."""
    if not objects:
        return arguments
    return jax.tree.map(
        lambda leaf: objects[leaf.index] if isinstance(leaf, Object) else leaf,
        arguments,
        is_leaf=lambda leaf: isinstance(leaf, nnx.State),
    )


def _parameter(path: Any, value: Any) -> bool:
    return path[0] == 0 and isinstance(value, nnx.Param)


def split(objects: list[Any], has_model: bool) -> tuple[Any, Any, Any]:
    """(graph of the objects, state of the model's `nnx.Param`s, all other state); the model is the first of the objects.

    They are split together, so that what two of them share stays one.
    """
    if not has_model:
        graph, other = nnx.split(objects)
        return graph, None, other
    graph, parameters, other = nnx.split(objects, _parameter, ...)
    return graph, parameters.get(0, nnx.State({})), other


def merge(graph: Any, parameters: Any, other: Any) -> list[Any]:
    """Copies of the objects from their states."""
    states = [other] if parameters is None else [nnx.State({0: parameters}), other]
    return nnx.merge(graph, *states, copy=True)


def other_state(objects: list[Any], has_model: bool) -> Any:
    """All state that is not a parameter of the model (batch statistics, rng counts, metrics)."""
    return nnx.state(objects, nnx.Not(_parameter)) if has_model else nnx.state(objects)


def moved(before: Any, after: Any) -> Any:
    """The part of the state `after` a call that is no longer the array that it was `before`: a frozen model is not copied."""
    old = leaves_by_path(before)

    def new(path, variable):
        leaves = jax.tree.leaves(variable)
        return len(leaves) != 1 or old.get(tuple(path)) is not leaves[0]

    return nnx.filter_state(after, new)


def update(objects: list[Any], state: Any) -> None:
    """Writes `state` back into the user's objects, as `nnx.value_and_grad` does."""
    nnx.update(objects, state)
