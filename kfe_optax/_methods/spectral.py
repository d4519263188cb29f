"""`scale_by_spectral_kfac`: the steepest descent in K-FAC's metric and the spectral norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax import factors as factors_lib
from kfe_optax import polar
from kfe_optax._jax import checks
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods import layerwise, periods, refreshes
from kfe_optax._methods.layerwise import Matrices, ScalarOrSchedule, Step
from kfe_optax._methods.powers import Powers
from kfe_optax.factors.base import Factors

MomentumOf = Literal["gradient", "whitened"]


class SpectralState(NamedTuple):
    """State of `scale_by_spectral_kfac` (inside a `LayerwiseState`).

    Attributes:
      factors: the state of the factors (running averages).
      roots: {layer: (input side, output side)}, one power of the damped factor a stage; None for a side that has none.
      mean: {layer: M (*stack, d_in, d_out)}, the momentum.
      damping: ε of the last step.
      failures: by reason (`kfe.Failure`), int32: factors and factorizations that failed; the last good one was kept.
      last_refresh: int32, the step of the last refresh of the roots.
    """

    factors: Any
    roots: dict[str, Any]
    mean: Matrices
    damping: jax.Array
    failures: jax.Array
    last_refresh: jax.Array


def scale_by_spectral_kfac(
    layers: Layers,
    damping: ScalarOrSchedule = 1.0,
    *,
    factors: Factors | None = None,
    decay: ScalarOrSchedule = 0.95,
    exponents: tuple[float, float] = (0.5, 0.5),
    exponents_back: tuple[float, float] | None = None,
    momentum: ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    momentum_of: MomentumOf = "gradient",
    coefficients: polar.Coefficients | None = None,
    iteration_dtype: jax.typing.DTypeLike | None = None,
    factor_update_period: int = 25,
    inverse_update_period: int = 50,
    initial_refreshes: int = 1,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest_kinds: Sequence[str] = ("embedding", "norm"),
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each layer's gradient by Δ = Â^−½ msign(Â^−½ M Ĝ^−½) Ĝ^−½, with M its momentum and msign(U S Vᵀ) = U Vᵀ.

    Of all Δ with ‖Â^½ Δ Ĝ^½‖₂ ≤ 1 it is the one with the largest ⟨M, Δ⟩; in the Frobenius norm that is K-FAC's Â⁻¹ M Ĝ⁻¹, up to
    its length, and with Â = Ĝ = I it is Muon (Jordan et al. 2024). Â = A + √ε (tr A/d_in) I, Ĝ = G + √ε (tr G/d_out) I:
    damping is relative, so that the update does not change when the loss is multiplied by a number. The length of Δ means
    little; follow it with `kfe.normalize_layers`, as `kfe.spectral_kfac` does. msign by Newton–Schulz iterations (`kfe.polar`).

    Args:
      layers: what `kfe.find_layers` returned.
      damping: ε > 0, as a multiple of the layer's mean curvature; a scalar or a schedule of the step.
      factors: one of `kfe.factors` with one Kronecker product; `kfe.factors.kfac(decay)` by default.
      decay: ρ of the running averages of the default factors; the k-th update uses min(1 − 1/k, ρ).
      exponents: (p, q) of Â^−p M Ĝ^−q before msign; (0.5, 0) takes the metric of the inputs alone, (0, 0.5) that of the
        outputs, (0, 0) none.
      exponents_back: (p, q) after it; the same by default. exponents=(1, 0) with (0, 0) here is Newton–Muon (Du & Su 2026).
      momentum: β of M ← β M + (1 − β) V.
      nesterov: whether β M + (1 − β) V takes the place of M.
      momentum_of: "gradient", or "whitened": M averages Â^−p V Ĝ^−q, as in FISMO (Xu et al. 2026).
      coefficients: (a, b, c) of each Newton–Schulz iteration; `kfe.polar.minimax_coefficients()` by default, `kfe.polar.MUON`.
      iteration_dtype: what these iterations are computed in, such as `jnp.bfloat16` on accelerators; float32 by default.
      factor_update_period: steps between updates of the factors, each one more backward pass (none for gradient factors).
      inverse_update_period: steps between refreshes of the powers of the factors.
      initial_refreshes: the first steps, in each of which everything is refreshed.
      refreshes_per_doubling: n > 0: periods begin at a fifth of what they are, and grow: n refreshes while the number of steps
        doubles. Curvature changes fastest in the beginning. 0: the periods as they are.
      max_dim: a side larger than this is treated as diagonal; None: 8192.
      distribute: how devices that take the same step share its linear algebra, see `kfe.scale_by_kronecker`.
      rest_kinds: layers of these kinds go through `rest`: a matrix of vectors that are looked up one by one, and a vector, have
        no singular values to speak of. Their factors are not computed.
      rest: the transformation of the other parameters; `optax.scale_by_adam()` by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)` (no taps for `kfe.factors.gradient()`). Factors, roots and
      momentum are float32 (float64 for float64 parameters). An estimate or a factorization that fails keeps the last good one
      and is counted (`kfe.info`). A factor that is zero counts as the identity.

    Raises:
      TypeError: no layers or no factors; in `update`, a `damping` that another transformation adapts in the loss's units.
      ValueError: a damping that is not positive, a momentum outside [0, 1], exponents that are negative, factors of a rank
        above 1, an option that does not exist, a period that is not a positive whole number; in `update`: no taps, taps of
        other layers, a changed or partly masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> tx = optax.chain(kfe.scale_by_spectral_kfac(layers), kfe.normalize_layers(layers), optax.scale(-0.1))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, y, key=jax.random.key(0))
      >>> updates, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> bool(loss_fn(optax.apply_updates(params, updates), x, y) < loss)
      True
    """
    checks.positive(damping=damping)
    checks.decay("decay", decay)
    checks.decay("momentum", momentum)
    checks.refreshes(
        initial_refreshes,
        refreshes_per_doubling,
        factor_update_period=factor_update_period,
        inverse_update_period=inverse_update_period,
    )
    factors = factors_lib.kfac(decay) if factors is None else factors
    if not callable(getattr(factors, "terms", None)):
        raise TypeError(f"factors must be one of kfe.factors, such as kfe.factors.kfac(), not {factors!r}.")
    if factors.rank != 1:
        raise ValueError(
            "factors must be one Kronecker product, such as kfe.factors.kfac(): a sum of several has no root of this form; it "
            f"is {factors!r}."
        )
    checks.one_of("momentum_of", momentum_of, MomentumOf)
    exponents = _pair("exponents", exponents)
    back = exponents if exponents_back is None else _pair("exponents_back", exponents_back)
    require_layers(layers)
    inside = layers.without(kinds=rest_kinds)
    method = _Spectral(
        layers=inside,
        factors=factors,
        powers=Powers((exponents,) if back == exponents else (exponents, back)),
        damping=damping,
        momentum=momentum,
        nesterov=nesterov,
        whitened=momentum_of == "whitened",
        coefficients=polar.checked(coefficients),
        iteration_dtype=polar.checked_dtype(iteration_dtype),
        factor_update_period=factor_update_period,
        inverse_update_period=inverse_update_period,
        early=periods.Early(initial_refreshes, refreshes_per_doubling),
        max_dim=max_dim,
    )
    return layerwise.layerwise(inside, method, rest, distribute)


