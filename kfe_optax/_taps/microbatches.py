"""A batch in k parts: microbatches, one after the other, of which one alone is in memory; or one part that stands for all."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax._jax import static_values, varying_axes

T = TypeVar("T")
BatchArguments = int | str | Sequence[int | str] | None


def check(microbatches: Any) -> int:
    """The number of microbatches.

    Raises:
      ValueError: it is not a positive whole number.
    """
    if isinstance(microbatches, bool) or not hasattr(microbatches, "__index__") or microbatches < 1:
        raise ValueError(f"microbatches must be a positive whole number, not {microbatches!r}.")
    return operator.index(microbatches)


def parts_of(name: str, fraction: Any) -> int:
    """k of a fraction 1/k of the batch.

    Raises:
      ValueError: it is none.
    """
    number = fraction if isinstance(fraction, int | float) and not isinstance(fraction, bool) else 0
    parts = round(1 / number) if 0 < number <= 1 else 0
    if not parts or abs(parts * number - 1) > 1e-6:
        raise ValueError(
            f"{name} is a part of the batch, 1/k with a whole number k, such as 1/8, not {fraction!r}."
        )
    return parts


def flags(
    divided: Mapping[str, int],
    chosen: BatchArguments,
    other: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    row_mask: Any,
) -> tuple[bool, ...]:
    """Which of the arrays of (other, args, kwargs), in the order of `static_values.split_static`, hold examples.

    Args:
      divided: {the option, as in "microbatches=4": k}; nothing is divided by k = 1.
      chosen: positions among the arguments of the loss (the parameters are 0) and names of keywords; None: every argument
        behind the parameters. Scalars are never divided.
      other: state of NNX objects, never divided.
      args: the arguments behind the parameters.
      kwargs: the keyword arguments.
      row_mask: divided as well.

    Raises:
      ValueError: leading axes that differ, or that k does not divide; arguments that do not exist.
    """
    wanted = (chosen,) if isinstance(chosen, int | str) else chosen
    # In the order in which JAX flattens: positions, then keywords by name.
    arguments = [*enumerate(args, start=1), *sorted(kwargs.items())]
    unknown = set(wanted or ()) - {name for name, _ in arguments}
    if unknown:
        raise ValueError(
            f"batch_arguments names {min(unknown, key=str)!r}, which is no argument of this call: it takes positions, from 1 "
            "behind the parameters, of what is passed by position, and names of what is passed by keyword."
        )
    divided = {option: parts for option, parts in divided.items() if parts > 1}
    found = [False] * len(static_values.split_static(other)[0])
    sizes: list[tuple[Any, int]] = []
    for name, argument in arguments:
        for leaf in static_values.split_static(argument)[0]:
            is_batch = bool(divided) and (wanted is None or name in wanted) and leaf.ndim > 0
            found.append(is_batch)
            sizes += [(name, leaf.shape[0])] if is_batch else []
    for option, parts in divided.items():
        _check_sizes(option, parts, sizes, row_mask)
    return tuple(found)


def _check_sizes(option: str, parts: int, sizes: list[tuple[Any, int]], row_mask: Any) -> None:
    if not sizes:
        raise ValueError(
            f"{option} finds no argument with examples: pass the batch as an argument of the loss, and name "
            "it with batch_arguments."
        )
    first, size = sizes[0]
    for name, here in sizes:
        if here != size:
            raise ValueError(
                f"{option} divides the leading axis of the loss's arguments, which has size {size} in "
                f"argument {first!r} and {here} in argument {name!r}: say which arguments hold the examples, as in "
                f"batch_arguments=({first!r},)."
            )
    if size % parts:
        raise ValueError(
            f"{option}: a batch of {size} examples has no {parts} equal parts; choose a divisor of {size}."
        )
    if row_mask is not None and jnp.shape(row_mask)[:1] != (size,):
        raise ValueError(
            f"row_mask has shape {jnp.shape(row_mask)}, but the batch {size} examples: give one entry an example first."
        )


def split(array: jax.Array, microbatches: int) -> jax.Array:
    """(n, ...) → (k, n/k, ...); part j holds the examples j, j + k, ..., so that a batch divided over devices stays so."""
    n, *shape = array.shape
    return jnp.moveaxis(array.reshape(n // microbatches, microbatches, *shape), 1, 0)


def one(array: jax.Array, parts: int, number: Any) -> jax.Array:
    """(n, ...) → (n/k, ...), part `number` of `split`."""
    n, *shape = array.shape
    return jax.lax.dynamic_index_in_dim(array.reshape(n // parts, parts, *shape), number, 1, keepdims=False)


def merge(stacked: Sequence[bool], parts: Sequence[Any], whole: Sequence[Any]) -> list[Any]:
    """The arrays of one microbatch: a part of those that are stacked, the others as they are."""
    sources: tuple[Iterator[Any], Iterator[Any]] = (iter(whole), iter(parts))
    return [next(sources[is_stacked]) for is_stacked in stacked]


def separate(stacked: Sequence[bool], arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(those that are stacked, the others); see `merge`."""
    parts = [a for a, is_stacked in zip(arrays, stacked, strict=True) if is_stacked]
    whole = [a for a, is_stacked in zip(arrays, stacked, strict=True) if not is_stacked]
    return parts, whole


def total(function: Callable[[Any], T], parts: Any) -> T:
    """Σ of `function` over the leading axis of all leaves of `parts`."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda v: v[0], parts))

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, function(part)), None

    return jax.lax.scan(add, jax.tree.map(varying_axes.zeros, shapes), parts)[0]
