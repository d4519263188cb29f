"""One step's passes: the gradient's, and those that the taps will read."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import explicit_axes, static_values
from kfe_optax._layers.layers import Layers
from kfe_optax._marks.loss_tags import FAINT, Place
from kfe_optax._taps import accumulation, fitting, microbatches
from kfe_optax._taps.forward import Forward
from kfe_optax._taps.plan import Fisher, Plan
from kfe_optax._taps.source import Given, Source
from kfe_optax._taps.taps import Model, Taps
from kfe_optax._tracing import discovery
from kfe_optax._tracing.adapters import nnx as nnx_adapter


class Parts(NamedTuple):
    """Into how many parts the batch is divided, of which one is read."""

    statistics: int
    products: int  # 0 where no quadratic model is asked for


@dataclasses.dataclass(frozen=True, eq=False)  # JAX hashes what it compiles: by identity, not layer by layer
class Step:
    """What is static about a step: see `value_grad_and_taps`; the loss is held weakly."""

    loss_reference: Any
    layers: Layers
    fisher: Fisher
    num_samples: int
    has_aux: bool
    place: Place
    parts: Parts
    recompute: bool

    def passes(self, rebuild, static, examples, parameters, arrays, seed, row_mask, loss_scale):
        """The loss (with aux), its gradient, the taps, and the state of NNX objects."""
        with discovery.bound_axes():
            fitting.check_axes(parameters, arrays, self.place.axis_name)
        call = _Call(self, rebuild, static, examples, Given(parameters, arrays, row_mask), seed, loss_scale)
        (loss, aux), grads, state, weights, whole = call.gradient()
        statistics, products = call.sources(whole)
        model = None
        if products is not None:
            model = Model(loss if loss_scale is None else loss / loss_scale, products, whole)
        plan = Plan(statistics.forward, self.fisher, self.num_samples, jax.tree.structure(parameters))
        if state is not None:
            state = nnx_adapter.moved(static(arrays)[0], state)
        return (
            ((loss, aux) if self.has_aux else loss),
            grads,
            Taps(statistics, model, seed, weights, plan),
            state,
        )


@dataclasses.dataclass
class _Call:
    """A call of a step: what it is given, its arrays with a flag whether they hold examples."""

    step: Step
    rebuild: Any
    static: Any
    examples: tuple[bool, ...]
    given: Given
    seed: jax.Array
    scale: Any

    def gradient(self) -> tuple[tuple[Any, Any], Any, Any, Any, Source]:
        """(loss, aux), gradients, state, weights, and the source of what is read from the whole batch."""
        parts, k = self.step.parts, self.step.place.microbatches
        forward = self._forward(k, parts.products == 1)
        parameters, arrays, row_mask, _ = self.given
        if k > 1:
            return self._accumulated(forward)
        passed = forward(parameters, arrays, row_mask, self.scale)
        grads, cotangents = passed.pull()
        weights = accumulation.weights_of(cotangents)
        kept = 1 in parts and not self.step.recompute
        residuals, swaps = ((passed.leaves, passed.cotangent), passed.swaps) if kept else (None, None)
        # The loss at other parameters is computed from what was given.
        again = self.given if parts.products or not kept else None
        shardings = explicit_axes.shardings((*self.given[:3], self.scale))
        source = Source(residuals, again, self.scale, forward, swaps, (), shardings)
        return (passed.loss, passed.aux), grads, passed.state, weights, source

    def _accumulated(self, forward: Forward) -> tuple[tuple[Any, Any], Any, Any, Any, Source]:
        parameters, arrays, row_mask, _ = self.given
        k = self.step.place.microbatches
        split = [microbatches.split(a, k) if e else a for a, e in zip(arrays, self.examples, strict=True)]
        row_mask = None if row_mask is None else microbatches.split(jnp.asarray(row_mask), k)
        state_size = len(static_values.split_static(self.static(arrays)[0])[0])
        found, grads, state, weights, met, stacked = accumulation.accumulated(
            forward, parameters, split, row_mask, self.scale, self.examples, state_size
        )
        given = Given(parameters, met, row_mask)
        one = [a[0] if s else a for a, s in zip(met, stacked, strict=True)]
        mask = None if row_mask is None else row_mask[0]
        shardings = explicit_axes.shardings((parameters, one, mask, self.scale))
        source = Source(None, given, self.scale, forward, None, stacked, shardings)
        return found, grads, state, weights, source

    def sources(self, whole: Source) -> tuple[Source, Source | None]:
        """What statistics and products with the Fisher are read from: the whole batch, or parts of it."""
        parts = self.step.parts
        both = parts.statistics == parts.products
        statistics = whole if parts.statistics == 1 else self._part(parts.statistics, both)
        if both or not parts.products:
            return statistics, statistics if both else None
        return statistics, whole if parts.products == 1 else self._part(parts.products, True)

    def _part(self, parts: int, tangents: bool) -> Source:
        number = (self.seed[0] % parts).astype(jnp.int32)
        given = self._given(parts, number)
        shardings = explicit_axes.shardings((*given[:3], self.scale))
        return Source(None, given, self.scale, self._forward(parts, tangents, True), None, (), shardings)

    def _given(self, parts: int, number: Any) -> Given:
        """What the pass on one of so many parts of the batch is given."""
        parameters, arrays, row_mask, _ = self.given
        if parts == 1:
            return self.given
        batch = [
            microbatches.one(a, parts, number) if e else a for a, e in zip(arrays, self.examples, strict=True)
        ]
        masked = None if row_mask is None else microbatches.one(jnp.asarray(row_mask), parts, number)
        return Given(parameters, batch, masked, number)

    def _forward(self, parts: int, tangents: bool, alone: bool = False) -> Forward:
        step = self.step
        parameters, arrays, row_mask, _ = self._given(parts, 0)
        found = discovery.discover(
            step.loss_reference(), step.has_aux, parameters, arrays, self.rebuild, self.static, row_mask
        )
        found = fitting.fitted(step.layers, found, step.fisher)
        if tangents:
            fitting.check_tangents(found)
        place = step.place._replace(microbatches=parts, alone=alone)
        if found.unregistered and step.fisher != "empirical":
            place = place._replace(start=FAINT)
        if parts > 1:
            place = place._replace(examples=arrays[self.examples.index(True)].shape[0])
        return Forward(step.loss_reference, self.rebuild, self.static, step.has_aux, found, place, tangents)
