"""Where parameters stand in a tree: key paths as plain names."""

from __future__ import annotations

from typing import Any

import jax

Path = tuple[str | int, ...]


def key_path(path: tuple[Any, ...]) -> Path:
    """A JAX key path as plain names, the same for a dict, an `nnx.State` and an attribute."""
    names: list[str | int] = []
    for key in path:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                names.append(getattr(key, field))
                break
        else:
            names.append(str(key))
    # An NNX variable is a node with one child, its value.
    if names and names[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        names.pop()
    return tuple(names)


def path_name(path: Path) -> str:
    return "/".join(map(str, path))


def leaves_by_path(tree: Any) -> dict[Path, Any]:
    """{key path: leaf} of a parameter-shaped tree."""
    return {key_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
