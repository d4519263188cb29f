"""From a Flax module, Linen's or NNX's, to its kind: what both have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import opt_einsum

from kfe_optax._layers import dense_maps
from kfe_optax._layers.kinds import Dense, Embedding, Kind, Norm
from kfe_optax._tracing.adapters import convolutions

# (module, input, shape of the kernel) → the kind, or why there is none.
Maker = Callable[[Any, Any, tuple[int, ...]], Kind | str]


def _axes(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def dense(module: Any, x: jax.Array, kernel: tuple[int, ...]) -> Kind | str:
    del module, x, kernel
    return Dense()


def dense_general(module: Any, x: jax.Array, kernel: tuple[int, ...]) -> Kind | str:
    """Linen's `DenseGeneral` and NNX's `LinearGeneral`, which names its batch axes in a dict."""
    axes = _axes(module.axis)
    named = getattr(module, "batch_dims", None)
    batch = _axes(named) if named is not None else tuple(getattr(module, "batch_axis", {}))
    kind = dense_maps.general(x.ndim, axes, len(kernel) - len(axes) - len(batch), batch)
    return kind or "not a linear map of whole kernels"


def einsum(module: Any, x: jax.Array, kernel: tuple[int, ...], formula: str) -> Kind | str:
    operands, outputs, _ = opt_einsum.parser.parse_einsum_input(
        (formula, np.empty(x.shape), np.empty(kernel))
    )
    inputs, weights = operands.split(",")
    return (
        dense_maps.einsum(inputs, weights, outputs) or f"{formula!r} sums over an axis of one operand alone"
    )


def embedding(module: Any, x: jax.Array, kernel: tuple[int, ...]) -> Kind | str:
    del x
    if kernel[0] == 1:
        return "an embedding of a single token"
    return Embedding()


def norm(module: Any, x: jax.Array, parameters: tuple[str, ...]) -> Norm:
    """The kind of a normalization with these of its two parameters."""
    named = getattr(module, "feature_axes", getattr(module, "axis", -1))
    # Flax sorts them, and the parameters have their axes in that order.
    axes = tuple(sorted(axis % x.ndim - x.ndim for axis in _axes(named)))
    return Norm(parameters=parameters, axes=axes)


def conv(module: Any, x: jax.Array, kernel: tuple[int, ...]) -> Kind | str:
    del x, kernel
    return convolutions.conv(module)


def conv_local(module: Any, x: jax.Array, kernel: tuple[int, ...]) -> Kind | str:
    del x, kernel
    return convolutions.conv_local(module)


def conv_transpose(module: Any, x: jax.Array, kernel: tuple[int, ...]) -> Kind | str:
    del x, kernel
    return convolutions.conv_transpose(module)
