"""Flax NNX: wrapped calls mark supported modules; objects are split into arrays and merged again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kfe_optax._layers.kinds import Dense, Kind
from kfe_optax._layers.kinds.base import TRANSPOSED
from kfe_optax._layers.kinds.embedding import LOOKUP
from kfe_optax._layers.paths import Path, leaves_by_path
from kfe_optax._statistics import tags
from kfe_optax._tracing.adapters import modules

SUPPORTED: dict[type[nnx.Module], modules.Maker] = {
    nnx.Linear: modules.dense,
    nnx.LinearGeneral: modules.dense_general,
    nnx.Conv: modules.conv,
    nnx.ConvTranspose: modules.conv_transpose,
}
"""NNX modules of one kernel → kind. The wrapper sits on the class's own `__call__`; a subclass's `super().__call__` is its base's
layer."""

NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.RMSNorm)

_patch_lock = threading.Lock()
_patch_users = 0
_originals: dict[tuple[type[nnx.Module], str], Callable[..., Any]] = {}


def is_module(params: Any) -> bool:
    return isinstance(params, nnx.Module)


def _own(module: nnx.Module) -> tuple[Any, ...]:
    """The parameters of the module itself."""
    return tuple(value[...] for value in vars(module).values() if isinstance(value, nnx.Param))


Function = Callable[..., Any]
# (original, module, *args, **kwargs) → the marked output.
Tagger = Callable[..., Any]


def _wrap(original: Function, tagger: Tagger) -> Function:
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        if tags.listener() is None or not _own(self):
            return original(self, *args, **kwargs)
        return tagger(original, self, *args, **kwargs)

    return call


def _kernel_tagger(make: modules.Maker) -> Tagger:
    def tagger(original, module, inputs, *args, **kwargs):
        y = original(module, inputs, *args, **kwargs)
        return _marked(module, make(module, inputs, module.kernel[...].shape), inputs, y)

    return tagger


def _marked(module: Any, kind: Kind | str, x: Any, y: Any) -> Any:
    if isinstance(kind, str):
        tags.mark_unsupported(kind, _own(module))
        return y
    roles = ("kernel",) if getattr(module, "bias", None) is None else ("kernel", "bias")
    return tags.mark_layer(kind, roles, x, y, tuple(getattr(module, name)[...] for name in roles))


def _einsum(original, module, inputs, einsum_str=None, **kwargs):
    y = original(module, inputs, einsum_str, **kwargs)
    formula = einsum_str or module.einsum_str
    return _marked(module, modules.einsum(module, inputs, module.kernel[...].shape, formula), inputs, y)


def _embedding_tagger(use: str, name: str) -> Tagger:
    def tagger(original, module, *args, **kwargs):
        y = original(module, *args, **kwargs)
        inputs = args[0] if args else kwargs[name]
        table = module.embedding[...]
        kind = modules.embedding(module, inputs, table.shape)
        if isinstance(kind, str):
            tags.mark_unsupported(kind, (table,))
            return y
        return tags.mark_layer(kind, ("kernel",), inputs, y, (table,), use, jnp.float32)

    return tagger


class _Unmoved(nnx.BatchStat):
    """Batch statistics that keep their value when a normalization moves them."""

    def __setitem__(self, key, value):
        del key, value


def _bare(module: nnx.Module) -> nnx.Module:
    """The normalization without scale and shift, and with batch statistics of its own."""
    bare = object.__new__(type(module))
    # Past `Module.__setattr__`, which would check and register what lives for one call.
    vars(bare).update(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, nnx.BatchStat):
            vars(bare)[name] = _Unmoved(value[...])
    vars(bare).update({name: None for name in ("scale", "bias") if hasattr(module, name)})
    return bare


def _norm(original, module, x, *args, **kwargs):
    y = original(module, x, *args, **kwargs)
    present = tuple(name for name in ("scale", "bias") if getattr(module, name, None) is not None)
    # One equation of the program around it: NNX looks for the origin of what it writes to batch statistics in all of them.
    normalized = jax.jit(lambda x: original(_bare(module), x, *args, **kwargs))(jax.lax.stop_gradient(x))
    kind = modules.norm(module, x, present)
    return tags.mark_layer(
        kind, present, normalized, y, tuple(getattr(module, name)[...] for name in present)
    )


def _lora(original, module, x, *args, **kwargs):
    """x A B + base(x), with A and B as two dense layers; the wrapped module cannot say what is between them."""
    x, a, b = module.promote_dtype((x, module.lora_a[...], module.lora_b[...]), dtype=module.dtype)
    hidden = tags.mark_layer(Dense(), ("kernel",), x, x @ a, (module.lora_a[...],))
    y = tags.mark_layer(Dense(), ("kernel",), hidden, hidden @ b, (module.lora_b[...],))
    return y if module.base_module is None else y + module.base_module(x, *args, **kwargs)


_TAGGERS: dict[tuple[type[nnx.Module], str], Tagger] = {
    **{(module, "__call__"): _kernel_tagger(make) for module, make in SUPPORTED.items()},
    **{(module, "__call__"): _norm for module in NORMS},
    (nnx.Einsum, "__call__"): _einsum,
    (nnx.Embed, "__call__"): _embedding_tagger(LOOKUP, "inputs"),
    (nnx.Embed, "attend"): _embedding_tagger(TRANSPOSED, "query"),
    (nnx.LoRA, "__call__"): _lora,
}


@contextlib.contextmanager
def intercepting() -> Generator[None]:
    """A context in which supported NNX modules mark themselves; nests, and other threads' calls pass through untouched."""
    global _patch_users
    with _patch_lock:
        if _patch_users == 0:
            for (module, method), tagger in _TAGGERS.items():
                original = getattr(module, method)
                _originals[module, method] = original
                setattr(module, method, _wrap(original, tagger))
        _patch_users += 1
    try:
        yield
    finally:
        with _patch_lock:
            _patch_users -= 1
            if _patch_users == 0:
                for (module, method), original in _originals.items():
                    setattr(module, method, original)
                _originals.clear()


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


def _descend(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key] if isinstance(key, int) or not hasattr(node, str(key)) else getattr(node, key)
    return node


def class_names(model: nnx.Module) -> dict[Path, str]:
    """{module path: class name} of the modules with parameters of their own, for the reasons in the table."""
    parents = {path[:-1] for path in leaves_by_path(nnx.state(model, nnx.Param))}
    return {path: type(_descend(model, path)).__name__ for path in parents}


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
