"""TKFAC's factors: F ≈ σ Φ⊗Ψ with tr Φ = tr Ψ = 1, which keeps the trace of F (Gao et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks, counts, failures
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._statistics.statistics import Pairing
from kfe_optax.factors import base
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term

Averages = Literal["numerators", "normalized"]


class TkfacState(NamedTuple):
    """Running averages of numerators; Φ = input / trace, Ψ = output / trace, so that tr Φ = tr Ψ = 1 at all times.

    With averages="normalized" `input` and `output` are those of Φ and Ψ themselves.

    Attributes:
      updates: int32, how many batches went in.
      trace: {layer: σ (*stack,)}.
      input: {layer: σΦ (*stack, d_in, d_in)}, or the diagonal (*stack, d_in) of a side larger than `max_dim`.
      output: {layer: σΨ (*stack, d_out, d_out)}, or its diagonal.
      failures: by reason (`kfe.Failure`), int32: estimates that were not finite and were left out, or out of proportion and
        bounded.
    """

    updates: jax.Array
    trace: dict[str, jax.Array]
    input: dict[str, jax.Array]
    output: dict[str, jax.Array]
    failures: jax.Array


class Tkfac(NamedTuple):
    """See `tkfac`."""

    decay: ScalarOrSchedule
    pairing: Pairing
    averages: Averages

    rank = 1
    needs_taps = True

    def init(self, layers: Sequence[Layer], max_dim: int | None) -> TkfacState:
        base.check_max_dim(max_dim)
        base.check_own_factors(layers, "TKFAC")
        terms = {layer.name: base.zero_term(layer, max_dim) for layer in layers}
        return TkfacState(
            jnp.zeros((), jnp.int32),
            {layer.name: jnp.zeros(layer.stack_shape, layer.factor_dtype) for layer in layers},
            {name: term.input for name, term in terms.items()},
            {name: term.output for name, term in terms.items()},
            failures.none(),
        )

    def update(self, state: TkfacState, source: Source, count: jax.Array) -> TkfacState:
        diagonal = {
            name: base.is_diagonal(source.layers[name], Term(state.input[name], state.output[name]))
            for name in state.input
        }
        assert source.pulled is not None
        new = source.pulled.reduce(
            lambda s: {name: s[name].traced_factors(self.pairing, d) for name, d in diagonal.items()}
        )
        if self.averages == "normalized":
            new = {
                name: (sigma, *base.divided(Term(*both), _safe(sigma)))
                for name, (sigma, *both) in new.items()
            }
        old = {name: (state.trace[name], state.input[name], state.output[name]) for name in state.input}
        rho = base.weight_of_past(counts.added(state.updates, 1), self.decay, count)
        averages, more = base.average(old, new, rho)
        trace, inputs, outputs = ({name: parts[i] for name, parts in averages.items()} for i in range(3))
        updates, failed = counts.added(state.updates, 1), counts.added(state.failures, more)
        return TkfacState(updates, trace, inputs, outputs, failed)

    def terms(self, state: TkfacState, layers: Layers) -> dict[str, tuple[Term, ...]]:
        """√σ Φ and √σ Ψ, whose product is σ Φ⊗Ψ."""
        del layers
        terms = {}
        for name, sigma in state.trace.items():
            both, root = Term(state.input[name], state.output[name]), jnp.sqrt(_safe(sigma))
            terms[name] = (base.divided(both, 1 / root if self.averages == "normalized" else root),)
        return terms


def _safe(sigma: jax.Array) -> jax.Array:
    return jnp.where(sigma > 0, sigma, 1)


def tkfac(
    decay: ScalarOrSchedule = 0.95, pairing: Pairing = "position", averages: Averages = "numerators"
) -> Tkfac:
    """TKFAC's factors: F ≈ σ Φ⊗Ψ, σ = E[tr Λ tr Γ], Φ = E[tr(Γ) Λ]/σ, Ψ = E[tr(Λ) Γ]/σ (Gao et al. 2020, section 3).

    Λ = ā āᵀ and Γ = g gᵀ are those of one example, so that tr F = σ is kept and tr Φ = tr Ψ = 1. The paper prints the decay on
    the new value; here, as elsewhere, M ← ρM + (1 − ρ)M_new.

    Args:
      decay: ρ of the running averages, a scalar or a schedule of the step; the k-th update uses min(1 − 1/k, ρ).
      pairing: with shared positions, "position" pairs Λ_t with Γ_t of each position, as the paper does (σ is then the trace of
        E Σ_t Λ_t⊗Γ_t); "example" takes M = Σ_t ā_t g_tᵀ, σ = E‖M‖², σΦ = E[MMᵀ], σΨ = E[MᵀM], which keeps the trace of F.
      averages: what is averaged. "numerators": σ, σΦ and σΨ, so that batches count by their curvature, as they do in F;
        "normalized": σ, Φ and Ψ, as the paper prints it. Both have traces of 1; after two batches they differ by some percent.

    Returns:
      Factors for `kfe.scale_by_kronecker` and `kfe.in_kfe`; rank 1.

    Raises:
      ValueError: a decay outside [0, 1], an unknown pairing or average; in `update`: "position" for a layer that is used more
        than once.

    Example:
      >>> import kfe_optax as kfe
      >>> kfe.factors.tkfac(pairing="example").rank
      1
    """
    checks.decay("decay", decay)
    checks.one_of("pairing", pairing, Literal["position", "example"])
    checks.one_of("averages", averages, Averages)
    return Tkfac(decay, pairing, averages)
