"""The per-example gradients of one layer over all draws of its taps, and their inner products, without the gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax._layers.layer import Layer
from kfe_optax._linalg.kronecker import Eigenbasis

# Numbers that an intermediate result may hold: 64 MiB in float32.
BUDGET = 2**24
MAX_SIZE = 8192

F = TypeVar("F", bound=Callable[..., Any])


def precise(function: F) -> F:
    """Full precision in every matrix product: an accelerator's short floats would be measured instead of the method."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped  # ty: ignore[invalid-explicit-return]


class Examples(NamedTuple):
    """What the gradients M (one for each draw and example) are made of; F = weight Σ vec(M) vec(M)ᵀ.

    Attributes:
      a: ā (s, n, t, d_in), the same in every draw; None for a layer that keeps its gradients whole.
      g: (s, draws, n, t, d_out), or the gradients (s, draws, n, d_in d_out); s stacked layers.
      weight: 1/n, over the number of samples.
    """

    a: jax.Array | None
    g: jax.Array
    weight: float


def collect(tap: Any) -> Examples:
    """All draws of a tap; inside `pmap` the examples of all devices."""
    layer, plan = layer_of(tap), tap.taps.plan

    def read(index):
        statistics = tap.taps.draw(index)[tap.name]
        return (None, statistics.example_gradients()) if not layer.has_rows else statistics.rows()

    if plan.draws == 1:
        a, g = read(0)
        g = g[None]
    else:
        a = read(0)[0]
        g = jax.lax.map(lambda index: read(index)[1], jnp.arange(plan.draws))
    stacked = len(layer.stack_shape)
    if not layer.has_rows:
        g = g.reshape(*g.shape[:-2], -1)
    if plan.axis_name is not None:
        g = jax.lax.all_gather(g, plan.axis_name, axis=stacked + 1, tiled=True)
        a = None if a is None else jax.lax.all_gather(a, plan.axis_name, axis=stacked, tiled=True)
    g = jnp.moveaxis(g, 0, stacked)
    size = math.prod(layer.stack_shape)
    g = g.reshape(size, *g.shape[stacked:])
    a = None if a is None else a.reshape(size, *a.shape[stacked:])
    return Examples(a, g, draw_weight(tap) / g.shape[2])


def draw_weight(tap: Any) -> float:
    """Exact columns are summed, samples averaged."""
    plan = tap.taps.plan
    return 1.0 if plan.fisher == "exact" else 1 / plan.draws


def gram(x: tuple[Any, Any], y: tuple[Any, Any]) -> jax.Array:
    """⟨M_c,n , M_c',m⟩ over draws c and examples n of one layer (a, g) and those of another, (draws, n, draws, m)."""
    (a, g), (b, h) = x, y
    if a is None:
        return jnp.einsum("xnp,ymp->xnym", g, h)
    if by_position(a, g):
        # Σ_tt' (ā_t·ā_t')(g_t·g_t'): the gradients themselves are never there.
        inputs = jnp.einsum("nta,mua->ntmu", a, b)
        outputs = jnp.einsum("xntb,ymub->xntymu", g, h)
        return jnp.sum(inputs[None, :, :, None] * outputs, (2, 5))
    gradients = (jnp.einsum("nta,xntb->xnab", a, g) for a, g in (x, y))
    return jnp.einsum("xnab,ymab->xnym", *gradients)


def by_position(a: jax.Array, g: jax.Array) -> bool:
    """Whether products of positions are cheaper than gradients; always with one position an example."""
    t, d_in, d_out = a.shape[-2], a.shape[-1], g.shape[-1]
    return t == 1 or t * t * (d_in + d_out) <= d_in * d_out


