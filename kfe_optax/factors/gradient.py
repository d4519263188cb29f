"""Factors from the mean gradient alone, as Shampoo and SOAP have them; no taps are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks, counts
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker
from kfe_optax.factors import base
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term
from kfe_optax.factors.kfac import FactorsState, averaged, zeros


class Gradient(NamedTuple):
    """See `gradient`."""

    decay: ScalarOrSchedule

    rank = 1
    needs_taps = False

    def init(self, layers: Sequence[Layer], max_dim: int | None) -> FactorsState:
        base.check_own_factors(layers, "kfe.factors.gradient")
        return zeros(layers, max_dim)

    def update(self, state: FactorsState, source: Source, count: jax.Array) -> FactorsState:
        new = {}
        for name in state.input:
            layer = source.layers[name]
            v = source.gradients[name].astype(layer.factor_dtype)
            diagonal = base.is_diagonal(layer, Term(state.input[name], state.output[name]))
            new[name] = Term(
                jnp.sum(v * v, -1) if diagonal[0] else v @ v.mT,
                jnp.sum(v * v, -2) if diagonal[1] else v.mT @ v,
            )
        rho = base.weight_of_past(counts.added(state.updates, 1), self.decay, count)
        return averaged(state, new, rho)

    def terms(self, state: FactorsState, layers: Layers) -> dict[str, tuple[Term, ...]]:
        """L and R divided by √tr L, so that the product has the trace of E[vec V vec Vᵀ]."""
        terms = {}
        for name, inputs in state.input.items():
            trace = kronecker.trace(inputs, len(layers[name].stack_shape))
            both = Term(inputs, state.output[name])
            terms[name] = (base.divided(both, jnp.sqrt(jnp.where(trace > 0, trace, 1))),)
        return terms


def gradient(decay: ScalarOrSchedule = 0.95) -> Gradient:
    """Factors of the mean gradient V: L = E[V Vᵀ], R = E[Vᵀ V] (Gupta et al. 2018; Vyas et al. 2024).

    As a Kronecker product L⊗R / tr L, which has the trace of E[vec V vec Vᵀ]: the second moment of the mean gradient, which
    is about 1/N of the Fisher matrix. The transformations need no taps with it.

    Args:
      decay: ρ of the running averages, a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe`; rank 1.

    Raises:
      ValueError: a decay outside [0, 1].

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.gradient().needs_taps
      False
    """
    checks.decay("decay", decay)
    return Gradient(decay)
