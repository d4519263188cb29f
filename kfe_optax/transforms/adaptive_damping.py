"""`adaptive_damping`: λ by the Levenberg–Marquardt rule, from how well the quadratic model foretells the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax.transforms import layerwise
from kfe_optax.transforms.quadratic_model import (
    QuadraticModelState,
    checked_taps,
    inner_product,
    regularized,
)


class AdaptiveDampingState(NamedTuple):
    """State of `adaptive_damping`.

    Attributes:
      inner: the wrapped transformation's state.
      count: int32, the number of steps taken.
      damping: λ for the next step.
      reduction_ratio: the last r, NaN before the first and where the trial loss was not finite.
      rejected: int32, updates that were not taken because the loss behind them was not finite.
    """

    inner: Any
    count: jax.Array
    damping: jax.Array
    reduction_ratio: jax.Array
    rejected: jax.Array


def adaptive_damping(
    inner: optax.GradientTransformation,
    initial_damping: float,
    *,
    period: int = 5,
    factor: float = 19 / 20,
    floor: float = 1e-8,
    ceiling: float = 1e8,
    l2: float = 0.0,
    damping_in_model: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adapts λ to the reduction ratio (Martens & Grosse 2015, section 6.5).

    Every T₁ steps r = [h(θ+δ) − h(θ)] / [M(δ) − M(0)], with h the loss of the batch plus ½η‖θ‖² and M its quadratic model. Where
    the model is good, r > 3/4, λ ← ω₁λ; where it is not, r < 1/4 (a rising loss makes r negative) or r is not a number,
    λ ← λ/ω₁; ω₁ = factor^T₁.

    Args:
      inner: what makes the update δ that is added to the parameters: `scale_by_quadratic_model(...)`, whose model is then
        known, or a whole chain with a preconditioner of this package in it (one product with the Fisher more at each T₁-th
        step). It is given λ as the extra argument `damping`.
      initial_damping: λ₀, in units of the loss's curvature.
      period: T₁.
      factor: ω of one step, in (0, 1).
      floor: the least λ.
      ceiling: the largest λ.
      l2: η, as in `scale_by_quadratic_model`.
      damping_in_model: whether the denominator's model has the λ of (F + (λ + η)I) in it, as in the paper, or η alone.

    Returns:
      A transformation with `update(grads, state, params, *, taps)` for taps of `value_grad_and_taps(..., quadratic_model=True)`;
      `value` and `value_fn(params)`, as in `optax.scale_by_backtracking_linesearch`, replace the taps' own loss. An update
      behind which the loss is found not to be finite is not taken. `kfe.info` shows λ and r.

    Raises:
      ValueError: numbers out of their ranges; in `update`: no `params`, no taps or taps without the quadratic model.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> inner = optax.chain(kfe.scale_by_kfac(layers, damping=1.0), optax.scale(-0.5))
      >>> tx = kfe.adaptive_damping(inner, initial_damping=1.0, period=1)
      >>> differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)
      >>> loss, grads, taps = differentiate(params, x, y)
      >>> _, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> round(float(kfe.info(state).damping), 3)    # the model of a quadratic loss is good
      0.95
    """
    layerwise.check_period("period", period)
    if not isinstance(factor, jax.Array) and not 0 < factor < 1:
        raise ValueError(
            f"factor must lie between 0 and 1, so that λ falls where the model is good; it is {factor!r}."
        )
    if not isinstance(initial_damping, jax.Array) and not initial_damping > 0:
        raise ValueError(f"initial_damping must be positive, not {initial_damping!r}.")
    wrapped = optax.with_extra_args_support(inner)

    def init(params):
        numbers = jnp.result_type(float)
        return AdaptiveDampingState(
            wrapped.init(params),
            jnp.zeros((), jnp.int32),
            jnp.asarray(initial_damping, numbers),
            jnp.full((), jnp.nan, numbers),
            jnp.zeros((), jnp.int32),
        )

    def update(updates, state, params=None, *, taps=None, value=None, value_fn=None, **extra):
        if params is None:
            raise ValueError(
                "adaptive_damping evaluates the loss at the new parameters: call tx.update(grads, opt_state, params, taps=taps)."
            )
        taps = checked_taps(taps)
        result: Any = wrapped.update(updates, state.inner, params, taps=taps, damping=state.damping, **extra)
        delta, inner_state = result
        before = taps.loss if value is None else value
        loss_at = taps.loss_at if value_fn is None else value_fn

        def measured():
            change = _loss_change(delta, params, before, loss_at, l2)
            model = _model_change(
                inner_state, updates, delta, params, taps, state.damping, l2, damping_in_model
            )
            ratio = change / model
            # Nothing to gain and nothing gained is no reason to distrust the model.
            ratio = jnp.where((model == 0) & (change == 0), 0.5, ratio)
            return ratio.astype(state.damping.dtype), jnp.isfinite(change)

        due = layerwise.due(state.count + 1, period)
        ratio, finite = jax.lax.cond(due, measured, lambda: (state.reduction_ratio, jnp.ones((), bool)))
        power = jnp.asarray(factor, state.damping.dtype) ** period
        damping = adapted(state.damping, ratio, power, floor, ceiling)
        new_state = AdaptiveDampingState(
            inner_state,
            state.count + 1,
            jnp.where(due, damping, state.damping),
            ratio,
            state.rejected + ~finite,
        )
        return jax.tree.map(lambda d: jnp.where(finite, d, jnp.zeros_like(d)), delta), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def adapted(damping: jax.Array, ratio: jax.Array, power: Any, floor: Any, ceiling: Any) -> jax.Array:
    """λ after a reduction ratio r: ω₁λ for r > 3/4, λ/ω₁ for r < 1/4 or no number, in [floor, ceiling]."""
    scale = jnp.where(ratio > 0.75, power, jnp.where(ratio >= 0.25, 1, 1 / power))
    return jnp.clip(damping * scale, floor, ceiling).astype(damping.dtype)


def _loss_change(
    delta: Any, params: Any, before: jax.Array, loss_at: Callable[[Any], jax.Array], l2: Any
) -> jax.Array:
    """h(θ+δ) − h(θ)."""
    change = loss_at(optax.apply_updates(params, delta)) - before
    return change + l2 * (inner_product(params, delta) + inner_product(delta, delta) / 2)


def _model_change(
    inner_state: Any,
    gradient: Any,
    delta: Any,
    params: Any,
    taps: Any,
    damping: jax.Array,
    l2: Any,
    damping_in_model: bool,
) -> jax.Array:
    """M(δ) − M(0)."""
    is_model = lambda node: isinstance(node, QuadraticModelState)  # noqa: E731
    found = [s for s in jax.tree.leaves(inner_state, is_leaf=is_model) if is_model(s)]
    if found and inner_state is found[0]:
        squared, change = found[0].squared_norm, found[0].model_change
        return change if damping_in_model else change - damping * squared / 2
    fisher = taps.fisher_products(taps.tangent(delta))[0, 0]
    strength = l2 + damping if damping_in_model else l2
    slope = inner_product(regularized(gradient, params, l2), delta)
    return slope + (fisher + strength * inner_product(delta, delta)) / 2