def chunk_of(examples: Examples) -> int:
    """How many examples `gram` takes at once within the budget."""
    a, g = examples.a, examples.g
    draws, n = g.shape[1:3]
    pairs = math.isqrt(BUDGET) // draws
    if a is not None:
        pairs = pairs // a.shape[-2] if by_position(a, g) else pairs
        if not by_position(a, g):
            pairs = min(pairs, BUDGET // (draws * a.shape[-1] * g.shape[-1]))
    return max(1, min(pairs, n))


def split(a: Any, g: jax.Array, chunk: int) -> tuple[Any, jax.Array]:
    """(n, ...) and (draws, n, ...) → (chunks, chunk, ...) and (chunks, draws, chunk, ...), padded with zeros."""
    n = g.shape[1]
    count = -(-n // chunk)

    def cut(v, axis):
        v = jnp.pad(v, [(0, count * chunk - n if i == axis else 0) for i in range(v.ndim)])
        v = v.reshape(*v.shape[:axis], count, chunk, *v.shape[axis + 1 :])
        return jnp.moveaxis(v, axis, 0)

    return (None if a is None else cut(a, 0)), cut(g, 1)


def squared_gram(a: Any, g: jax.Array, chunk: int) -> jax.Array:
    """Σ ⟨M, M'⟩² over all pairs of gradients of one layer, `chunk` × `chunk` examples at a time."""
    pieces = split(a, g, chunk)
    rows, columns = np.triu_indices(pieces[1].shape[0])

    def pair(index):
        row, column = index
        x, y = (jax.tree.map(lambda v, i=i: v[i], pieces) for i in (row, column))
        square = jnp.square(gram(x, y))
        # In two stages: a single long sum of float32 numbers would lose digits.
        return jnp.where(row == column, 1, 2) * jnp.sum(jnp.sum(square, (2, 3)))

    return jnp.sum(jax.lax.map(pair, (jnp.asarray(rows), jnp.asarray(columns))))


def whole_gram(a: Any, g: jax.Array, chunk: int) -> jax.Array:
    """All inner products of the gradients of one layer, (draws n, draws n)."""
    draws, n = g.shape[:2]
    pieces = split(a, g, chunk)
    rows = jax.lax.map(lambda x: gram(x, (a, g)), pieces)  # (chunks, draws, chunk, draws, n)
    rows = jnp.moveaxis(rows, 0, 1).reshape(draws, -1, draws * n)[:, :n]
    return rows.reshape(draws * n, draws * n)


def layer_of(tap: Any) -> Layer:
    return tap.taps.layers[tap.name]


def vectors(side: Any) -> jax.Array | None:
    """The eigenvectors of an `Eigenbasis`, or what was given in its stead; None is the identity."""
    return side.vectors if isinstance(side, Eigenbasis) else side


def check_size(what: str, size: int, max_size: int, instead: str) -> None:
    if size > max_size:
        raise ValueError(
            f"{what} has {size} rows, more than max_size={max_size}: it would take {size * size * 4 / 2**30:.1f} GiB in float32. "
            f"{instead}, or raise max_size."
        )


def check_basis(layer: Layer, basis: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """(U_A, U_G), each a matrix or None."""
    if not isinstance(basis, tuple | list) or len(basis) != 2:
        raise ValueError("A basis is a pair (input side, output side) of Eigenbasis, of matrices or of None.")
    found = (vectors(basis[0]), vectors(basis[1]))
    for side, (matrix, d) in enumerate(zip(found, layer.sides, strict=True)):
        expected = (*layer.stack_shape, d, d)
        if matrix is not None and matrix.shape != expected:
            raise ValueError(
                f"The {('input', 'output')[side]} basis of layer {layer.name!r} has shape {expected}, not {matrix.shape}."
            )
    return found


def check_terms(layer: Layer, terms: Any) -> tuple[tuple[jax.Array, jax.Array], ...]:
    pairs = check_pairs(terms)
    for pair in pairs:
        for side, (factor, d) in enumerate(zip(pair, layer.sides, strict=True)):
            diagonal = (*layer.stack_shape, d)
            if factor.shape not in (diagonal, (*diagonal, d)):
                raise ValueError(
                    f"The {('input', 'output')[side]} factor of layer {layer.name!r} has shape {(*diagonal, d)}, or {diagonal} "
                    f"as a diagonal, not {factor.shape}."
                )
    return pairs


def check_pairs(terms: Any) -> tuple[tuple[jax.Array, jax.Array], ...]:
    pairs = tuple(tuple(term) if isinstance(term, tuple | list) else () for term in terms)
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            "Kronecker terms are a tuple of pairs ((A, B), (C, D), ...); a single product is ((A, B),)."
        )
    return pairs
