"""One layer's tap: what it yields in one step, each statistic in a compiled function of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfe_optax._jax import explicit_axes
from kfe_optax._taps.reductions import Draws

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.tree_util.register_pytree_node_class
class Tap:
    """What one layer yields in one step: see `Layer.rows`, and `Taps.pulled` for all layers at once."""

    def __init__(self, taps: Draws, name: str):
        self.taps = taps
        self.name = name

    def tree_flatten(self):
        return (self.taps,), self.name

    @classmethod
    def tree_unflatten(cls, name, children):
        return cls(children[0], name)

    def rows(self) -> tuple[Float[Array, "*stack n t d_in"], Float[Array, "*stack n t d_out"]]:
        """(ā, g), see `Layer.rows`."""
        layer = self.taps.layers[self.name]
        if not layer.has_rows:
            raise ValueError(
                f"Layer {self.name!r} {layer.why_sums}, so its statistics are sums and it has no rows; read tap.covariances(), "
                "or tap.example_gradients() where its examples are known."
            )
        return _rows(self)

    def covariances(self) -> tuple[Float[Array, "*stack d_in d_in"], Float[Array, "*stack d_out d_out"]]:
        """(A, G): A (*stack, d_in, d_in) = E[mean_t ā āᵀ], G (*stack, d_out, d_out) = E[Σ_t g gᵀ]."""
        return _covariances(self)

    def second_moment_in(
        self,
        basis_in: Float[Array, "*stack d_in d_in"] | None,
        basis_out: Float[Array, "*stack d_out d_out"] | None,
    ) -> Float[Array, "*stack d_in d_out"] | None:
        """S* = E[(U_Aᵀ ∇W̄ U_G)²] over per-example gradients, (*stack, d_in, d_out); None is the identity basis."""
        return _second_moment(self, basis_in, basis_out)

    def contract_output(self, v: Float[Array, "*stack d_out d_out"]) -> Float[Array, "*stack d_in d_in"]:
        """MAT(Z(F) v) = E[M V Mᵀ], (*stack, d_in, d_in), M = Σ_t ā gᵀ per example; V (*stack, d_out, d_out).

        Z(F) is F rearranged so that Z(A⊗G) = vec(A) vec(G)ᵀ (Koroko et al. 2022, section 3); F is never formed.
        """
        return _contract_output(self, v)

    def contract_input(self, u: Float[Array, "*stack d_in d_in"]) -> Float[Array, "*stack d_out d_out"]:
        """MAT(Z(F)ᵀ u) = E[Mᵀ U M], (*stack, d_out, d_out), for U (*stack, d_in, d_in); see `contract_output`."""
        return _contract_input(self, u)

    def example_gradients(self) -> Float[Array, "*stack n d_in d_out"]:
        """Σ_t ā gᵀ of each example, (*stack, n, d_in, d_out), of one draw."""
        return _example_gradients(self)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled; on a mesh with Explicit axes the compiler divides what happens inside, and the results are whole."""

    @jax.jit
    def compiled(*arguments):
        return explicit_axes.automatic(function, explicit_axes.WHOLE, *arguments)

    return compiled


@_compiled
def _rows(tap: Tap) -> tuple[jax.Array, jax.Array]:
    plan = tap.taps.plan
    if plan.draws == 1:
        return tap.taps.draw(0)[tap.name].rows()
    a, _ = tap.taps.draw(0)[tap.name].rows()
    return a, jax.lax.map(lambda i: tap.taps.draw(i)[tap.name].rows()[1], jnp.arange(plan.draws))


@_compiled
def _covariances(tap: Tap) -> tuple[jax.Array, jax.Array]:
    return tap.taps.pulled().both(lambda s: s[tap.name].input_factor(), lambda s: s[tap.name].output_factor())


@_compiled
def _second_moment(tap: Tap, basis_in: Any, basis_out: Any) -> jax.Array | None:
    return tap.taps.pulled().reduce(lambda s: s[tap.name].second_moment_in(basis_in, basis_out))


@_compiled
def _contract_output(tap: Tap, v: jax.Array) -> jax.Array:
    return tap.taps.pulled().reduce(lambda s: s[tap.name].contract_output(v))


@_compiled
def _contract_input(tap: Tap, u: jax.Array) -> jax.Array:
    return tap.taps.pulled().reduce(lambda s: s[tap.name].contract_input(u))


@_compiled
def _example_gradients(tap: Tap) -> jax.Array:
    return tap.taps.draw(0)[tap.name].example_gradients()
