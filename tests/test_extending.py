"""A method and factors of one's own: one file and one line of a registry each (rules: `test_rules.py`, distributions:
`test_own_distributions.py`)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._aliases.assembly import around
from kfe_optax._aliases.registry import Method
from kfe_optax._jax import counts, failures
from kfe_optax._layers.layers import Layers
from kfe_optax._methods import layerwise, periods, refreshes
from kfe_optax.factors import base
from kfe_optax.factors.kfac import zeros

from . import methods
from . import test_conformance_methods as conformance

EARLY = periods.Early(1)


# What a new file in `_methods/` holds: K-FAC's factors, of which the diagonals alone are inverted.
class DiagonalState(NamedTuple):
    factors: Any
    damping: jax.Array
    failures: jax.Array
    last_refresh: jax.Array


class Diagonal(NamedTuple):
    layers: Layers
    factors: kfe.factors.Factors
    damping: Any
    relative: bool

    needs_taps = True
    reads_parameters = False

    def init(self, layers):
        return DiagonalState(self.factors.init(layers, None), *layerwise.counters())

    def update(self, state, step):
        damping = step.damping_of(self.damping, self.relative)
        factors = refreshes.update_factors(self.factors, self.layers, state.factors, step, 10, EARLY)
        new = {}
        for name, ((inputs, outputs),) in self.factors.terms(factors, self.layers).items():
            a, g = (side if side.ndim == 1 else jnp.diagonal(side) for side in (inputs, outputs))
            curvature = a[:, None] * g
            added = damping * (curvature.mean() if self.relative else 1)
            new[name] = step.gradients[name].astype(a.dtype) / jnp.maximum(curvature + added, 1e-30)
        more = failures.between(state.factors.failures, factors.failures)
        due = periods.due(step.count, 10, EARLY) & step.finite
        last_refresh = jnp.where(due, step.count, state.last_refresh)
        return new, DiagonalState(factors, damping, counts.added(state.failures, more), last_refresh)


def scale_by_diagonal(layers, damping, *, relative_damping=False, decay=0.95, rest=None):
    method = Diagonal(layers, kfe.factors.kfac(decay), damping, relative_damping)
    return layerwise.layerwise(layers, method, rest)


# What a new file in `factors/` holds: the identity on the input side.
class OutputSide(NamedTuple):
    decay: Any = 0.95

    rank = 1
    needs_taps = True

    def init(self, layers, max_dim):
        return zeros(layers, max_dim)

    def update(self, state, source, count):
        return kfe.factors.kfac(self.decay).update(state, source, count)

    def terms(self, state, layers):
        ones = jax.tree.map(lambda a: jnp.ones_like(a) if a.ndim == 1 else jnp.eye(len(a)), state.input)
        return {name: (base.Term(ones[name], g),) for name, g in state.output.items()}


@pytest.fixture
def registered(monkeypatch):
    optimizer = functools.partial(around, scale_by_diagonal)
    monkeypatch.setitem(kfe.METHODS, "diagonal", Method(optimizer, scale_by_diagonal))
    monkeypatch.setitem(kfe.factors.FACTORS, "output_side", OutputSide)


@pytest.mark.parametrize("name", ["diagonal", "output_side"])
def test_conformance(registered, monkeypatch, name):
    """What the suites ask of each line of the registries: the state's shapes, one trace, donation; a batch with NaN."""
    case = (
        methods.Case(kfe.METHODS[name].scale_by)
        if name in kfe.METHODS
        else methods.Case(kfe.scale_by_kronecker, {"factors": kfe.factors.FACTORS[name]()})
    )
    monkeypatch.setitem(methods.CASES, name, case)
    trainer = methods.Trainer(name, methods.make_problem())
    conformance.test_constant_state_one_trace_donation(trainer)
    conformance.test_a_batch_with_nan_changes_nothing(trainer, trainer.first.state, "examples")


def test_the_optimizer_trains(registered):
    problem = methods.make_problem()
    tx = kfe.METHODS["diagonal"].optimizer(0.03, problem.layers)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, problem.layers)
    params, state, losses = problem.params, tx.init(problem.params), []

    @jax.jit
    def step(params, state, key):
        batch = problem.batch()
        loss, grads, taps = differentiate(params, batch.x, batch.y, batch.weight, key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    for i in range(10):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < losses[0]