def _pair(name: str, exponents: Any) -> tuple[float, float]:
    given = tuple(exponents) if isinstance(exponents, Sequence) else ()
    if len(given) != 2 or not all(isinstance(e, int | float) and 0 <= e < float("inf") for e in given):
        raise ValueError(
            f"{name} must be two numbers, zero or positive, of the input and of the output side, not {exponents!r}."
        )
    return given


class _Spectral(NamedTuple):
    layers: Layers
    factors: Factors
    powers: Powers
    damping: ScalarOrSchedule
    momentum: ScalarOrSchedule
    nesterov: bool
    whitened: bool
    coefficients: polar.Coefficients
    iteration_dtype: Any
    factor_update_period: Any
    inverse_update_period: Any
    early: periods.Early
    max_dim: int | None

    reads_parameters = False

    @property
    def needs_taps(self) -> bool:
        return self.factors.needs_taps

    def init(self, layers: list[Layer]) -> SpectralState:
        factors = self.factors.init(layers, self.max_dim)
        terms = self.factors.terms(factors, self.layers)
        roots = {
            layer.name: self.powers.init(terms[layer.name][0], len(layer.stack_shape)) for layer in layers
        }
        mean = {layer.name: jnp.zeros(layer.shape, layer.factor_dtype) for layer in layers}
        return SpectralState(factors, roots, mean, *layerwise.counters())

    def update(self, state: SpectralState, step: Step) -> tuple[Matrices, SpectralState]:
        damping = step.damping_of(self.damping, relative=True)

        def invert(factors: Any) -> Any:
            terms = self.factors.terms(factors, self.layers)
            return self.powers.refresh(self.layers, terms, state.roots, damping, step.devices.inverses)

        now = refreshes.refreshed(self, state, step, invert)
        beta = layerwise.value(self.momentum, step.count, "momentum")
        wide = {name: v.astype(state.mean[name].dtype) for name, v in step.gradients.items()}
        results = kronecker.each(
            lambda v, mean, root: self._one(v, mean, root, beta),
            {name: (v, state.mean[name], now.roots[name]) for name, v in wide.items()},
            step.devices.products,
        )
        mean = {name: jnp.where(step.finite, m, state.mean[name]) for name, (_, m) in results.items()}
        state = SpectralState(now.factors, now.roots, mean, damping, now.failures, now.last_refresh)
        return {name: delta for name, (delta, _) in results.items()}, state

    def _one(self, v: jax.Array, mean: jax.Array, root: Any, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Δ and the new M of one layer."""
        stacked, beta = v.ndim - 2, beta.astype(v.dtype)
        if self.whitened:
            v = self.powers.apply(0, v, root, stacked)
        mean = beta * mean + (1 - beta) * v
        chosen = beta * mean + (1 - beta) * v if self.nesterov else mean
        if not self.whitened:
            chosen = self.powers.apply(0, chosen, root, stacked)
        sign = polar.msign(chosen, self.coefficients, self.iteration_dtype)
        return self.powers.apply(-1, sign, root, stacked), mean
