"""One step of EKFAC: factors, basis and scale when each is due, and the gradient divided in the basis."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import counts, failures
from kfe_optax._jax.failures import Failure
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker, moving
from kfe_optax._methods import basis as basis_lib
from kfe_optax._methods import layerwise, periods, scales
from kfe_optax._methods.basis import Refresh
from kfe_optax._methods.layerwise import Matrices, ScalarOrSchedule, Step
from kfe_optax._methods.scales import Scales
from kfe_optax.factors.base import Factors, Source


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


class Ekfac(NamedTuple):
    """The method of `scale_by_ekfac`, whose options are its fields."""

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
    early: periods.Early
    carry: bool
    refresh: Refresh
    refresh_tolerance: Any
    null_threshold: float
    max_dim: int | None

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
        damping = step.damping_of(self.damping, self.relative)
        if step.again:
            return self._applied(state, step, self._rotated(state, step), damping)
        new_factors = periods.due(count, self.factor_update_period, self.early)
        new_basis = periods.due(count, self.basis_update_period, self.early)
        new_scale = periods.due(count, self.scale_update_period, self.early._replace(steps=0))
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
            scale, failed = periods.new_if_due(
                new_scale,
                step.finite,
                lambda: self._running_scale(state, rotated, step, known),
                (state.scale, state.failures),
            )
            state = state._replace(scale=scale, failures=failed)
        return self._applied(state, step, rotated, damping)

    def _rotated(self, state: EkfacState, step: Step) -> Matrices:
        wide = {name: v.astype(state.scale[name].dtype) for name, v in step.gradients.items()}
        return basis_lib.into(wide, state.basis, step.devices.products)

    def _applied(
        self, state: EkfacState, step: Step, rotated: Matrices, damping: jax.Array
    ) -> tuple[Matrices, EkfacState]:
        denominators = scales.denominators(
            self.layers,
            state.scale,
            state.basis,
            damping,
            damping_type=self.damping_type,
            relative=self.relative,
            trace_floor=self.trace_floor,
            null_threshold=self.null_threshold,
        )
        scaled = {}
        for name, v in rotated.items():
            # A layer without curvature, as all are before the first refresh, passes its gradient on.
            alive = kronecker.outer(*(side.values.max(-1, keepdims=True) for side in state.basis[name])) > 0
            scaled[name] = v / jnp.where(alive, denominators[name], 1)
        new = basis_lib.out_of(scaled, state.basis, step.devices.products)
        return new, state._replace(damping=damping)

    @jax.default_matmul_precision("highest")
    def _refresh(self, state, step, pulled, new_factors, new_basis, new_scale) -> EkfacState:
        """Factors, basis and the batch scale from one shared pull."""
        first = state.last_refresh < 0
        source = Source(self.layers, pulled, step.gradients)
        factors = periods.new_if_due(
            new_factors,
            step.finite,
            lambda: self.factors.update(state.factors, source, step.count),
            state.factors,
        )
        failed = counts.added(state.failures, failures.between(state.factors.failures, factors.failures))
        state = state._replace(factors=factors, failures=failed)
        basis, scale, failed, last_refresh = periods.new_if_due(
            new_basis,
            step.finite,
            lambda: self._new_basis(state, step),
            (state.basis, state.scale, state.failures, state.last_refresh),
        )
        state = state._replace(basis=basis, scale=scale, failures=failed, last_refresh=last_refresh)
        if self.batch:
            scale, failed = periods.new_if_due(
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
                carried = moving.carry_second_moment(old, state.basis[name], basis[name])
                restarted = jnp.where(first, restarted, carried)
            scale[name] = restarted
        more = failures.of(Failure.FACTORIZATION, failed)
        return basis, scale, counts.added(state.failures, more), step.count

    def _batch_scale(self, state: EkfacState, count: jax.Array, pulled: Any, first: jax.Array) -> Scales:
        # The start s_A s_Gᵀ is only a stand-in: the first measured scale replaces it.
        first = first & (state.last_refresh >= 0)
        decay = jnp.where(first, 0, layerwise.value(self.scale_decay, count, "scale_decay"))
        moments = scales.of_batch(pulled, state.basis)
        return scales.averaged(state.scale, moments, decay, jnp.ones((), bool), state.failures)

    def _running_scale(self, state: EkfacState, rotated: Matrices, step: Step, known: jax.Array) -> Scales:
        decay = layerwise.value(self.scale_decay, step.count, "scale_decay")
        moments = scales.of_mean(step.taps, rotated)
        return scales.averaged(state.scale, moments, decay, known, state.failures)
