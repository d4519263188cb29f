"""FISMO's factors: the two sides of mean gradients, each whitened by the other (Xu, Yan & Zhang 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks, counts, failures
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax.factors import base
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term
from kfe_optax.factors.kfac import FactorsState, zeros


class Fismo(NamedTuple):
    """See `fismo`."""

    decay: ScalarOrSchedule
    damping: float

    rank = 1
    needs_taps = False

    def init(self, layers: Sequence[Layer], max_dim: int | None) -> FactorsState:
        base.check_own_factors(layers, "kfe.factors.fismo")
        empty = zeros(layers, max_dim)
        stacked = {layer.name: len(layer.stack_shape) for layer in layers}
        inputs, outputs = (
            {name: kronecker.identity_like(side, stacked[name]) for name, side in sides.items()}
            for sides in (empty.input, empty.output)
        )
        return empty._replace(input=inputs, output=outputs)

    def update(self, state: FactorsState, source: Source, count: jax.Array) -> FactorsState:
        decay = jnp.asarray(self.decay(count) if callable(self.decay) else self.decay)
        inputs, outputs, failed = {}, {}, state.failures
        for name, p in state.input.items():
            layer, q = source.layers[name], state.output[name]
            stacked = len(layer.stack_shape)
            v = source.gradients[name].astype(layer.factor_dtype)
            rho = decay.astype(v.dtype)
            with jax.default_matmul_precision("highest"):
                new_p, excessive = self._side(p, v, q, rho, stacked)
                new_q, too = self._side(q, v.mT, new_p, rho, stacked)
            finite = jnp.isfinite(new_p).all() & jnp.isfinite(new_q).all()
            inputs[name] = jnp.where(finite, new_p, p)
            outputs[name] = jnp.where(finite, new_q, q)
            failed = counts.added(failed, failures.estimates(~finite, finite & (excessive | too)))
        return FactorsState(counts.added(state.updates, 1), inputs, outputs, failed)

    def _side(
        self, old: jax.Array, v: jax.Array, other: jax.Array, rho: jax.Array, stacked: int
    ) -> tuple[jax.Array, jax.Array]:
        """ρ P + (1 − ρ) (V Q⁻¹ Vᵀ / n + μ I) with its trace made d, and whether V had to be bounded (see `base.weights`)."""
        least = damping_lib.least(kronecker.trace(other, stacked))[..., None]
        if kronecker.is_diagonal(other, stacked):
            inverse = 1 / (other + least)
        else:
            damped = other + least[..., None] * kronecker.identity_like(other, stacked)
            inverse = kronecker.inverse(damped.reshape(-1, *other.shape[-2:]))[0].reshape(other.shape)
        whitened = kronecker.right(v, inverse, stacked)
        diagonal = kronecker.is_diagonal(old, stacked)
        new = jnp.sum(whitened * v, -1) if diagonal else whitened @ v.mT
        new = new / v.shape[-1] + self.damping * kronecker.identity_like(old, stacked)
        own = base.weights(rho, base.proportion(old, new))
        mixed = own.past.astype(old.dtype) * old + own.new.astype(old.dtype) * new
        mixed = mixed if diagonal else (mixed + mixed.mT) / 2
        factor = mixed.shape[-1] / kronecker.trace(mixed, stacked)
        return mixed * factor.reshape(factor.shape + (1,) * (mixed.ndim - factor.ndim)), own.excessive

    def terms(self, state: FactorsState, layers: Layers) -> dict[str, tuple[Term, ...]]:
        del layers
        return {name: (Term(state.input[name], state.output[name]),) for name in state.input}


def fismo(decay: ScalarOrSchedule = 0.95, damping: float = 1e-3) -> Fismo:
    """FISMO's factors P and Q of the mean gradient V (d_in, d_out), identities at first (Xu, Yan & Zhang 2026).

    P ← γ P + (1 − γ) (V Q⁻¹ Vᵀ / d_out + μ I), scaled to tr P = d_in; then Q ← γ Q + (1 − γ) (Vᵀ P⁻¹ V / d_in + μ I), scaled to
    tr Q = d_out. Of a matrix-normal distribution of gradients they are the two covariances, up to their scale. The published
    optimizer is these factors, updated on every step, in `kfe.scale_by_spectral_kfac`:

        kfe.scale_by_spectral_kfac(layers, 1e-10, factors=kfe.factors.fismo(), momentum_of="whitened", nesterov=False,
                                   factor_update_period=1, inverse_update_period=1)

    Args:
      decay: γ in [0, 1], a scalar or a schedule of the step. New values weigh 1 − γ from the first step on, whatever the
        gradient's size: a tiny one leaves the identities as they are, one that is 10 times as large as the factors is bounded.
      damping: μ > 0.

    Returns:
      Factors for `kfe.scale_by_spectral_kfac`, `kfe.scale_by_kronecker` and `kfe.in_kfe`; rank 1, without taps.

    Raises:
      TypeError, ValueError: a decay outside [0, 1], a damping that is not a positive number.

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.fismo(0.9).needs_taps
      False
    """
    checks.decay("decay", decay)
    checks.number(damping=damping)
    checks.positive(damping=damping)
    return Fismo(decay, damping)
