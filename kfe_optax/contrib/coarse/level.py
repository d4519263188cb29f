"""The coarse level: when it measures and refreshes, and the correction Zᵀ F_c⁻¹ Z∇."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import counts, failures
from kfe_optax._jax.failures import Failure
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.kronecker import Eigenbasis
from kfe_optax._methods import given as given_lib
from kfe_optax._methods import layerwise, periods
from kfe_optax._methods.layerwise import Matrices, ScalarOrSchedule, Step
from kfe_optax.contrib.coarse import fisher, spaces
from kfe_optax.factors import base

Present = Mapping[str, Layer]

# So many rounding errors of the largest eigenvalue of F_c are the least that its inverse divides by.
ROUNDINGS = 4


class CoarseState(NamedTuple):
    """The coarse level of `two_level`.

    Attributes:
      space: where the coarse vectors are kept that change (see `kfe_optax.contrib.coarse.spaces`).
      averages: the running averages of which F_c is made: E[α αᵀ] and E[γ γᵀ] ("factored"), or E[ζ ζᵀ] ("exact").
      updates: int32, how many batches are in them.
      basis: eigenvalues and eigenvectors of F_c; zeros stand for coarse vectors without curvature, and before the first refresh.
      failures: by reason (`kfe.Failure`), int32: estimates and factorizations that failed; the last good ones were kept.
      last_refresh: int32, the step of the last refresh of the basis.
    """

    space: Any
    averages: Any
    updates: jax.Array
    basis: Eigenbasis
    failures: jax.Array
    last_refresh: jax.Array


class Level(NamedTuple):
    """The coarse level of `two_level`: space, form and options; `Step` is that of `layerwise`."""

    layers: Layers
    space: spaces.Space
    form: fisher.Form
    damping: ScalarOrSchedule
    relative: bool
    decay: ScalarOrSchedule
    factor_update_period: Any
    inverse_update_period: Any
    early: periods.Early

    def present(self, leaves: Any) -> list[Layer]:
        """The layers in the tree that have coarse vectors."""
        present = [layer for layer in given_lib.present_layers(self.layers, leaves) if not layer.constant]
        if not present:
            raise ValueError(
                "No layer in the tree can have a coarse vector: their inputs are the same for all examples. Use the fine "
                "preconditioner alone."
            )
        return present

    def _of(self, step: Step) -> dict[str, Layer]:
        """The layers of a step in the order of the forward pass; a dictionary that went through jit is in that of its keys."""
        return {name: layer for name, layer in self.layers.items() if name in step.gradients}

    def init(self, present: list[Layer]) -> CoarseState:
        layers = {layer.name: layer for layer in present}
        dtype = _dtype(layers)
        averages = self.form.init(self.space, layers, dtype)
        size = jax.eval_shape(lambda: self.form.matrix(averages, self.space, layers)).shape[0]
        basis = Eigenbasis(jnp.zeros(size, dtype), jnp.zeros((size, size), dtype))
        updates = jnp.zeros((), jnp.int32)
        return CoarseState(self.space.init(present), averages, updates, basis, *layerwise.counters()[1:])

    def update(self, state: CoarseState, step: Step, fine: Matrices) -> tuple[Matrices, CoarseState]:
        """The correction {layer: (*stack, d_in, d_out)} and the new state."""
        layers = self._of(step)
        damping = layerwise.value(self.damping, step.count, "damping")
        if not step.again:
            refresh = periods.due(step.count, self.inverse_update_period, self.early)
            measure = periods.due(step.count, self.factor_update_period, self.early)
            # New vectors need a Fisher matrix of their own.
            measure = measure | refresh if self.space.moves else measure
            state = periods.new_if_due(
                measure | refresh,
                step.finite,
                lambda: self._refreshed(state, step, fine, damping, measure, refresh),
                state,
            )
        return self._correction(state, step, layers, damping), state

    @jax.default_matmul_precision("highest")
    def _refreshed(
        self,
        state: CoarseState,
        step: Step,
        fine: Matrices,
        damping: jax.Array,
        measure: jax.Array,
        refresh: jax.Array,
    ) -> CoarseState:
        """The state of a step that is due and whose gradient is finite."""
        space, averages, updates, failed, bad = jax.lax.cond(
            measure,
            lambda: self._measured(state, step, fine, damping, refresh),
            lambda: (state.space, state.averages, state.updates, failures.none(), failures.none()),
        )
        basis, good = jax.lax.cond(
            refresh,
            lambda: self._factorized(averages, step, state.basis),
            lambda: (state.basis, jnp.ones((), bool)),
        )
        failed = failed + bad + failures.of(Failure.FACTORIZATION, ~good)
        if self.space.moves:
            # Vectors, their averages and their basis belong together.
            keep = refresh & ((bad > 0).any() | ~good)
            old = (state.space.vectors, state.averages, state.updates, state.basis)
            new = (space.vectors, averages, updates, basis)
            vectors, averages, updates, basis = jax.tree.map(lambda o, n: jnp.where(keep, o, n), old, new)
            space = space._replace(vectors=vectors)
        return CoarseState(
            space,
            averages,
            updates,
            basis,
            counts.added(state.failures, failed),
            jnp.where(refresh, step.count, state.last_refresh),
        )

    def _measured(
        self, state: CoarseState, step: Step, fine: Matrices, damping: jax.Array, refresh: jax.Array
    ) -> tuple[Any, ...]:
        """The space, the averages and their updates after one more batch; failures of the space, and of the estimate."""
        assert step.taps is not None
        layers = self._of(step)
        pulled = step.taps.pulled()
        given = spaces.Given(
            layers,
            self.layers,
            pulled,
            step.gradients,
            fine,
            damping,
            step.count,
            refresh,
            step.devices.inverses,
        )
        space, failed = self.space.update(state.space, given)
        vectors = self.space.vectors(space, list(layers.values()))
        new = self.form.measure(pulled, vectors, layers, _dtype(layers))
        updates = jnp.where(refresh, 0, state.updates) if self.space.moves else state.updates
        updates = counts.added(updates, 1)
        rho = base.weight_of_past(updates, self.decay, step.count)
        averages, bad = base.average({"": state.averages}, {"": new}, rho)
        return space, averages[""], updates, failed, bad

    def _factorized(self, averages: Any, step: Step, old: Eigenbasis) -> tuple[Eigenbasis, jax.Array]:
        layers = self._of(step)
        matrix = self.form.matrix(averages, self.space, layers)
        basis, finite = jax.tree.map(lambda v: v[0], kronecker.eigh(matrix[None]))
        # A vector without curvature is not in the coarse space: 1/λ is no measure of a step along it.
        alive = jnp.diagonal(matrix) > 0
        basis = basis._replace(vectors=jnp.where(alive[:, None], basis.vectors, 0))
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), basis, old), finite

    @jax.default_matmul_precision("highest")
    def _correction(self, state: CoarseState, step: Step, layers: Present, damping: jax.Array) -> Matrices:
        """Zᵀ F_c⁻¹ Z∇."""
        dtype = _dtype(layers)
        vectors = self.space.vectors(state.space, list(layers.values()))
        parts = [
            vectors[name].project(layer, step.gradients[name].astype(layer.factor_dtype))
            for name, layer in layers.items()
        ]
        gradient = jnp.concatenate([part.ravel() for part in parts]).astype(dtype)
        basis = state.basis
        assert basis.vectors is not None
        # Zero rows stand for vectors that are not in the space; their gradient may be anything.
        gradient = jnp.where(jnp.any(basis.vectors != 0, 1), gradient, 0)
        # A schedule may reach λ = 0: of a curvature below its rounding errors no inverse is taken.
        smallest = ROUNDINGS * float(jnp.finfo(dtype).eps) * jnp.max(basis.values)
        added = damping.astype(dtype) * (jnp.mean(basis.values) if self.relative else 1)
        scaled = (gradient @ basis.vectors) / jnp.maximum(basis.values + added, smallest)
        coefficients = basis.vectors @ scaled
        usable = step.finite & jnp.isfinite(coefficients).all()
        ends = list(_ends(parts))
        return {
            name: jnp.where(
                usable,
                vectors[name].combine(layer, coefficients[end - part.size : end].reshape(part.shape)),
                0,
            )
            for (name, layer), part, end in zip(layers.items(), parts, ends, strict=True)
        }


def _ends(parts: list[jax.Array]) -> Iterator[int]:
    end = 0
    for part in parts:
        end += part.size
        yield end


def _dtype(layers: Present) -> Any:
    """The dtype of the coarse level: the widest of the layers' factors."""
    return functools.reduce(jnp.promote_types, [layer.factor_dtype for layer in layers.values()])
