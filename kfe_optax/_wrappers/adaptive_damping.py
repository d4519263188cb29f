"""`adaptive_damping`: λ by the Levenberg–Marquardt rule, from how well the quadratic model foretells the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks, counts, explicit_axes
from kfe_optax._methods import layerwise
from kfe_optax._wrappers.quadratic_model import QuadraticModelState, checked_taps, inner_product, regularized

# λ after an update that was not taken, or was taken back.
REJECTED = 4.0


class AdaptiveDampingState(NamedTuple):
    """State of `adaptive_damping`.

    Attributes:
      inner: the wrapped transformation's state.
      count: int32, the number of steps taken.
      damping: λ for the next step.
      reduction_ratio: the last r, NaN before the first and where the trial loss was not finite.
      rejected: int32, updates that were not taken, or taken back.
      last: the update of the last step, zero where it was not taken; None where `scale_by_quadratic_model` inside has it.
    """

    inner: Any
    count: jax.Array
    damping: jax.Array
    reduction_ratio: jax.Array
    rejected: jax.Array
    last: Any


def adaptive_damping(
    inner: optax.GradientTransformation,
    initial_damping: float,
    *,
    period: int = 5,
    factor: float = 19 / 20,
    floor: float = 1e-8,
    ceiling: float = 1e8,
    l2: float | None = None,
    damping_in_model: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adapts λ to the reduction ratio (Martens & Grosse 2015, section 6.5).

    Every T₁ steps r = [h(θ+δ) − h(θ)] / [M(δ) − M(0)], with h the loss of the batch plus ½η‖θ‖² and M its quadratic model. Where
    the model is good, r > 3/4, λ ← ω₁λ; where it is not, r < 1/4 or r is not a number, λ ← λ/ω₁; ω₁ = factor^T₁. A loss that
    rises gives a negative r, also where the model (of a chain inside) foretold it.

    An update is not taken where it leads to parameters that are not finite or, measured, to a loss that is not; nor where it is
    so long, ‖δ‖ > ‖θ‖/√ε > 0, that it could not be taken back: θ + δ − δ has lost half of θ's digits. One that leads unmeasured
    to where the loss or its gradient is not finite is taken back on the next step. Each raises λ fourfold. A batch whose loss was
    not finite before that update either is passed over instead: bad data are no bad step. Do not wrap this in
    `optax.apply_if_finite`, which hides such a step.

    Args:
      inner: what makes the update δ that is added to the parameters: `scale_by_quadratic_model(...)`, whose model is then
        known, or a whole chain with a preconditioner of this package in it, which is given ∇h and λ + η (one product with the
        Fisher more at each T₁-th step). λ goes to it as the extra argument `damping`.
      initial_damping: λ₀, in units of the loss's curvature.
      period: T₁.
      factor: ω of one step, in (0, 1).
      floor: the least λ.
      ceiling: the largest λ.
      l2: η ≥ 0, the strength of an ℓ2 penalty that is added here to the loss and its gradient, in place of that of a
        `scale_by_quadratic_model` inside; None: that one's, if there is one.
      damping_in_model: whether the denominator's model has the λ of (F + (λ + η)I) in it, as in the paper, or η alone.

    Returns:
      A transformation with `update(grads, state, params, *, taps)` for taps of `value_grad_and_taps(..., quadratic_model=True)`;
      `value` and `value_fn(params)`, as in `optax.scale_by_backtracking_linesearch`, together replace the taps' own loss.
      `kfe.info` shows λ and r. Under `optax.MultiSteps` loss and model are those of the last microbatch.

    Raises:
      ValueError: numbers out of their ranges; in `update`: no `params`, no taps or taps without the quadratic model, one of
        `value` and `value_fn` without the other.

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
    checks.period("period", period)
    checks.number(factor=factor)
    if not isinstance(factor, jax.Array) and not 0 < factor < 1:
        raise ValueError(
            f"factor must lie between 0 and 1, so that λ falls where the model is good; it is {factor!r}."
        )
    checks.positive(initial_damping=initial_damping)
    checks.not_negative(l2=0.0 if l2 is None else l2)
    checks.interval("floor", floor, "ceiling", ceiling)
    wrapped = optax.with_extra_args_support(inner)

    def init(params):
        numbers = jnp.result_type(float)
        count, rejected = (jnp.zeros((), jnp.int32) for _ in range(2))
        inner_state = wrapped.init(params)
        known = isinstance(inner_state, QuadraticModelState)
        return AdaptiveDampingState(
            inner_state,
            count,
            jnp.asarray(initial_damping, numbers),
            jnp.full((), jnp.nan, numbers),
            rejected,
            None if known else jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates, state, params=None, *, taps=None, value=None, value_fn=None, **extra):
        checks.state(state, AdaptiveDampingState)
        if params is None:
            raise ValueError(
                "adaptive_damping evaluates the loss at the new parameters: call tx.update(grads, opt_state, params, taps=taps)."
            )
        taps = checked_taps(taps)
        if (value is None) != (value_fn is None):
            raise ValueError(
                "value is the loss at the parameters and value_fn that at others: pass both, or neither."
            )
        models = _models(state.inner)
        penalty = l2 if l2 is not None or not models else models[0].l2
        penalty = None if isinstance(penalty, float | int) and not penalty else penalty
        if models:
            gradient, strength = updates, state.damping
            more = {"l2": 0.0 if penalty is None else penalty}
        else:
            gradient, more = regularized(updates, params, penalty), {}
            strength = state.damping if penalty is None else state.damping + penalty
        before = taps.loss if value is None else taps.mean_over_devices(jnp.asarray(value))
        astray = ~(jnp.isfinite(before) & layerwise.all_finite(jax.tree.leaves(updates)))
        if state.last is None:
            more["back"] = astray
        result: Any = wrapped.update(
            gradient, state.inner, params, taps=taps, damping=strength, **more, **extra
        )
        loss_at = taps.loss_at if value_fn is None else lambda p: taps.mean_over_devices(value_fn(p))
        given = updates, result, state, params, taps, before, astray, penalty
        if value_fn is None:
            return _compiled(*given)
        return _taken(*given, loss_at)

    def _taken(updates, result, state, params, taps, before, astray, penalty, loss_at):
        delta, inner_state = result
        count, last = counts.following(state.count), state.last
        due = layerwise.due(count, period)
        # Without one the quadratic model itself has taken back what led astray.
        if last is not None:
            delta = jax.tree.map(
                lambda d, b: jnp.where(astray, -b.astype(d.dtype), d), delta, _as(delta, last)
            )

        def measured():
            there = loss_at(optax.apply_updates(params, delta))
            change = _loss_change(there - before, delta, params, penalty)
            model = _model_change(
                inner_state, updates, delta, params, taps, state.damping, penalty, damping_in_model
            )
            ratio = _ratio(change, model, before).astype(state.damping.dtype)
            finite = jnp.isfinite(jnp.where(astray, there, change))
            squared = state.inner.squared_norm if last is None else inner_product(last, last)
            return ratio, finite, squared != 0

        nothing = jnp.ones((), bool)
        ratio, finite, moved = jax.lax.cond(
            due | astray, measured, lambda: (state.reduction_ratio, nothing, nothing)
        )
        # Where this batch has no finite loss before the last update either, nor there was one, that is the batch's doing.
        held = astray & ~(finite & moved)
        refused = jnp.where(astray, ~held, ~(finite & _reversible(params, delta, inner_state)))
        power = jnp.asarray(factor, state.damping.dtype) ** period
        damping = adapted(state.damping, ratio, power, floor, ceiling)
        damping = jnp.where(due & ~astray, damping, state.damping)
        damping = jnp.where(refused, jnp.minimum(state.damping * REJECTED, ceiling), damping)

        inner_state = _without_momentum(refused, inner_state)
        if last is None:
            squared_norm = jnp.where(held, state.inner.squared_norm, inner_state.squared_norm)
            inner_state = inner_state._replace(squared_norm=squared_norm)
        else:
            taken = _as(last, _unless(refused, delta))
            last = jax.tree.map(lambda d, b: jnp.where(held, b, d.astype(b.dtype)), taken, last)
        new_state = AdaptiveDampingState(
            inner_state,
            count,
            damping.astype(state.damping.dtype),
            jnp.where(astray, jnp.nan, ratio),
            counts.added(state.rejected, refused),
            last,
        )
        return _unless(held | (refused & ~astray), delta), new_state

    @jax.jit
    def _compiled(updates, result, state, params, taps, before, astray, penalty):
        return _taken(updates, result, state, params, taps, before, astray, penalty, taps.loss_at)

    return optax.GradientTransformationExtraArgs(init, explicit_axes.on_any_mesh(update))


def _is_model(node: Any) -> bool:
    return isinstance(node, QuadraticModelState)


def _models(state: Any) -> list[QuadraticModelState]:
    """The states of `scale_by_quadratic_model` in it, which adds the penalty itself."""
    return list(filter(_is_model, jax.tree.leaves(state, is_leaf=_is_model)))


def _without_momentum(refused: jax.Array, state: Any) -> Any:
    """The state, in which an update that was not taken has no part in the next one of `scale_by_quadratic_model`."""

    def marked(node):
        if not _is_model(node):
            return node
        return node._replace(squared_norm=jnp.where(refused, 0, node.squared_norm))

    return jax.tree.map(marked, state, is_leaf=_is_model)


def _unless(condition: jax.Array, tree: Any) -> Any:
    """The tree, or zeros."""
    return jax.tree.map(lambda leaf: jnp.where(condition, 0, leaf), tree)


def _reversible(params: Any, delta: Any, inner_state: Any) -> jax.Array:
    """Whether θ + δ is finite, and near enough that half of the digits of θ, as one vector, survive θ + δ − δ."""
    known = isinstance(inner_state, QuadraticModelState)
    squared = inner_state.squared_norm if known else inner_product(delta, delta)
    size, kinds = inner_product(params, params), [jnp.finfo(p.dtype) for p in jax.tree.leaves(params)]
    # With a finite δᵀδ no |δᵢ| is above the root of the largest float32 number, and only float16 can overflow.
    reversible = jnp.isfinite(squared) & ((size == 0) | (squared * max(float(k.eps) for k in kinds) <= size))
    if any(float(kind.max) < 1e38 for kind in kinds):
        reversible &= layerwise.all_finite(jax.tree.leaves(optax.apply_updates(params, delta)))
    return reversible


def _ratio(change: jax.Array, model: jax.Array, before: jax.Array) -> jax.Array:
    """r, at most zero where the loss rose, and 1/2 where either change is lost in rounding, which says nothing of the model."""
    noise = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    silent = (change == 0) | (jnp.abs(model) <= noise)
    ratio = change / jnp.where(silent, 1, model)
    return jnp.where(silent, 0.5, jnp.where(change > 0, -jnp.abs(ratio), ratio))


def _as(like: Any, tree: Any) -> Any:
    """A tree with the container of another one that has the same leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def adapted(damping: jax.Array, ratio: jax.Array, power: Any, floor: Any, ceiling: Any) -> jax.Array:
    """λ after a reduction ratio r: ω₁λ for r > 3/4, λ/ω₁ for r < 1/4 or no number, in [floor, ceiling]."""
    scale = jnp.where(ratio > 0.75, power, jnp.where(ratio >= 0.25, 1, 1 / power))
    return jnp.clip(damping * scale, floor, ceiling).astype(damping.dtype)


def _loss_change(change: jax.Array, delta: Any, params: Any, l2: Any) -> jax.Array:
    """h(θ+δ) − h(θ) from the change of the loss function."""
    if l2 is None:
        return change
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
    if isinstance(inner_state, QuadraticModelState):
        squared, change = inner_state.squared_norm, inner_state.model_change
        return change if damping_in_model else change - damping * squared / 2
    fisher = taps.fisher_products(taps.tangent(delta))[0, 0]
    strength = damping if damping_in_model else jnp.zeros_like(damping)
    strength = strength if l2 is None else strength + l2
    slope = inner_product(regularized(gradient, params, l2), delta)
    return slope + (fisher + strength * inner_product(delta, delta)) / 2
