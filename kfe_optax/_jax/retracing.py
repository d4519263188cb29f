"""Keeps JAX from serving what is traced here from its tracing caches."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

_context = jax.make_user_context(None)


def fresh() -> contextlib.AbstractContextManager[Any]:
    """A context in which an inner jit, remat or scan that was traced before is traced anew.

    What surrounds a trace (tags, masks) is part of it, but not of the key of JAX's caches; a fresh value of a user context is.
    """
    return _context(object())
