"""The Python values among a function's arguments, apart from the arrays."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Static:
    """The Python values among a function's arguments, hashable; called with the arrays it gives the arguments back."""

    structure: Any
    values: tuple[Any, ...]

    def __call__(self, arrays: list[Any]) -> Any:
        source = iter(arrays)
        leaves = [
            next(source) if value is _ARRAY else value.value if isinstance(value, _Compared) else value
            for value in self.values
        ]
        return jax.tree.unflatten(self.structure, leaves)


_ARRAY = object()


@dataclasses.dataclass(frozen=True)
class _Compared:
    """A value that is compared by its content: a number by its type as well, a slice or a `ConfigDict` that has no hash."""

    value: Any = dataclasses.field(compare=False)
    content: Any


def split_static(tree: Any, name: Callable[[Any], str] = jax.tree_util.keystr) -> tuple[list[Any], Static]:
    """Separates the arrays of a tree from everything that must stay a Python value (flags, names, counts).

    Args:
      tree: the arguments.
      name: what to call the argument at a key path.

    Raises:
      TypeError: a value that cannot be compared, or that hides arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays, values = [], []
    for place, leaf in enumerate(leaves):
        if _is_array(leaf):
            arrays.append(leaf)
            values.append(_ARRAY)
            continue
        try:
            values.append(_comparable(leaf))
        except _UnknownError as error:
            path, _ = jax.tree_util.tree_leaves_with_path(tree)[place]
            raise TypeError(f"{name(path)} {error}") from None
    return arrays, Static(structure, tuple(values))


def split_call(given: Any) -> tuple[list[Any], Static]:
    """`split_static` of (state of NNX objects, args, kwargs) of a loss function."""

    def name(path):
        group = path[0].idx
        if group == 0:
            return "An NNX object"
        return f"Argument {path[1].idx + 1 if group == 1 else repr(path[1].key)} of the loss function"

    return split_static(given, name)


class _UnknownError(Exception):
    pass


def _is_array(leaf: Any) -> bool:
    # NumPy's types themselves have both, too.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def _comparable(value: Any) -> Any:
    if isinstance(value, numbers.Number):
        # 1, 1.0 and True are equal, and a program of one is not a program of another; a NaN is equal to nothing.
        return _Compared(value, (type(value), repr(value)))
    try:
        hash(value)
    except TypeError:
        return _Compared(value, _content(value))
    return value


def _content(value: Any) -> Any:
    """Something with a hash that is equal where the values are."""
    if _is_array(value):
        raise _UnknownError(
            "holds arrays in a container that JAX does not know: register its class (jax.tree_util.register_dataclass), or pass "
            "the arrays themselves."
        )
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return type(value), tuple((name, _content(getattr(value, name))) for name in fields)
    if callable(getattr(value, "items", None)):
        return type(value), frozenset((name, _content(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_content, value))
    if isinstance(value, set):
        return type(value), frozenset(value)
    try:
        hash(value)
    except TypeError:
        raise _UnknownError(
            f"holds a {type(value).__name__}, which is neither an array nor a value that can be compared (it has no hash): pass "
            "arrays, numbers, strings, dataclasses, or close over it."
        ) from None
    return value
