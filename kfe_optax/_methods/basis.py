"""The Kronecker-factored eigenbasis of all layers: its refresh by eigh or by QR, and what a refresh can leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Devices
from kfe_optax._linalg.kronecker import Eigenbasis
from kfe_optax._methods import roots
from kfe_optax.factors.base import Term

Refresh = Literal["eigh", "qr"]
Basis = dict[str, tuple[Eigenbasis, Eigenbasis]]
Terms = Mapping[str, tuple[Term, ...]]
Matrices = dict[str, jax.Array]


def init(layers: Layers, terms: Terms) -> Basis:
    """Identity bases."""
    made = {}
    for name, (first, *_) in terms.items():
        stacked = len(layers[name].stack_shape)
        made[name] = (roots.unit_basis(first.input, stacked), roots.unit_basis(first.output, stacked))
    return made


def check(refresh: Any, tolerance: Any) -> None:
    """Raises ValueError for an unknown refresh or a tolerance that is none."""
    checks.one_of("refresh", refresh, Refresh)
    if tolerance is not None:
        checks.number(refresh_tolerance=tolerance)
    if tolerance is not None and not isinstance(tolerance, jax.Array) and not 0 <= tolerance < 1:
        raise ValueError(
            f"refresh_tolerance is a fraction of a factor's norm, in [0, 1), or None for no check; it is {tolerance!r}."
        )


def into(matrices: Matrices, basis: Basis, devices: Devices) -> Matrices:
    """{layer: U_Aᵀ V U_G}, the products shared by these devices."""
    return kronecker.each(
        lambda v, own: kronecker.to_basis(v, own, v.ndim - 2),
        {name: (v, basis[name]) for name, v in matrices.items()},
        devices,
    )


def out_of(matrices: Matrices, basis: Basis, devices: Devices) -> Matrices:
    """{layer: U_A V U_Gᵀ}, the products shared by these devices."""
    return kronecker.each(
        lambda v, own: kronecker.from_basis(v, own, v.ndim - 2),
        {name: (v, basis[name]) for name, v in matrices.items()},
        devices,
    )


def refreshed(
    layers: Layers,
    terms: Terms,
    old: Basis,
    first: jax.Array,
    refresh: Refresh,
    tolerance: Any,
    devices: Devices,
) -> tuple[Basis, jax.Array]:
    """Eigenbases of every layer's leading term.

    Args:
      layers: the layers.
      terms: the Kronecker terms.
      old: the bases before, kept where a factorization fails.
      first: whether there is no basis yet: it comes from eigh then, and no check is made.
      refresh: "eigh", or "qr": one power step and a QR, U ← qr(A U) with the columns of U sorted by their Rayleigh quotients, the
        largest first (Vyas et al. 2024, section 4).
      tolerance: a basis with ‖offdiag(UᵀAU)‖_F ≤ tolerance ‖A‖_F stays, with new eigenvalues; None: all are refreshed.
      devices: who shares the factorizations.

    Returns:
      The bases, and the number of failures.
    """

    def dense(*stacks):
        flags = jnp.broadcast_to(first, stacks[0].shape[:1])
        limits = jnp.broadcast_to(
            jnp.asarray(-1.0 if tolerance is None else tolerance, stacks[0].dtype), flags.shape
        )

        def batched(factor, values, vectors, flag, limit):
            return _refreshed(
                factor, Eigenbasis(values, vectors), flag, limit, refresh, tolerance is not None
            )

        basis = kronecker.one_at_a_time_on_cpu(batched, *stacks, flags, limits)
        finite = jnp.isfinite(basis.vectors).all((-2, -1)) & jnp.isfinite(basis.values).all(-1)
        return Eigenbasis(jnp.maximum(basis.values, 0), basis.vectors), finite

    sides = {}
    for name, pair in old.items():
        for i, basis in enumerate(pair):
            factor = terms[name][0][i]
            sides[name, i] = factor if basis.vectors is None else (factor, *basis)
    new, failures = roots.refresh_sides(
        layers, sides, old, dense, lambda d: Eigenbasis(jnp.maximum(d, 0), None), devices
    )
    return new, failures


def _refreshed(
    factor: jax.Array, old: Eigenbasis, first: jax.Array, limit: jax.Array, refresh: Refresh, check: bool
) -> Eigenbasis:
    """A stack of bases; on a CPU it holds one matrix, and each condition is a real branch."""
    vectors = old.vectors
    assert vectors is not None

    def new() -> Eigenbasis:
        if refresh == "eigh":
            return kronecker.raw_eigh(factor)
        return jax.lax.cond(
            first.any(), lambda: kronecker.raw_eigh(factor), lambda: _power_step(factor, vectors)
        )

    if not check:
        return new()
    rotated = vectors.mT @ factor @ vectors
    quotients = jnp.diagonal(rotated, axis1=-2, axis2=-1)
    outside = jnp.square(rotated).sum((-2, -1)) - jnp.square(quotients).sum(-1)
    size = jnp.square(factor).sum((-2, -1))
    keep = ~first & (outside <= jnp.square(limit) * size)
    kept = Eigenbasis(quotients, vectors)

    def select() -> Eigenbasis:
        return jax.tree.map(
            lambda k, n: jnp.where(keep.reshape(keep.shape + (1,) * (k.ndim - 1)), k, n), kept, new()
        )

    return jax.lax.cond(keep.all(), lambda: kept, select)


def _power_step(factor: jax.Array, vectors: jax.Array) -> Eigenbasis:
    image = factor @ vectors
    order = jnp.argsort(-jnp.sum(vectors * image, -2), -1)
    # Sorting the columns of A U sorts those of U: the power step costs one product.
    rotated, _ = jnp.linalg.qr(jnp.take_along_axis(image, order[..., None, :], -1))
    return Eigenbasis(jnp.sum(rotated * (factor @ rotated), -2), rotated)
