"""Powers of the damped factors, (A + a I)^−p and (B + b I)^−q: the two ends of a method that works in K-FAC's metric."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Devices
from kfe_optax._methods import roots
from kfe_optax._methods.roots import Roots, Terms
from kfe_optax.factors.base import Term


class Powers(NamedTuple):
    """Roots of one eigendecomposition a side; with a = √ε tr A / d_in and b = √ε tr B / d_out.

    That is what factored damping adds where λ is ε times the layer's mean curvature. A side that is zero, of a layer without
    curvature, counts as the identity.

    Attributes:
      exponents: (p, q) of each stage; a stage is one application to both sides.
    """

    exponents: tuple[tuple[float, float], ...]

    def init(self, term: Term, stacked: int) -> Any:
        """Identities: {side: one matrix a stage}, None for a side that no stage has."""
        return tuple(
            (kronecker.identity_like(side, stacked),) * len(self.exponents) if self._used(i) else None
            for i, side in enumerate(term)
        )

    def refresh(
        self, layers: Layers, terms: Terms, old: Roots, damping: jax.Array, devices: Devices
    ) -> tuple[Roots, jax.Array]:
        """The roots of all layers with ε = `damping`, the old ones where a factorization failed, and how many did."""
        sides = {}
        for name, (term, *_) in terms.items():
            for i, side in enumerate(term):
                if self._used(i):
                    shift = _shift(side, damping, len(layers[name].stack_shape))
                    own = jnp.asarray([stage[i] for stage in self.exponents], side.dtype)
                    sides[name, i] = (side, shift, jnp.broadcast_to(own, (*shift.shape, len(own))))
        return roots.refresh_sides(layers, sides, old, _dense, _diagonal, devices)

    def apply(self, stage: int, v: jax.Array, root: Any, stacked: int) -> jax.Array:
        """(A + a I)^−p V (B + b I)^−q of one layer."""
        p, q = self.exponents[stage]
        v = kronecker.left(root[0][stage] if p else None, v, stacked)
        return kronecker.right(v, root[1][stage] if q else None, stacked)

    def _used(self, side: int) -> bool:
        return any(stage[side] for stage in self.exponents)


def _shift(side: jax.Array, damping: jax.Array, stacked: int) -> jax.Array:
    trace = kronecker.trace(side, stacked)
    shift = jnp.maximum(
        jnp.sqrt(damping).astype(side.dtype) * trace / side.shape[-1], damping_lib.least(trace)
    )
    return jnp.where(trace > 0, shift, 1)


def _dense(matrices: jax.Array, shifts: jax.Array, exponents: jax.Array) -> tuple[Any, jax.Array]:
    def batched(matrix, shift, own):
        values, vectors = kronecker.raw_eigh(matrix)
        assert vectors is not None
        return tuple((vectors * power[..., None, :]) @ vectors.mT for power in _powers(values, shift, own))

    powers = kronecker.one_at_a_time_on_cpu(batched, matrices, shifts, exponents)
    return powers, jnp.stack([jnp.isfinite(power).all((-2, -1)) for power in powers]).all(0)


def _diagonal(values: jax.Array, shifts: jax.Array, exponents: jax.Array) -> Any:
    return _powers(values, shifts, exponents)


def _powers(values: jax.Array, shifts: jax.Array, exponents: jax.Array) -> tuple[jax.Array, ...]:
    damped = jnp.maximum(values, 0) + shifts[..., None]
    return tuple(damped ** -exponents[..., i, None] for i in range(exponents.shape[-1]))
