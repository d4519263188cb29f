"""`scale_by_ekfac`: a diagonal scale in the Kronecker-factored eigenbasis (George et al. 2018)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax import factors as factors_lib
from kfe_optax._jax import checks, counts, failures
from kfe_optax._jax.failures import Failure
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods import basis as basis_lib
from kfe_optax._methods import layerwise
from kfe_optax._methods.basis import Refresh
from kfe_optax._methods.layerwise import Matrices, ScalarOrSchedule, Step
from kfe_optax._methods.roots import where_alive
from kfe_optax.factors import base
from kfe_optax.factors.base import Factors, Source

Scales = tuple[Matrices, jax.Array]  # the scales, and the failures


class EkfacState(NamedTuple):
    """State of `scale_by_ekfac` (inside a `LayerwiseState`).

    Attributes:
      factors: the state of the factors, whose eigenvectors are the basis.
      basis: {layer: (Eigenbasis of A, Eigenbasis of G)}.
      scale: {layer: S (*stack, d_in, d_out)}, the second moments of the gradient in that basis.
      damping: λ of the last step.
      failures: by reason (`kfe.Failure`), int32: factors, eigendecompositions and scales that failed; the last good one was
        kept.
      last_refresh: int32, the step of the last refresh of the basis.
    """

    factors: Any
    basis: dict[str, Any]
    scale: dict[str, jax.Array]
    damping: jax.Array
    failures: jax.Array
    last_refresh: jax.Array


def scale_by_ekfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    scale: Literal["batch", "running"] = "running",
    damping_type: Literal["plain", "appendix_c", "trace"] = "plain",
    relative_damping: bool = False,
    trace_floor: float = 0.01,
    factors: Factors | None = None,
    decay: ScalarOrSchedule = 0.95,
    scale_decay: ScalarOrSchedule | None = None,
    factor_update_period: int = 10,
    basis_update_period: int = 50,
    scale_update_period: int = 1,
    initial_refreshes: int = 1,
    on_refresh: Literal["carry", "restart"] = "carry",
    refresh: Refresh = "eigh",
    refresh_tolerance: float | None = None,
    null_threshold: float = 1e-5,
    max_dim: int = 8192,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient V as U_A[(U_Aᵀ V U_G) ⊘ (S + λ)]U_Gᵀ (George et al. 2018, sections 3 and 4).

    U_A, U_G are eigenvectors of K-FAC's factors, S the second moments of the gradient along them. "batch": S* =
    E[(U_Aᵀ ∇W̄ U_G)²] over the per-example gradients of the Fisher's draw, the best diagonal in that basis. "running" (EKFAC-ra):
    a running average of N (U_Aᵀ ∇̄ U_G)² of the mean gradient ∇̄, which needs no further backward pass; N is 1/weight of an
    element in the loss (N for a mean over N), so that S is in the units of the loss's Gauss–Newton matrix.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      scale: see above.
      damping_type: "plain" adds λ to S; "appendix_c" adds λ + (√λ/π) s_A 1ᵀ + π√λ 1 s_Gᵀ, what K-FAC's factored damping adds;
        "trace" is TEKFAC's (see `scale_by_tekfac`).
      relative_damping: whether λ is `damping` times each layer's own mean curvature, so that it does not depend on the scale of
        the loss nor on that of the layer; `damping` is then a number without a unit, such as 0.1.
        That is the mean of S, and with "appendix_c" (tr A/d_in)(tr G/d_out).
      trace_floor: ϑ of "trace".
      factors: one of `kfe.factors`, whose leading term's eigenvectors are the basis; `kfe.factors.kfac(decay)` by default.
      decay: ρ of the running averages of the default factors; the k-th update uses min(1 − 1/k, ρ).
      scale_decay: ρ of S; `decay` by default, 0 takes S from the current batch alone.
      factor_update_period: steps between updates of A and G, each one more backward pass.
      basis_update_period: steps between refreshes of the basis.
      scale_update_period: steps between updates of S.
      initial_refreshes: the first steps, in each of which factors and basis are refreshed.
      on_refresh: "carry" takes S into the new basis by the squared rotation, which keeps its trace; "restart" sets it to
        s_A s_Gᵀ.
      refresh: "eigh", or "qr": after the first eigh, one power step and a QR with sorted columns, U ← qr(A U).
      refresh_tolerance: a side of the basis with ‖offdiag(UᵀAU)‖_F ≤ tolerance ‖A‖_F is not refreshed; None: all are.
      null_threshold: directions whose eigenvalue is below this fraction of the largest share one mean scale, since eigh's
        basis of a null space is arbitrary; 0 turns it off.
      max_dim: a side larger than this keeps the identity as its basis.
      distribute: "none": every device factorizes everything; "inverses": each device factorizes its share, and all get the
        results; "inverses_and_apply": likewise each device takes its share of the gradients into the basis and
        back in every step. See `scale_by_kronecker`.
      rest: the transformation of the parameters outside the layers; `optax.scale_by_adam()` by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`. A layer whose per-example gradients are not available
      (applied under a per-example vmap) keeps S = s_A s_Gᵀ with "batch". See also `scale_by_kfac`.

    Raises:
      ValueError: a damping that is not positive, a decay outside [0, 1], an option that does not exist, a period that is not a
        positive whole number; in `update`: no taps, taps of other layers, a changed or partly masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, labels):
      ...     logits = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> params, x, labels = {"kernel": jnp.zeros((3, 2))}, jnp.eye(3), jnp.array([0, 1, 0])
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> tx = optax.chain(kfe.scale_by_ekfac(layers, damping=1e-3), optax.scale_by_learning_rate(0.1))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(0))
      >>> updates, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> updates["kernel"].shape
      (3, 2)
    """
    checks.positive(damping=damping)
    checks.decay("decay", decay)
    checks.number(trace_floor=trace_floor, null_threshold=null_threshold)
    checks.decay("scale_decay", decay if scale_decay is None else scale_decay)
    if factors is None:
        factors = factors_lib.kfac(decay)
    if not factors.needs_taps:
        raise ValueError(
            "Factors of the mean gradient are in other units than EKFAC's scale; run a transformation in their basis with "
            "kfe.in_kfe(inner, layers, basis=kfe.factors.gradient())."
        )
    for name, chosen, known in (
        ("scale", scale, ("batch", "running")),
        ("damping_type", damping_type, ("plain", "appendix_c", "trace")),
        ("on_refresh", on_refresh, ("carry", "restart")),
    ):
        if chosen not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {chosen!r}.")
    checks.refreshes(
        initial_refreshes,
        factor_update_period=factor_update_period,
        basis_update_period=basis_update_period,
        scale_update_period=scale_update_period,
    )
    basis_lib.check(refresh, refresh_tolerance)
    method = _Ekfac(
        layers=layers,
        factors=factors,
        damping=damping,
        batch=scale == "batch",
        damping_type=damping_type,
        relative=relative_damping,
        trace_floor=trace_floor,
        scale_decay=decay if scale_decay is None else scale_decay,
        factor_update_period=factor_update_period,
        basis_update_period=basis_update_period,
        scale_update_period=scale_update_period,
        initial_refreshes=initial_refreshes,
        carry=on_refresh == "carry",
        refresh=refresh,
        refresh_tolerance=refresh_tolerance,
        null_threshold=null_threshold,
        max_dim=max_dim,
    )
    return layerwise.layerwise(layers, method, rest, distribute)


