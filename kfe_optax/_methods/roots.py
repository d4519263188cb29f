"""Damped inverses of Kronecker terms in the three forms that `scale_by_kronecker` keeps between refreshes.

A root is what one layer needs to apply its inverse: a pair, one entry a side. Refreshing takes all layers at once, so that equal
shapes share a factorization; a side whose factorization fails keeps its old entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Devices
from kfe_optax._linalg.kronecker import Eigenbasis
from kfe_optax.factors.base import Term

DampingType = Literal["factored", "sqrt", "linear", "exact"]
Denominators = Literal["clip", "absolute"]
Terms = Mapping[str, tuple[Term, ...]]
Roots = dict[str, Any]


class Form(Protocol):
    """One way to invert damped terms."""

    def init(self, term: Term, stacked: int) -> Any:
        """The root before the first refresh: the identity."""

    def refresh(
        self, layers: Layers, terms: Terms, old: Roots, damping: jax.Array, devices: Devices
    ) -> tuple[Roots, jax.Array]:
        """The roots of all layers, the old one where a factorization failed, and how many did; computed by these devices."""

    def apply(self, v: jax.Array, root: Any, damping: jax.Array, stacked: int) -> jax.Array:
        """The damped inverse of one layer times V."""


class Inverses(NamedTuple):
    """(A + a I)⁻¹ V (B + b I)⁻¹ from two inverses."""

    damping_type: DampingType
    relative: bool = False

    def init(self, term, stacked):
        return tuple(kronecker.identity_like(side, stacked) for side in term)

    def refresh(self, layers, terms, old, damping, devices):
        damped = _damped_first_terms(layers, terms, damping, self.damping_type, self.relative)
        return refresh_sides(layers, damped, old, kronecker.inverse, lambda d: 1 / d, devices)

    def apply(self, v, root, damping, stacked):
        del damping
        return kronecker.right(kronecker.left(root[0], v, stacked), root[1], stacked)


class Eigenbases(NamedTuple):
    """U_A[(U_Aᵀ V U_B) ⊘ (s_A s_Bᵀ + λ)]U_Bᵀ: the inverse of A⊗B + λI itself; λ acts at once. V where s_A or s_B is zero."""

    relative: bool = False

    def init(self, term, stacked):
        return tuple(unit_basis(side, stacked) for side in term)

    def refresh(self, layers, terms, old, damping, devices):
        del damping
        sides = {(name, i): side for name, (term,) in terms.items() for i, side in enumerate(term)}
        return refresh_sides(layers, sides, old, kronecker.eigh, _diagonal_eigenbasis, devices)

    def apply(self, v, root, damping, stacked):
        least = damping_lib.least(root[0].values.max(-1) * root[1].values.max(-1))[..., None, None]
        scale = kronecker.outer(root[0].values, root[1].values)
        damping = damping.astype(v.dtype)
        if self.relative:
            damping = damping * (root[0].values.mean(-1) * root[1].values.mean(-1))[..., None, None]
        scale = jnp.where(least > 0, scale + jnp.maximum(damping, least), 1)
        return kronecker.from_basis(kronecker.to_basis(v, root, stacked) / scale, root, stacked)


class Pencils(NamedTuple):
    """K₁[(K₁ᵀ V K₂) ⊘ d]K₂ᵀ, the inverse of A⊗B + C⊗D (Koroko et al. 2022, section 3.5).

    K₁ᵀ A K₁ = I and K₁ᵀ C K₁ = diag(s₁), likewise K₂ and s₂ from B and D, with A and B damped. Exactly, d = 1 + s₁ s₂ᵀ, whose
    entries are the eigenvalues of the sum relative to A⊗B; they are positive where the sum is. "clip" takes
    max(1 + s₁ s₂ᵀ, floor), which changes nothing else: the inverse is then that of a matrix of at least floor · A⊗B. "absolute"
    takes 1 + |s₁||s₂|ᵀ, at least A⊗B.
    """

    damping_type: DampingType
    denominators: Denominators
    floor: Any
    relative: bool = False

    def init(self, term, stacked):
        return tuple(_unit_pencil(side, stacked) for side in term)

    def refresh(self, layers, terms, old, damping, devices):
        damped = _damped_first_terms(layers, terms, damping, self.damping_type, self.relative)
        pairs = {}
        for name, (first, second) in terms.items():
            alive = _alive(*(kronecker.trace(side, len(layers[name].stack_shape)) for side in first))
            for i, side in enumerate(second):
                pairs[name, i] = (damped[name, i], _masked(side, alive[i]))
        return refresh_sides(layers, pairs, old, kronecker.pencil, _diagonal_pencil, devices)

    def apply(self, v, root, damping, stacked):
        del damping
        scale = self.scale(root[0].values, root[1].values)
        return kronecker.from_basis(kronecker.to_basis(v, root, stacked) / scale, root, stacked)

    def scale(self, values_in: jax.Array, values_out: jax.Array) -> jax.Array:
        """The denominators d (*stack, d_in, d_out)."""
        if self.denominators == "absolute":
            return 1 + kronecker.outer(jnp.abs(values_in), jnp.abs(values_out))
        return jnp.maximum(1 + kronecker.outer(values_in, values_out), self.floor)


def _damped_first_terms(
    layers: Layers, terms: Terms, damping: jax.Array, damping_type: DampingType, relative: bool
) -> dict[tuple[str, int], jax.Array]:
    """{(layer, side): the damped factor}; identities for a layer without curvature, whose gradient passes."""
    damped = {}
    for name, (first, *_) in terms.items():
        stacked = len(layers[name].stack_shape)
        traces = tuple(kronecker.trace(side, stacked) for side in first)
        if damping_type == "factored":
            amounts = damping_lib.factored(*first, damping, stacked, relative)
        else:
            amount = jnp.sqrt(damping) if damping_type == "sqrt" else damping
            amounts = tuple(
                jnp.maximum(amount.astype(trace.dtype), damping_lib.least(trace)) for trace in traces
            )
        for i, (side, amount, alive) in enumerate(zip(first, amounts, _alive(*traces), strict=True)):
            amount = jnp.where(alive, amount, 1)
            damped[name, i] = damping_lib.add_to_diagonal(_masked(side, alive), amount, stacked)
    return damped


def _alive(trace_in: jax.Array, trace_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which blocks of each side belong to a layer with curvature, both of whose factors have a trace; of several, any of them.

    A trace below zero is no lack of curvature but a factor gone wrong, whose factorization fails and is counted.
    """
    both = (trace_in != 0) & (trace_out != 0)
    first, second = (
        both.any(tuple(i for i, size in enumerate(side.shape) if size == 1), keepdims=True)
        for side in (trace_in, trace_out)
    )
    return first, second


