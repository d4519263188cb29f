"""`scale_by_kfac`: preconditioning with (A⊗G + λI)⁻¹, damped in the factors or exactly."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax import damping as damping_lib
from kfe_optax import kronecker
from kfe_optax.factors import kfac as factors_lib
from kfe_optax.kronecker import Eigenbasis
from kfe_optax.layers import Layer, Layers
from kfe_optax.transforms import layerwise
from kfe_optax.transforms.layerwise import Matrices, ScalarOrSchedule


class KfacState(NamedTuple):
    """State of `scale_by_kfac` (inside a `LayerwiseState`).

    Attributes:
      factors: running averages of A and G.
      roots: {layer: (A side, G side)}: damped inverses ("factored") or eigenbases ("exact").
      damping: λ of the last step.
      failures: int32, factors and factorizations that failed; the last good one was kept.
      last_refresh: int32, the step of the last refresh of the inverses.
    """

    factors: factors_lib.FactorsState
    roots: dict[str, Any]
    damping: jax.Array
    failures: jax.Array
    last_refresh: jax.Array


def scale_by_kfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: Literal["factored", "exact"] = "factored",
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    max_dim: int = 8192,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient V with K-FAC's inverse (Martens & Grosse 2015, sections 4 and 6.3).

    "factored": (A + π√λ I)⁻¹ V (G + (√λ/π) I)⁻¹ with π = sqrt[(tr A/d_in)/(tr G/d_out)]. "exact": (A⊗G + λI)⁻¹ through the
    eigenvectors, U_A[(U_Aᵀ V U_G) ⊘ (s_A s_Gᵀ + λ)]U_Gᵀ, where a changing λ acts at once.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0, in units of the loss's curvature; a scalar or a schedule of the step.
      damping_type: see above.
      decay: ρ of the factors' running averages; the k-th update uses min(1 − 1/k, ρ).
      factor_update_period: steps between updates of A and G, each one more backward pass.
      inverse_update_period: steps between refreshes of the inverses (or eigenbases).
      initial_refreshes: the first steps, in each of which everything is refreshed.
      max_dim: a side larger than this is treated as diagonal.
      rest: the transformation of the parameters outside the layers; `optax.scale_by_adam()` by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`. Factors and inverses are float32 (float64 for
      float64 parameters). A factorization that fails keeps the last good one and is counted (`kfe.info`). A layer whose
      factors are zero passes its gradient on.

    Raises:
      ValueError: a period that is not a positive whole number; in `update`: no taps, taps of other layers, a changed or
        partly masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> tx = optax.chain(kfe.scale_by_kfac(layers, damping=1e-6), optax.scale_by_learning_rate(1.0))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, y)
      >>> updates, _ = tx.update(grads, tx.init(params), params, taps=taps)
      >>> bool(jnp.allclose(params["kernel"] + updates["kernel"], 0, atol=1e-2))   # one Newton step
      True
    """
    if damping_type not in ("factored", "exact"):
        raise ValueError(f"damping_type must be 'factored' or 'exact', not {damping_type!r}.")
    layerwise.check_period("factor_update_period", factor_update_period)
    layerwise.check_period("inverse_update_period", inverse_update_period)
    method = _Kfac(
        layers,
        damping,
        damping_type == "factored",
        decay,
        factor_update_period,
        inverse_update_period,
        initial_refreshes,
        max_dim,
    )
    return layerwise.layerwise(layers, method, rest)


