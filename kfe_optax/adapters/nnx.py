"""Flax NNX: riders are `nnx.Param`s of a merged copy of the model; wrapped calls tag supported modules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Generator
from typing import Any

from flax import nnx

from kfe_optax import layers as layers_lib
from kfe_optax import tags

SUPPORTED: dict[type[nnx.Module], str] = {nnx.Linear: "dense"}
"""NNX module → kind. The wrapper sits on the class's own `__call__`; a subclass's `super().__call__` is its base's layer."""

_PREFIX = f"{tags.SLOT}_"
_patch_lock = threading.Lock()
_patch_users = 0
_originals: dict[type[nnx.Module], Callable[..., Any]] = {}


def is_module(params: Any) -> bool:
    return isinstance(params, nnx.Module)


def _wrap(original: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self, inputs, *args, **kwargs):
        y = original(self, inputs, *args, **kwargs)
        if tags.listener() is None:
            return y
        box = {
            name.removeprefix(_PREFIX): value[...]
            for name, value in vars(self).items()
            if name.startswith(_PREFIX)
        }
        bias = getattr(self, "bias", None) is not None
        roles = (("kernel", "kernel"), ("bias", "bias")) if bias else (("kernel", "kernel"),)
        return tags.tag(kind, roles, inputs, y, self.kernel[...], box)

    return call


@contextlib.contextmanager
def intercepting() -> Generator[None]:
    """A context in which supported NNX modules are tagged; nests, and other threads' calls pass through untouched."""
    global _patch_users
    with _patch_lock:
        if _patch_users == 0:
            for module, kind in SUPPORTED.items():
                _originals[module] = module.__call__
                module.__call__ = _wrap(module.__call__, kind)  # ty: ignore
        _patch_users += 1
    try:
        yield
    finally:
        with _patch_lock:
            _patch_users -= 1
            if _patch_users == 0:
                for module, original in _originals.items():
                    module.__call__ = original  # ty: ignore
                _originals.clear()


def partition(model: nnx.Module) -> tuple[Any, Any, Rebuild]:
    """(state of the `nnx.Param`s, all other state, rebuild); see `kfe_optax.adapters.partition`."""
    graph, parameters, other = nnx.split(model, nnx.Param, ...)
    return parameters, other, Rebuild(graph)


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """A copy of the model from its states, with riders; hashable, so that it can be static under `jax.jit`."""

    graph: Any

    def __call__(self, parameters: Any, other: Any, boxes: Any) -> nnx.Module:
        model = nnx.merge(self.graph, parameters, other, copy=True)
        for path, box in boxes.items():
            module = _descend(model, path)
            for name, value in box.items():
                setattr(module, _PREFIX + name, nnx.Param(value))
        return model


def _descend(node: Any, path: layers_lib.Path) -> Any:
    for key in path:
        node = node[key] if isinstance(key, int) or not hasattr(node, str(key)) else getattr(node, key)
    return node


def slots(model: nnx.Module) -> dict[layers_lib.Path, tuple[str, ...]]:
    """{module path: names of its own parameters}."""
    found: dict[layers_lib.Path, tuple[str, ...]] = {}
    for path in layers_lib.leaves_by_path(nnx.state(model, nnx.Param)):
        parent, name = path[:-1], path[-1]
        if isinstance(_descend(model, parent), nnx.Module) and isinstance(name, str):
            found[parent] = (*found.get(parent, ()), name)
    return found


def class_names(model: nnx.Module) -> dict[layers_lib.Path, str]:
    """{module path: class name}, for the reasons in the table."""
    return {path: type(_descend(model, path)).__name__ for path in slots(model)}


def strip(model: nnx.Module) -> Any:
    """The state of the model's own parameters."""
    return nnx.state(
        model,
        lambda path, value: isinstance(value, nnx.Param) and not str(path[-1]).startswith(_PREFIX),
    )


def other_state(model: nnx.Module) -> Any:
    """All state that is not a parameter (batch statistics, rng counts)."""
    return nnx.state(model, nnx.Not(nnx.Param))


def update(model: nnx.Module, state: Any) -> None:
    """Writes `state` back into the user's model, as `nnx.value_and_grad` does."""
    nnx.update(model, state)
