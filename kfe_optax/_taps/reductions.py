"""Reductions of the statistics of one refresh: over exact columns, samples, microbatches and devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax._layers.layers import Layers
from kfe_optax._statistics.statistics import Statistics
from kfe_optax._taps import microbatches
from kfe_optax._taps.plan import Passage, Plan

S = TypeVar("S")
T = TypeVar("T")


class Draws(Protocol):
    """What reductions, and single layers' taps, read of `Taps`."""

    @property
    def plan(self) -> Plan: ...

    @property
    def layers(self) -> Layers: ...

    def draw(self, index: Any, passage: Passage | None = None) -> dict[str, Statistics]: ...

    def mean_over_microbatches(self, function: Callable[[Passage], T]) -> T: ...

    def pulled(self) -> Pulled: ...


class Pulled:
    """Taps inside one refresh (see `Taps.pulled`)."""

    def __init__(self, taps: Draws, statistics: dict[str, Statistics] | None):
        self._taps = taps
        self._statistics = statistics

    def both(self, inputs: Callable[[Any], S], outputs: Callable[[Any], T]) -> tuple[S, T]:
        """`inputs(statistics by layer)`, which depends on the inputs ā alone, beside `reduce(outputs)`, in one reduction."""

        def summed(passage: Passage | None) -> tuple[S, T]:
            if self._taps.plan.draws == 1:
                statistics = self._draw(0, passage)
                return inputs(statistics), outputs(statistics)
            return inputs(self._draw(0, passage)), self._over_draws(outputs, passage)

        return self._over_devices(summed)

    def reduce(self, function: Callable[[dict[str, Statistics]], T]) -> T:
        """Σ over exact columns, or the mean over samples, of `function(statistics by layer)`, averaged over devices.

        `function` maps the statistics of one draw to a pytree of arrays that are quadratic in g.
        """

        def summed(passage: Passage | None) -> T:
            if self._taps.plan.draws == 1:
                return function(self._draw(0, passage))
            return self._over_draws(function, passage)

        return self._over_devices(summed)

    def _over_devices(self, summed: Callable[[Any], T]) -> T:
        plan = self._taps.plan
        # What has been drawn needs no further forward pass.
        total = self._taps.mean_over_microbatches(summed) if self._statistics is None else summed(None)
        return total if plan.axis_name is None else jax.lax.pmean(total, plan.axis_name)

    def _draw(self, index: Any, passage: Passage | None) -> dict[str, Statistics]:
        return self._taps.draw(index, passage) if self._statistics is None else self._statistics

    def rows(self, name: str) -> tuple[jax.Array, jax.Array] | None:
        """ā (*stack, n, d_in) and g (*stack, n, d_out) of a layer with one position an example, F = (1/n) Σ (ā⊗g)(ā⊗g)ᵀ.

        None where they are not the whole of F, or stay where they are: several draws, several devices (under `jit`, a mesh in
        context), shared positions, statistics that are sums.
        """
        if self._statistics is None or self._taps.plan.axis_name is not None:
            return None
        if not jax.sharding.get_abstract_mesh().empty:
            return None
        layer = self._taps.layers[name]
        if not layer.has_rows or layer.positions > 1 or layer.kind.statistics != "rows":
            return None
        a, g = self._statistics[name].rows()
        return (a[..., 0, :], g[..., 0, :]) if a.shape[-2] == 1 else None

    def _over_draws(self, function: Callable[[dict[str, Statistics]], T], passage: Passage | None) -> T:
        plan = self._taps.plan
        total = microbatches.total(
            lambda index: function(self._taps.draw(index, passage)), jnp.arange(plan.draws)
        )
        return total if plan.fisher == "exact" else jax.tree.map(lambda v: v / plan.draws, total)