class _Kfac(NamedTuple):
    layers: Layers
    damping: ScalarOrSchedule
    factored: bool
    decay: ScalarOrSchedule
    factor_update_period: Any
    inverse_update_period: Any
    initial_refreshes: int
    max_dim: int

    def init(self, layers: list[Layer]) -> KfacState:
        factors = factors_lib.init(layers, self.max_dim)
        roots = {}
        for layer in layers:
            sides = (factors.input[layer.name], factors.output[layer.name])
            stacked = len(layer.stack_shape)
            make = _unit_factor if self.factored else unit_basis
            roots[layer.name] = tuple(make(side, stacked) for side in sides)
        return KfacState(factors, roots, *layerwise.counters())

    def update(
        self, matrices: Matrices, state: KfacState, count: jax.Array, finite: jax.Array, taps: Any
    ) -> tuple[Matrices, KfacState]:
        strength = layerwise.value(self.damping, count)
        decay = layerwise.value(self.decay, count)
        factors = jax.lax.cond(
            finite & layerwise.due(count, self.factor_update_period, self.initial_refreshes),
            lambda: factors_lib.update(state.factors, taps.pulled(), self.layers, decay),
            lambda: state.factors,
        )
        refresh = finite & layerwise.due(count, self.inverse_update_period, self.initial_refreshes)
        roots, failures = jax.lax.cond(
            refresh,
            lambda: self._refresh(factors, state.roots, strength),
            lambda: (state.roots, jnp.zeros((), jnp.int32)),
        )
        apply = _apply_inverse if self.factored else _apply_exact
        new = {}
        for name, v in matrices.items():
            stacked = len(self.layers[name].stack_shape)
            wide = v.astype(factors.input[name].dtype)
            result = apply(wide, roots[name], strength, stacked)
            new[name] = where_alive(factors, name, stacked, result, wide)
        state = KfacState(
            factors,
            roots,
            strength,
            state.failures + failures + factors.failures - state.factors.failures,
            jnp.where(refresh, count, state.last_refresh),
        )
        return new, state

    def _refresh(self, factors, roots, strength):
        if not self.factored:
            return eigenbases(self.layers, factors, roots)
        damped = {}
        for name in roots:
            stacked = len(self.layers[name].stack_shape)
            pair = damping_lib.factored(factors.input[name], factors.output[name], strength, stacked)
            damped.update({(name, side): factor for side, factor in enumerate(pair)})
        return refresh_sides(self.layers, damped, roots, kronecker.inverse, lambda d: 1 / d)


def where_alive(
    factors: factors_lib.FactorsState, name: str, stacked: int, new: jax.Array, old: jax.Array
) -> jax.Array:
    """`new` where the layer has curvature, `old` where a factor is zero (a layer that the loss does not use)."""
    alive = (kronecker.trace(factors.input[name], stacked) > 0) & (
        kronecker.trace(factors.output[name], stacked) > 0
    )
    return jnp.where(alive[..., None, None], new, old)


def _unit_factor(side: jax.Array, stacked: int) -> jax.Array:
    if kronecker.is_diagonal(side, stacked):
        return jnp.ones_like(side)
    return jnp.broadcast_to(jnp.eye(side.shape[-1], dtype=side.dtype), side.shape)


def unit_basis(side: jax.Array, stacked: int) -> Eigenbasis:
    """The identity basis with unit eigenvalues; a diagonal side has no vectors."""
    if kronecker.is_diagonal(side, stacked):
        return Eigenbasis(jnp.ones_like(side), None)
    return Eigenbasis(jnp.ones(side.shape[:-1], side.dtype), _unit_factor(side, stacked))


def eigenbases(
    layers: Layers, factors: factors_lib.FactorsState, old: dict[str, Any]
) -> tuple[dict[str, Any], jax.Array]:
    """Eigenbases of all factors, the old one where it fails, and the number of failures."""
    sides = {
        (name, side): factor[name]
        for name in old
        for side, factor in enumerate((factors.input, factors.output))
    }
    return refresh_sides(layers, sides, old, kronecker.eigh, lambda d: Eigenbasis(jnp.maximum(d, 0), None))


def refresh_sides(
    layers: Layers, sides: dict[Any, jax.Array], old: dict[str, Any], dense: Any, diagonal: Any
) -> tuple[dict[str, Any], jax.Array]:
    """Factorizes {(layer, side): factor}, the dense ones by shape; keeps the old result of one that is not finite."""
    stacked = {name: len(layers[name].stack_shape) for name in old}
    full = {k: f for k, f in sides.items() if not kronecker.is_diagonal(f, stacked[k[0]])}
    results = kronecker.by_shape(dense, full)
    failures = jnp.zeros((), jnp.int32)
    new: dict[str, list[Any]] = {name: [None, None] for name in old}
    for key, factor in sides.items():
        name, side = key
        if key in results:
            result, finite = results[key]
        else:
            result, finite = diagonal(factor), jnp.isfinite(factor).all(-1)
        failures = failures + jnp.sum(~finite, dtype=jnp.int32)

        def keep(new_leaf, old_leaf, finite=finite):
            return jnp.where(
                finite.reshape(finite.shape + (1,) * (new_leaf.ndim - finite.ndim)), new_leaf, old_leaf
            )

        new[name][side] = jax.tree.map(keep, result, old[name][side])
    return {name: tuple(pair) for name, pair in new.items()}, failures


def _apply_inverse(v, roots, strength, stacked):
    del strength
    return kronecker.right(kronecker.left(roots[0], v, stacked), roots[1], stacked)


def _apply_exact(v, basis, strength, stacked):
    scale = kronecker.outer(basis[0].values, basis[1].values) + strength.astype(v.dtype)
    return kronecker.from_basis(kronecker.to_basis(v, basis, stacked) / scale, basis, stacked)
