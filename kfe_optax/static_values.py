"""The Python values among a function's arguments, apart from the arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Static:
    """The Python values among a function's arguments, hashable; called with the arrays it gives the arguments back."""

    structure: Any
    values: tuple[Any, ...]

    def __call__(self, arrays: list[Any]) -> Any:
        source = iter(arrays)
        leaves = [next(source) if value is _ARRAY else value for value in self.values]
        return jax.tree.unflatten(self.structure, leaves)


_ARRAY = object()


def split_static(tree: Any) -> tuple[list[Any], Static]:
    """Separates the arrays of a tree from everything that must stay a Python value (flags, names, counts)."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    values = tuple(_ARRAY if a else leaf for a, leaf in zip(is_array, leaves, strict=True))
    return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], Static(structure, values)