class _Ekfac(NamedTuple):
    layers: Layers
    factors: Factors
    damping: ScalarOrSchedule
    batch: bool
    damping_type: str
    relative: bool
    trace_floor: Any
    scale_decay: ScalarOrSchedule
    factor_update_period: Any
    basis_update_period: Any
    scale_update_period: Any
    initial_refreshes: int
    carry: bool
    refresh: Refresh
    refresh_tolerance: Any
    null_threshold: float
    max_dim: int

    needs_taps = True
    reads_parameters = False

    def init(self, layers: list[Layer]) -> EkfacState:
        factors = self.factors.init(layers, self.max_dim)
        basis = basis_lib.init(self.layers, self.factors.terms(factors, self.layers))
        scale = {layer.name: jnp.zeros(layer.shape, layer.factor_dtype) for layer in layers}
        return EkfacState(factors, basis, scale, *layerwise.counters())

    def update(self, state: EkfacState, step: Step) -> tuple[Matrices, EkfacState]:
        count, taps = step.count, step.taps
        assert taps is not None
        strength = step.strength(self.damping, self.relative)
        if step.again:
            return self._applied(state, step, self._rotated(state, step), strength)
        new_factors = layerwise.due(count, self.factor_update_period, self.initial_refreshes)
        new_basis = layerwise.due(count, self.basis_update_period, self.initial_refreshes)
        new_scale = layerwise.due(count, self.scale_update_period)
        # The stand-in s_A s_Gᵀ of a first scale is no measure of it: N squared mean gradients may be N times as much.
        known = state.last_refresh >= 0
        refresh = new_factors | new_basis
        if self.batch:
            refresh |= new_scale
        state = jax.lax.cond(
            refresh,
            lambda: self._refresh(state, step, taps.pulled(), new_factors, new_basis, new_scale),
            lambda: state,
        )
        rotated = self._rotated(state, step)
        if not self.batch:
            scale, failed = layerwise.refreshed(
                new_scale,
                step.finite,
                lambda: self._running_scale(state, rotated, step, known),
                (state.scale, state.failures),
            )
            state = state._replace(scale=scale, failures=failed)
        return self._applied(state, step, rotated, strength)

    def _rotated(self, state: EkfacState, step: Step) -> Matrices:
        wide = {name: v.astype(state.scale[name].dtype) for name, v in step.gradients.items()}
        return basis_lib.into(wide, state.basis, step.devices.products)

    def _applied(
        self, state: EkfacState, step: Step, rotated: Matrices, strength: jax.Array
    ) -> tuple[Matrices, EkfacState]:
        terms = self.factors.terms(state.factors, self.layers)
        denominators = self._denominators(state, strength)
        scaled = {name: v / denominators[name] for name, v in rotated.items()}
        new = {}
        for name, result in basis_lib.out_of(scaled, state.basis, step.devices.products).items():
            new[name] = where_alive(
                terms[name][0],
                len(self.layers[name].stack_shape),
                result,
                step.gradients[name].astype(result.dtype),
                state.last_refresh >= 0,
            )
        return new, state._replace(damping=strength)

    def _denominators(self, state: EkfacState, strength: jax.Array) -> Matrices:
        scales = {
            name: kronecker.pool_null_directions(scale, state.basis[name], self.null_threshold)
            for name, scale in state.scale.items()
        }
        if self.damping_type == "trace":
            return damping_lib.trace_tuned(
                scales, self.layers, strength, self.trace_floor, relative=self.relative
            )
        return {
            name: scale + self._added(scale, state.basis[name], strength) for name, scale in scales.items()
        }

    def _added(self, scale: jax.Array, basis: Any, strength: jax.Array) -> jax.Array:
        inputs, outputs = basis
        if self.damping_type == "plain":
            least = damping_lib.least(inputs.values.max(-1) * outputs.values.max(-1))[..., None, None]
            strength = strength.astype(scale.dtype)
            if self.relative:
                strength = strength * scale.mean((-2, -1), keepdims=True)
            return jnp.maximum(strength, least)
        # π belongs to the same factors as the eigenvalues, which may be older than the running averages.
        means = inputs.values.mean(-1), outputs.values.mean(-1)
        ratio = damping_lib.common_pi(*means)
        if self.relative:
            strength = strength * means[0] * means[1]
        return damping_lib.appendix_c(inputs.values, outputs.values, strength, ratio)

    @jax.default_matmul_precision("highest")
    def _refresh(self, state, step, pulled, new_factors, new_basis, new_scale) -> EkfacState:
        """Factors, basis and the batch scale from one shared pull."""
        first = state.last_refresh < 0
        source = Source(self.layers, pulled, step.gradients)
        factors = layerwise.refreshed(
            new_factors,
            step.finite,
            lambda: self.factors.update(state.factors, source, step.count),
            state.factors,
        )
        failed = counts.added(state.failures, failures.between(state.factors.failures, factors.failures))
        state = state._replace(factors=factors, failures=failed)
        basis, scale, failed, last_refresh = layerwise.refreshed(
            new_basis,
            step.finite,
            lambda: self._new_basis(state, step),
            (state.basis, state.scale, state.failures, state.last_refresh),
        )
        state = state._replace(basis=basis, scale=scale, failures=failed, last_refresh=last_refresh)
        if self.batch:
            scale, failed = layerwise.refreshed(
                new_scale,
                step.finite,
                lambda: self._batch_scale(state, step.count, pulled, first),
                (state.scale, state.failures),
            )
            state = state._replace(scale=scale, failures=failed)
        return state

    def _new_basis(self, state: EkfacState, step: Step) -> tuple[Any, Matrices, jax.Array, jax.Array]:
        first = state.last_refresh < 0
        terms = self.factors.terms(state.factors, self.layers)
        basis, failed = basis_lib.refreshed(
            self.layers,
            terms,
            state.basis,
            first,
            self.refresh,
            self.refresh_tolerance,
            step.devices.inverses,
        )
        scale = {}
        for name, old in state.scale.items():
            inputs, outputs = basis[name]
            # Blocks that share factors have one product.
            restarted = jnp.broadcast_to(kronecker.outer(inputs.values, outputs.values), old.shape)
            if self.carry:
                carried = kronecker.carry_second_moment(old, state.basis[name], basis[name])
                restarted = jnp.where(first, restarted, carried)
            scale[name] = restarted
        more = failures.of(Failure.FACTORIZATION, failed)
        return basis, scale, counts.added(state.failures, more), step.count

    def _batch_scale(self, state: EkfacState, count: jax.Array, pulled: Any, first: jax.Array) -> Scales:
        def moments(statistics):
            found = {
                name: statistics[name].second_moment_in(inputs.vectors, outputs.vectors)
                for name, (inputs, outputs) in state.basis.items()
            }
            return {name: moment for name, moment in found.items() if moment is not None}

        # The start s_A s_Gᵀ is only a stand-in: the first measured scale replaces it.
        first = first & (state.last_refresh >= 0)
        decay = jnp.where(first, 0, layerwise.value(self.scale_decay, count, "scale_decay"))
        return self._average(state, pulled.reduce(moments), decay, jnp.ones((), bool))

    def _running_scale(self, state: EkfacState, rotated: Matrices, step: Step, known: jax.Array) -> Scales:
        taps = step.taps
        assert taps is not None
        weight = taps.gradient_weight
        moments = {
            name: jnp.square(v) * (taps.examples_of(name) if weight is None else weight).astype(v.dtype)
            for name, v in rotated.items()
        }
        return self._average(
            state, moments, layerwise.value(self.scale_decay, step.count, "scale_decay"), known
        )

    def _average(self, state: EkfacState, moments: Matrices, decay: jax.Array, known: jax.Array) -> Scales:
        scale, failed = dict(state.scale), state.failures
        for name, moment in moments.items():
            own = base.weights(decay, jnp.where(known, base.proportion(scale[name], moment), 0))
            average = own.past.astype(moment.dtype) * scale[name] + own.new.astype(moment.dtype) * moment
            finite = jnp.isfinite(jnp.abs(moment).max())
            more = failures.estimates(~finite, finite & own.excessive)
            failed = counts.added(failed, more)
            scale[name] = jnp.where(finite, average, scale[name])
        return scale, failed
