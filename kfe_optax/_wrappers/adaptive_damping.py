"""`adaptive_damping`: λ by the Levenberg–Marquardt rule, from how well the quadratic model foretells the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks, counts, explicit_axes
from kfe_optax._methods import layerwise, periods
from kfe_optax._methods.request import Request
from kfe_optax._taps.taps import Taps
from kfe_optax._wrappers.levenberg_marquardt import adapted, loss_change, reduction_ratio, reversible
from kfe_optax._wrappers.minimum import inner_product
from kfe_optax._wrappers.quadratic_model import QuadraticModelState, checked_taps, regularized

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
      taken: whether the last update was taken, and stands.
    """

    inner: Any
    count: jax.Array
    damping: jax.Array
    reduction_ratio: jax.Array
    rejected: jax.Array
    last: Any
    taken: jax.Array


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
        Fisher more at each T₁-th step). λ goes to it in the extra argument `request`, a `kfe.Request`.
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
    rule = _Rule(
        optax.with_extra_args_support(inner),
        initial_damping,
        period,
        factor,
        floor,
        ceiling,
        l2,
        damping_in_model,
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
        trial = rule.trial(updates, state, params, taps, value, extra)
        if value_fn is None:
            return compiled(trial, state, params, taps)
        return rule.judged(trial, state, params, taps, lambda p: taps.mean_over_devices(value_fn(p)))

    @jax.jit
    def compiled(trial, state, params, taps):
        return rule.judged(trial, state, params, taps, taps.loss_at)

    return optax.GradientTransformationExtraArgs(rule.init, explicit_axes.on_any_mesh(update))


class _Trial(NamedTuple):
    """A step that is to be judged.

    Attributes:
      gradient: that of the loss, without the penalty.
      delta: the update as proposed; −δ₀ where the last one led astray and the quadratic model inside knows it.
      inner: the state of what proposed it.
      before: the loss at the parameters.
      astray: whether that or the gradient is not finite.
      l2: η, None for 0.
    """

    gradient: Any
    delta: Any
    inner: Any
    before: jax.Array
    astray: jax.Array
    l2: Any


class _Rule(NamedTuple):
    inner: optax.GradientTransformationExtraArgs
    initial_damping: float
    period: int
    factor: Any
    floor: Any
    ceiling: Any
    l2: Any
    damping_in_model: bool

    def init(self, params: Any) -> AdaptiveDampingState:
        numbers = jnp.result_type(float)
        count, rejected = (jnp.zeros((), jnp.int32) for _ in range(2))
        inner_state = self.inner.init(params)
        return AdaptiveDampingState(
            inner_state,
            count,
            jnp.asarray(self.initial_damping, numbers),
            jnp.full((), jnp.nan, numbers),
            rejected,
            None if _is_model(inner_state) else jax.tree.map(jnp.zeros_like, params),
            jnp.ones((), bool),
        )

    def trial(
        self, updates: Any, state: AdaptiveDampingState, params: Any, taps: Taps, value: Any, extra: Any
    ) -> _Trial:
        """What is inside, asked for its update."""
        models = _models(state.inner)
        penalty = self.l2 if self.l2 is not None or not models else models[0].l2
        penalty = None if isinstance(penalty, float | int) and not penalty else penalty
        before = taps.loss if value is None else taps.mean_over_devices(jnp.asarray(value))
        astray = ~(jnp.isfinite(before) & layerwise.all_finite(jax.tree.leaves(updates)))
        if models:
            gradient = updates
            request = Request(state.damping, l2=0.0 if penalty is None else penalty, taken=state.taken)
            # What a chain makes of the model's update it alone can take back.
            request = request._replace(back=astray if state.last is None else None)
        else:
            gradient = regularized(updates, params, penalty)
            request = Request(state.damping if penalty is None else state.damping + penalty)
        result: Any = self.inner.update(gradient, state.inner, params, taps=taps, request=request, **extra)
        return _Trial(updates, *result, before, astray, penalty)

    def judged(
        self, trial: _Trial, state: AdaptiveDampingState, params: Any, taps: Taps, loss_at: Any
    ) -> tuple[Any, AdaptiveDampingState]:
        """The update that is taken, and the new state."""
        count, last, astray = counts.following(state.count), state.last, trial.astray
        due = periods.due(count, self.period)
        if last is not None:
            delta = jax.tree.map(
                lambda d, b: jnp.where(astray, -b.astype(d.dtype), d), trial.delta, _as(trial.delta, last)
            )
            trial = trial._replace(delta=delta)
        nothing = jnp.ones((), bool)
        ratio, finite, moved = jax.lax.cond(
            due | astray,
            lambda: self._measured(trial, state, params, taps, loss_at),
            lambda: (state.reduction_ratio, nothing, nothing),
        )
        # Where this batch has no finite loss before the last update either, nor there was one, that is the batch's doing.
        held = astray & ~(finite & moved)
        short = reversible(params, trial.delta, _squared_norm(trial.inner, trial.delta))
        refused = jnp.where(astray, ~held, ~(finite & short))
        power = jnp.asarray(self.factor, state.damping.dtype) ** self.period
        damping = adapted(state.damping, ratio, power, self.floor, self.ceiling)
        damping = jnp.where(due & ~astray, damping, state.damping)
        damping = jnp.where(refused, jnp.minimum(state.damping * REJECTED, self.ceiling), damping)
        if last is not None:
            taken = _as(last, _unless(refused, trial.delta))
            last = jax.tree.map(lambda d, b: jnp.where(held, b, d.astype(b.dtype)), taken, last)
        new_state = AdaptiveDampingState(
            trial.inner,
            count,
            damping.astype(state.damping.dtype),
            jnp.where(astray, jnp.nan, ratio),
            counts.added(state.rejected, refused),
            last,
            jnp.where(held, state.taken, ~refused),
        )
        return _unless(held | (refused & ~astray), trial.delta), new_state

    def _measured(
        self, trial: _Trial, state: AdaptiveDampingState, params: Any, taps: Taps, loss_at: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """r, whether the loss behind the update is finite, and whether there was a last update."""
        there = loss_at(optax.apply_updates(params, trial.delta))
        change = loss_change(there - trial.before, trial.delta, params, trial.l2)
        model = self._model_change(trial, state.damping, params, taps)
        ratio = reduction_ratio(change, model, trial.before).astype(state.damping.dtype)
        finite = jnp.isfinite(jnp.where(trial.astray, there, change))
        squared = _squared_norm(state.inner, state.last)
        return ratio, finite, state.taken & (squared != 0)

    def _model_change(self, trial: _Trial, damping: jax.Array, params: Any, taps: Taps) -> jax.Array:
        """M(δ) − M(0)."""
        delta = trial.delta
        if isinstance(trial.inner, QuadraticModelState):
            squared, change = trial.inner.squared_norm, trial.inner.model_change
            return change if self.damping_in_model else change - damping * squared / 2
        fisher = taps.fisher_products(taps.tangent(delta))[0, 0]
        shift = damping if self.damping_in_model else jnp.zeros_like(damping)
        shift = shift if trial.l2 is None else shift + trial.l2
        slope = inner_product(regularized(trial.gradient, params, trial.l2), delta)
        return slope + (fisher + shift * inner_product(delta, delta)) / 2


def _is_model(node: Any) -> bool:
    return isinstance(node, QuadraticModelState)


def _models(state: Any) -> list[QuadraticModelState]:
    """The states of `scale_by_quadratic_model` in it, which adds the penalty itself."""
    return list(filter(_is_model, jax.tree.leaves(state, is_leaf=_is_model)))


def _unless(condition: jax.Array, tree: Any) -> Any:
    """The tree, or zeros."""
    return jax.tree.map(lambda leaf: jnp.where(condition, 0, leaf), tree)


def _squared_norm(inner_state: Any, delta: Any) -> jax.Array:
    """δᵀδ, which the quadratic model knows."""
    known = isinstance(inner_state, QuadraticModelState)
    return inner_state.squared_norm if known else inner_product(delta, delta)


def _as(like: Any, tree: Any) -> Any:
    """A tree with the container of another one that has the same leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))