def _masked(side: jax.Array, alive: jax.Array) -> jax.Array:
    # A product with zeros and ones: of a choice, compilers make two loops.
    return side * alive.astype(side.dtype).reshape(alive.shape + (1,) * (side.ndim - alive.ndim))


def unit_basis(side: jax.Array, stacked: int) -> Eigenbasis:
    """The identity basis, with eigenvalues of zero: there is no curvature yet. A diagonal side has no vectors."""
    if kronecker.is_diagonal(side, stacked):
        return Eigenbasis(jnp.zeros_like(side), None)
    return Eigenbasis(jnp.zeros(side.shape[:-1], side.dtype), kronecker.identity_like(side, stacked))


def _unit_pencil(side: jax.Array, stacked: int) -> Eigenbasis:
    return Eigenbasis(
        jnp.zeros(side.shape[: stacked + 1], side.dtype), kronecker.identity_like(side, stacked)
    )


def _diagonal_eigenbasis(side: jax.Array) -> Eigenbasis:
    return Eigenbasis(jnp.maximum(side, 0), None)


def _diagonal_pencil(positive: jax.Array, other: jax.Array) -> Eigenbasis:
    return Eigenbasis(other / positive, jax.lax.rsqrt(positive))


def refresh_sides(
    layers: Layers,
    sides: Mapping[tuple[str, int], Any],
    old: Roots,
    dense: Callable[..., Any],
    diagonal: Callable[..., Any],
    devices: Devices,
) -> tuple[Roots, jax.Array]:
    """Factorizes {(layer, side): factor, or a tuple that starts with it}, the dense ones by shape.

    Args:
      layers: the layers.
      sides: what is factorized.
      old: {layer: (input side, output side)}, kept where the new one is not finite.
      dense: stacks → (result, which are finite).
      diagonal: the same for diagonals, without the finiteness.
      devices: who shares the dense ones.

    Returns:
      The new roots, and the number of failures.
    """
    tuples = {key: value if isinstance(value, tuple) else (value,) for key, value in sides.items()}
    stacked = {name: len(layers[name].stack_shape) for name in old}
    full = {k: t for k, t in tuples.items() if not kronecker.is_diagonal(t[0], stacked[k[0]])}
    results = kronecker.by_shape(dense, full, devices)
    failures = jnp.zeros((), jnp.int32)
    new: dict[str, list[Any]] = {name: [None, None] for name in old}
    for key, factors in tuples.items():
        name, side = key
        if key in results:
            result, finite = results[key]
        else:
            result = diagonal(*factors)
            finite = jnp.stack([jnp.isfinite(leaf).all(-1) for leaf in jax.tree.leaves(result)]).all(0)
        failures = failures + jnp.sum(~finite, dtype=jnp.int32)

        def keep(new_leaf, old_leaf, finite=finite):
            return jnp.where(
                finite.reshape(finite.shape + (1,) * (new_leaf.ndim - finite.ndim)), new_leaf, old_leaf
            )

        new[name][side] = jax.tree.map(keep, result, old[name][side])
    return {name: tuple(pair) for name, pair in new.items()}, failures
