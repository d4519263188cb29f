"""The statistics of one layer from one Fisher draw: factors, second moments, per-example gradients.

Rows hold ā (..., n, t, d_in) and g (..., n, t, d_out), sums hold what is left of them when a layer is used more than once; what
they are made of, field by field, is in `riders`. All answer the same questions; `...` are stacked layers and blocks. F = (1/N)
Σ_n vec(M_n) vec(M_n)ᵀ with M_n = Σ_t ā_{n,t} g_{n,t}ᵀ, g carrying √N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jax
import jax.numpy as jnp

from kfe_optax._layers.layer import Layer
from kfe_optax._statistics.rows import Rows
from kfe_optax._statistics.sums import Sums
from kfe_optax._statistics.tokens import Tokens

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Whether TKFAC weights each position with its own traces, or each example with those of its whole gradient; "use": each use of a
# layer that has two of different kinds (a tied embedding).
Pairing = Literal["position", "example", "use"]


class Statistics(Protocol):
    layer: Layer

    def rows(self) -> tuple[Float[Array, "*stack n t d_in"], Float[Array, "*stack n t d_out"]]:
        """ā (..., n, t, d_in), g (..., n, t, d_out)."""

    def input_factor(self, diagonal: bool = False) -> jax.Array:
        """A = E[mean_t ā āᵀ], (..., d_in, d_in), or its diagonal (..., d_in); with "reduce" E[(mean_t ā)(mean_t ā)ᵀ]."""

    def output_factor(self, diagonal: bool = False) -> jax.Array:
        """G = E[Σ_t g gᵀ], (..., d_out, d_out), or its diagonal (..., d_out); with "reduce" E[(Σ_t g)(Σ_t g)ᵀ]."""

    def second_moment_in(self, basis_in: Any, basis_out: Any) -> jax.Array | None:
        """S* = E[(U_Aᵀ M U_G)²], (..., d_in, d_out); a basis None is the identity. None when unknown."""

    def contract_output(self, v: jax.Array, diagonal: bool = False) -> jax.Array:
        """MAT(Z(F) v) = E[M V Mᵀ], (..., d_in, d_in), or its diagonal; V (..., d_out, d_out) or a diagonal (..., d_out)."""

    def contract_input(self, u: jax.Array, diagonal: bool = False) -> jax.Array:
        """MAT(Z(F)ᵀ u) = E[Mᵀ U M], (..., d_out, d_out), or its diagonal; U (..., d_in, d_in) or a diagonal (..., d_in)."""

    def traced_factors(
        self, pairing: Pairing, diagonal: tuple[bool, bool]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """σ (...,), σΦ and σΨ of TKFAC (see `factors.tkfac`), or their diagonals."""

    def example_gradients(self) -> Float[Array, "*stack n d_in d_out"]:
        """M_n, (..., n, d_in, d_out)."""

    # Projections for coarse spaces, on v matrices of rank one p qᵀ in each block: p (..., v, d_in), q (..., v, d_out).

    def project_inputs(self, p: Float[Array, "*stack v d_in"]) -> Float[Array, "*stacked n t v blocks"]:
        """α = pᵀā, (*stacked, n, t, v, blocks), scaled so that a Gram matrix over n and t is E[mean_t α αᵀ]."""

    def project_outputs(self, q: Float[Array, "*stack v d_out"]) -> Float[Array, "*stacked n t v blocks"]:
        """γ = qᵀg, (*stacked, n, t, v, blocks), scaled so that a Gram matrix over n and t is E[Σ_t γ γᵀ]."""

    def project(
        self, p: Float[Array, "*stack v d_in"], q: Float[Array, "*stack v d_out"]
    ) -> Float[Array, "*stacked n v"]:
        """ζ = Σ over the blocks of pᵀ M_n q, (*stacked, n, v)."""

    def inner(self, matrix: Float[Array, "*stack d_in d_out"]) -> Float[Array, "*stacked n"]:
        """⟨Z, M_n⟩ over all blocks, (*stacked, n), for Z (..., d_in, d_out)."""

    def weighted_gradient(self, weights: Float[Array, " n"]) -> Float[Array, "*stack d_in d_out"]:
        """Σ_n w_n M_n, (..., d_in, d_out), for w (n,)."""


def make_statistics(
    layer: Layer, rider: Mapping[str, jax.Array], empirical: bool, loss_scale: jax.Array | None
) -> Statistics:
    """The statistics in a layer's rider.

    An empirical draw is the gradient itself, in which each example has its weight 1/N; rows are N times that. Fisher draws
    carry the root of the weight, and rows √N times that. Where the loss is `loss_scale` times the one that counts, they carry
    that factor, or its root.
    """
    scale: Any = float(layer.examples) if empirical else math.sqrt(layer.examples)
    if loss_scale is not None:
        scale = scale / (loss_scale if empirical else jnp.sqrt(loss_scale))
    if not layer.has_rows:
        return Sums(layer, rider, scale)
    if layer.kind.statistics == "tokens":
        return Tokens(layer, rider, scale)
    return Rows(layer, rider, scale)
