"""Counts at the end of int32: none wraps around, and what is due at a period stays due at it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._jax import counts
from kfe_optax._jax.counts import CYCLE, LAST, added, following
from kfe_optax._methods import periods
from kfe_optax.factors import base

from . import dense_optimizers, problems


@pytest.mark.parametrize(
    "period", [1, 2, 3, 5, 7, 10, 12, 20, 32, 50, 64, 100, 128, 250, 500, 1000, 2500, 10_000]
)
def test_a_period_goes_on(period):
    """From well before the end to well after it, the steps that are due are `period` apart."""
    count, steps = jnp.int32(LAST - 2 * period), 5 * period

    def step(count, _):
        return following(count), (count, periods.due(count, period))

    _, (seen, due) = jax.lax.scan(step, count, None, steps)
    assert (np.asarray(seen) > 0).all() and np.asarray(seen).max() == LAST
    at = np.flatnonzero(due)
    assert len(at) == 5 and (np.diff(at) == period).all()
    assert CYCLE % period == 0


@pytest.mark.parametrize(("period", "n"), [(50, 8), (10, 8), (20, 3), (64, 1), (5, 0)])
def test_periods_that_grow(period, n):
    steps = np.arange(1000)
    early = periods.Early(2, n)
    found = jax.vmap(lambda step: periods.due(step, jnp.asarray(period), early))(jnp.asarray(steps))
    assert found.tolist() == [dense_optimizers.due(step, period, 2, n) for step in steps]
    if n:
        at = np.flatnonzero(found)
        # While the steps double there are n, from a fifth of the period on until it has been reached.
        powers = [k for k in (4, 8, 16, 32) if period // 5 <= k <= period]
        assert all(np.sum((at >= n * k) & (at < 2 * n * k)) == n for k in powers)
        # Far later there is nothing left of it, at the end of int32 either.
        last = LAST - np.arange(3 * period)
        late = jax.vmap(lambda step: periods.due(step, period, early))(jnp.asarray(last, jnp.int32))
        assert late.tolist() == (last % period == 0).tolist()


def test_totals_stay_at_the_end():
    total = jnp.int32(LAST - 1)
    for more in (jnp.ones((), bool), 3, jnp.int32(LAST)):
        total = added(total, more)
        assert (int(total), total.dtype) == (LAST, jnp.int32)
    assert int(added(jnp.int32(5), jnp.zeros((), bool))) == 5
    # The weight of the past of an average with so many batches in it.
    assert float(base.weight_of_past(total, 0.95, jnp.int32(0))) == pytest.approx(0.95)


def test_a_decay_may_count_steps():
    """At the second update after 100 steps, where counted updates take half of the old average."""
    for updates, step, by_updates, by_steps in ((1, 0, 0, 0), (2, 1, 0.5, 0.5), (2, 100, 0.5, 0.95)):
        for decay, expected in ((0.95, by_updates), (kfe.factors.DecayBySteps(0.95), by_steps)):
            found = base.weight_of_past(jnp.int32(updates), decay, jnp.int32(step))
            assert float(found) == pytest.approx(expected)
    with pytest.raises(ValueError, match="must lie in"):
        kfe.factors.kfac(kfe.factors.DecayBySteps(1.5))


def ended(state):
    """The state with every count of the package at the end."""

    def last(path, leaf):
        names = [getattr(key, "name", None) for key in path]
        # Optax's own counts, in the rest and inside a method, are its own.
        others = {"rest", "version"} & {*names} or ("method", "inner") in itertools.pairwise(names)
        ours = jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and not others
        return jnp.full_like(leaf, LAST) if ours else leaf

    return jax.tree_util.tree_map_with_path(last, state)


def test_clip_and_average():
    grads = {"w": jnp.array([3.0, jnp.nan])}
    tx = optax.chain(kfe.average_iterates(0.9), kfe.clip_by_kl(optax.identity(), 1e-2))
    state = ended(tx.init(grads))
    for bad in (True, False):
        given = grads if bad else {"w": jnp.ones(2)}
        updates, state = tx.update(given, state, {"w": jnp.ones(2)})
        assert all(int(leaf) > 0 for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32)
        assert np.isfinite(updates["w"]).all()
    average, clip = state
    assert int(average.averaged) == int(clip.rejected) == LAST
    assert float(average.decay) == pytest.approx(0.9)


def test_adaptive_damping_and_quadratic_model():
    """λ is adapted at its period across the end, and the counts of all parts go on together."""
    params, x = {"kernel": 2 * jnp.ones((1, 1))}, jnp.ones((4, 1))

    def loss_fn(params):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z, jnp.full_like(z, 0.5)).mean()

    layers = kfe.find_layers(loss_fn, params)
    tx = kfe.kfac_adaptive(layers, initial_damping=1.0, damping_period=5, search_period=10)
    step = problems.tuned_step(tx, loss_fn, layers)
    params, state, _ = step(params, tx.init(params))
    state = ended(state)
    adapted = []
    for i in range(15):
        before = kfe.info(state).damping
        params, state, loss = step(params, state)
        assert np.isfinite(loss)
        if kfe.info(state).damping != before:
            adapted.append(i)
        assert all((np.asarray(v) >= 0).all() for v in jax.tree.leaves(state) if v.dtype == jnp.int32)
        average, outer = state
        assert len({int(s.count) for s in (average, outer, outer.inner, outer.inner.inner)}) == 1
    assert len(adapted) == 3 and (np.diff(adapted) == 5).all()


def test_info_adds_up_to_the_end():
    grads = {"w": jnp.ones(2)}
    clip = kfe.clip_by_kl(optax.identity(), 1e-2)
    state = optax.chain(clip, clip).init(grads)
    assert int(kfe.info(ended(state)).rejected) == LAST
    assert np.iinfo(np.int32).max == counts.LAST
