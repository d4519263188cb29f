"""`scale_by_quadratic_model`: step size and momentum from the exact Fisher's quadratic model, instead of a learning rate."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks, counts, explicit_axes, static_values
from kfe_optax._layers.layers import Layers
from kfe_optax._layers.paths import leaves_by_path
from kfe_optax._methods import given as given_lib
from kfe_optax._methods import layerwise, matrices, periods
from kfe_optax._methods import request as request_lib
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.request import Request
from kfe_optax._taps.taps import Taps
from kfe_optax._wrappers import damping_search
from kfe_optax._wrappers.damping_search import Proposal
from kfe_optax._wrappers.minimum import combined, minimum, wide


class QuadraticModelState(NamedTuple):
    """State of `scale_by_quadratic_model`.

    Attributes:
      inner: the preconditioner's state.
      count: int32, the number of steps taken.
      previous: δ₀, the last update, in float32 at least.
      inner_damping: γ², the damping that the preconditioner is given; 0 before the first step.
      step_size: α of the last step.
      momentum: μ of the last step.
      model_change: M(δ) − M(0) of the last step, λ included.
      squared_norm: δᵀδ of `previous`; where it is 0, δ₀ has no part in the next step.
      l2: η of the last step; its own before the first.
    """

    inner: Any
    count: jax.Array
    previous: Any
    inner_damping: jax.Array
    step_size: jax.Array
    momentum: jax.Array
    model_change: jax.Array
    squared_norm: jax.Array
    l2: jax.Array


def scale_by_quadratic_model(
    inner: optax.GradientTransformation,
    damping: ScalarOrSchedule,
    *,
    l2: float = 0.0,
    momentum: bool = True,
    max_change: ScalarOrSchedule | None = None,
    search_period: int | None = None,
    search_floor: float = 1e-8,
    search_ceiling: float = 1e8,
) -> optax.GradientTransformationExtraArgs:
    """The update δ = αΔ + μδ₀ that minimizes the quadratic model (Martens & Grosse 2015, sections 6.4, 6.6 and 7).

    Δ = −F̂⁻¹∇h is the preconditioner's proposal, δ₀ the last update, h the loss plus ½η‖θ‖², and

      M(δ) = h(θ) + ∇hᵀδ + ½ δᵀ(F + (λ + η)I)δ

    with F the exact Fisher of the batch, through products J v at the model's outputs. At the minimum M(δ) − M(0) = ½∇hᵀδ.
    The update is ready to be added to the parameters: no learning rate, momentum or KL clip belongs behind it.

    Args:
      inner: a preconditioner, such as `kfe.scale_by_kfac(...)`. Its damping becomes λ + η (or γ², see `search_period`). The
        parameters outside its layers share the step size α: Adam's steps as its `rest`, of the size of one each, make α small
        for all; `optax.identity()`, the gradient itself, goes with it better.
      damping: λ > 0, a scalar or a schedule; `adaptive_damping` around it replaces it.
      l2: η ≥ 0, the strength of an ℓ2 penalty that is added here to the loss and its gradient (and not by the loss function).
      momentum: whether δ₀ takes part.
      max_change: a bound c on √(d_in/d_out) ‖δ_l‖₂ of every layer's matrix, as of `kfe.clip_layers`: the whole of δ is
        shortened until it holds, to νδ with M(νδ) − M(0) = (2ν − ν²) (M(δ) − M(0)); None for no bound.
      search_period: steps T₂ between searches for the preconditioner's own damping γ²: of γ·ω₂, γ and γ/ω₂ the one whose
        update has the lowest M(δ), ω₂ = (19/20)^(T₂/2), starting at γ² = λ + η. All three have the inverses of the present
        factors: the preconditioner forms them three times at such a step, and once more where it would not have refreshed
        them anyway, so T₂ had better be a multiple of its `inverse_update_period`. None: γ² = λ + η always.
      search_floor: the least γ².
      search_ceiling: the largest γ².

    Returns:
      A transformation with `update(grads, state, params, *, taps)`, for taps of
      `kfe.value_grad_and_taps(..., quadratic_model=True)`. A proposal that is not finite gives a zero update. The extra argument
      `request` (a `kfe.Request`, as of `adaptive_damping`) replaces λ and η, leaves out a δ₀ that was not taken, and asks for
      −δ₀ where it led astray.

    Raises:
      ValueError: numbers out of their ranges, a search around anything but a preconditioner that has a damping; in `update`: no
        taps, taps without the quadratic model, no `params` where l2 is not zero.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> tx = kfe.scale_by_quadratic_model(kfe.scale_by_kfac(layers, damping=1e-6), damping=1e-6)
      >>> differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)
      >>> loss, grads, taps = differentiate(params, x, y)
      >>> updates, _ = tx.update(grads, tx.init(params), params, taps=taps)
      >>> bool(jnp.allclose(params["kernel"] + updates["kernel"], 0, atol=1e-4))   # the minimum, in one step
      True
    """
    if search_period is not None:
        checks.period("search_period", search_period)
    checks.positive(damping=damping)
    checks.not_negative(l2=l2)
    if max_change is not None:
        checks.bound(max_change=max_change)
    checks.interval("search_floor", search_floor, "search_ceiling", search_ceiling)
    model = _QuadraticModel(
        optax.with_extra_args_support(inner),
        damping,
        l2,
        momentum,
        max_change,
        search_period,
        search_floor,
        search_ceiling,
    )

    def update(updates, state, params=None, *, taps=None, request=None, **extra):
        checks.state(state, QuadraticModelState)
        taps, request = checked_taps(taps), request_lib.checked(request)
        arrays, static = static_values.split_static(extra)
        penalty = l2 if request.l2 is None else request.l2
        request = request._replace(l2=None if isinstance(penalty, float | int) and not penalty else penalty)
        return step(static, arrays, updates, state, params, taps, request)

    # Compiled, so that a caller that does not compile the whole step does not trace the transposed pull again each time.
    @functools.partial(jax.jit, static_argnums=0)
    def step(static, arrays, updates, state, params, taps, request):
        return model.step(updates, state, params, taps, request, static(arrays))

    return optax.GradientTransformationExtraArgs(model.init, explicit_axes.on_any_mesh(update))


class _QuadraticModel(NamedTuple):
    preconditioner: optax.GradientTransformationExtraArgs
    damping: ScalarOrSchedule
    l2: Any
    momentum: bool
    max_change: ScalarOrSchedule | None
    search_period: int | None
    search_floor: float
    search_ceiling: float

    def init(self, params: Any) -> QuadraticModelState:
        previous = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), wide(p)), params)
        zeros = (jnp.zeros((), jnp.result_type(float)) for _ in range(5))
        numbers = (*zeros, jnp.asarray(self.l2, jnp.result_type(float)))
        state = self.preconditioner.init(params)
        if self.search_period is not None and not request_lib.repeatable(state):
            raise ValueError(
                f"search_period searches for the damping of a preconditioner of this package, and a {type(state).__name__} has "
                "none: give scale_by_quadratic_model the preconditioner itself (clips and chains go around it), or leave "
                "search_period=None."
            )
        return QuadraticModelState(state, jnp.zeros((), jnp.int32), previous, *numbers)

    def step(
        self,
        updates: Any,
        state: QuadraticModelState,
        params: Any,
        taps: Taps,
        request: Request,
        extra: dict[str, Any],
    ) -> tuple[Any, QuadraticModelState]:
        """The update, and the new state; η is that of the request, None for 0."""
        damping = self.damping if request.damping is None else request.damping
        shift = layerwise.value(damping, state.count, "damping")
        shift = shift if request.l2 is None else shift + request.l2
        gradient = regularized(updates, params, request.l2)
        vectors = [state.previous] if self.momentum else []
        tangents = [taps.tangent(vector) for vector in vectors]
        known = state.squared_norm != 0
        known = known if request.taken is None else known & request.taken

        def propose(inner_state: Any, request: Request) -> tuple[Proposal, Any]:
            result: Any = self.preconditioner.update(
                gradient, inner_state, params, taps=taps, request=request, **extra
            )
            direction, inner_state = result
            fisher = taps.fisher_products(taps.tangent(direction), *tangents)
            taken = jnp.stack([jnp.ones((), bool), *(known for _ in vectors)])
            found = minimum(fisher, [direction, *vectors], gradient, shift, taken)
            return Proposal(direction, *found), inner_state

        best, inner_state, inner_damping = self._searched(propose, state, shift)
        delta, numbers = self._delta(best, vectors, state, taps, known, request.back)
        eta = jnp.asarray(0 if request.l2 is None else request.l2)
        new_state = QuadraticModelState(
            inner_state,
            counts.following(state.count),
            delta,
            *(number.astype(state.step_size.dtype) for number in (inner_damping, *numbers, eta)),
        )
        # What is taken back stays δ₀: `adaptive_damping` may find that the batch is to blame, and not the update.
        sign = jnp.where(False if request.back is None else request.back, -1, 1)
        return jax.tree.map(
            lambda d, u: layerwise.narrowed(d * sign.astype(d.dtype), u.dtype), delta, updates
        ), new_state

    def _searched(
        self, propose: damping_search.Propose, state: QuadraticModelState, shift: jax.Array
    ) -> tuple[Proposal, Any, jax.Array]:
        """The proposal, the preconditioner's new state and its γ²: λ + η, or the best of three on a step of the search."""
        if self.search_period is None:
            return *propose(state.inner, Request(shift)), shift
        inner_damping = jnp.where(state.inner_damping > 0, state.inner_damping, shift)
        first, inner_state = propose(state.inner, Request(inner_damping))
        due = (state.count > 0) & periods.due(state.count, self.search_period)
        others = damping_search.neighbors(
            inner_damping, self.search_period, self.search_floor, self.search_ceiling
        )
        fresh = request_lib.refreshed_at(inner_state, state.count)
        return damping_search.searched(due, propose, first, inner_state, inner_damping, others, fresh)

    def _delta(
        self,
        best: Proposal,
        vectors: list[Any],
        state: QuadraticModelState,
        taps: Taps,
        known: jax.Array,
        back: jax.Array | None,
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """δ, zero where the proposal is not finite and δ₀ where that is taken back; α, μ, M(δ) − M(0) and δᵀδ."""
        good = jnp.isfinite(best.coefficients).all() & jnp.isfinite(best.change)
        good = good if back is None else good & ~back
        coefficients = jnp.where(good, best.coefficients, 0)
        direction = jax.tree.map(lambda d: jnp.where(good, d, 0), best.direction)
        shorter = jnp.ones((), best.change.dtype)
        if self.max_change is not None:
            bound = layerwise.value(self.max_change, state.count, "max_change")
            shorter = _shortened(taps.layers, combined(coefficients, [direction, *vectors]), bound)
            coefficients = coefficients * shorter
        change = jnp.where(good, best.change * (2 - shorter) * shorter, 0)
        squared_norm = jnp.where(good, best.squared_norm * shorter**2, 0)
        sizes = -coefficients[0], coefficients[1:].sum()
        vectors = [direction, *vectors]
        if back is not None:
            if len(vectors) == 1:
                coefficients, vectors = jnp.pad(coefficients, (0, 1)), [*vectors, state.previous]
            last = known.astype(coefficients.dtype)
            coefficients = jnp.where(back, jnp.stack([jnp.zeros_like(last), last]), coefficients)
            squared_norm = jnp.where(back, state.squared_norm, squared_norm)
        return combined(coefficients, vectors), (*sizes, change, squared_norm)


def _shortened(layers: Layers, delta: Any, bound: jax.Array) -> jax.Array:
    """ν: the largest number, at most 1, with which no layer's matrix is beyond the bound."""
    leaves = leaves_by_path(delta)
    changes = [
        matrices.change(layer.gather({role: leaves[path] for role, path in layer.paths})).max()
        for layer in given_lib.present_layers(layers, leaves)
    ]
    largest = jnp.stack(changes).max()
    return jnp.where(largest > bound, bound / jnp.where(largest > 0, largest, 1), 1).astype(largest.dtype)


def regularized(gradient: Any, params: Any, l2: Any) -> Any:
    """∇ + ηθ, with None for η = 0."""
    if l2 is None:
        return gradient
    if params is None:
        raise ValueError("l2 needs the parameters: call tx.update(grads, opt_state, params, taps=taps).")
    return jax.tree.map(lambda g, p: g + jnp.asarray(l2, g.dtype) * p, gradient, params)


def checked_taps(taps: Any) -> Taps:
    """The taps, if the quadratic model can be evaluated with them.

    Raises:
      ValueError: there are none, or they were not asked for it.
    """
    if not isinstance(taps, Taps):
        raise ValueError(
            "The quadratic model needs the taps of the step: call tx.update(grads, opt_state, params, taps=taps) with what "
            "kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True) returned."
        )
    taps.check_quadratic_model()
    return taps
