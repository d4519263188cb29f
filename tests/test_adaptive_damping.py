"""λ follows its rule on scripted reduction ratios; what is measured is the loss and the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import problems
from .dense import assert_close
from .test_quadratic_model import _dense_model, _flat

L2, START = 0.05, 0.4
# Reduction ratios, and the power of ω₁ that λ is multiplied by.
SCRIPT = [(0.9, 1), (0.5, 0), (0.26, 0), (0.74, 0), (0.1, -1), (-2.0, -1), (np.nan, -1), (5.0, 1)]


@pytest.fixture(scope="module")
def stepped():
    """(problem, grads, taps) in float64."""
    with jax.enable_x64(True):
        problem = problems.make("plain", "softmax")
        differentiate = kfe.value_grad_and_taps(
            problem.loss_fn, problem.layers(), fisher="exact", quadratic_model=True
        )
        _, grads, taps = differentiate(problem.params, *problem.args)
        yield problem, grads, taps


@pytest.mark.parametrize("damping_in_model", [True, False])
def test_rule_on_scripted_ratios(stepped, damping_in_model, x64):
    """λ ← ω₁λ above 3/4, λ/ω₁ below 1/4 and for no number, unchanged between; no update into what is no number."""
    problem, grads, taps = stepped
    tx = kfe.adaptive_damping(
        optax.scale(-0.1), START, period=1, l2=L2, damping_in_model=damping_in_model, factor=0.9
    )
    state, damping, delta = tx.init(problem.params), START, -0.1 * _flat(grads)
    update = jax.jit(tx.update, static_argnames="value_fn")
    theta = _flat(problem.params)
    penalty = L2 * (theta @ delta + delta @ delta / 2)
    for ratio, power in SCRIPT:
        gradient, matrix = _dense_model(problem, problem.params, damping if damping_in_model else 0, L2)
        model = gradient @ delta + delta @ matrix @ delta / 2
        new_loss = 7.0 + ratio * model - penalty
        updates, state = update(
            grads, state, problem.params, taps=taps, value=7.0, value_fn=lambda p, loss=new_loss: loss
        )
        damping *= 0.9**power
        assert_close(state.damping, damping, 1e-9)
        np.testing.assert_allclose(state.reduction_ratio, ratio, rtol=1e-9)
        taken = np.isfinite(ratio)
        assert_close(_flat(updates), delta if taken else 0 * delta, 1e-12)
    assert state.rejected == 1


@pytest.mark.parametrize(("ratio", "expected"), [(0.9, 0.3), (0.1, 0.5)])
def test_floor_and_ceiling(stepped, ratio, expected, x64):
    """λ stays between them."""
    problem, grads, taps = stepped
    tx = kfe.adaptive_damping(optax.scale(-0.1), START, period=1, factor=0.5, floor=0.3, ceiling=0.5)
    delta = -0.1 * _flat(grads)
    gradient, matrix = _dense_model(problem, problem.params, START, 0)
    loss = ratio * (gradient @ delta + delta @ matrix @ delta / 2)
    _, state = tx.update(
        grads, tx.init(problem.params), problem.params, taps=taps, value=0.0, value_fn=lambda p: loss
    )
    assert_close(state.damping, jnp.asarray(expected), 1e-12)


@pytest.mark.parametrize("damping_in_model", [True, False])
def test_known_and_full_model_agree(stepped, damping_in_model, x64):
    """Around scale_by_quadratic_model r is that of the model in full, and the loss is that of the step's batch."""
    problem, grads, taps = stepped
    inner = kfe.scale_by_quadratic_model(optax.identity(), 9.0, l2=L2)
    tx = kfe.adaptive_damping(inner, START, period=1, l2=L2, damping_in_model=damping_in_model)
    updates, state = tx.update(grads, tx.init(problem.params), problem.params, taps=taps)
    # Wrapped in a chain, the update might have been changed after the model: it is measured in full.
    chained = kfe.adaptive_damping(
        optax.chain(inner), START, period=1, l2=L2, damping_in_model=damping_in_model
    )
    _, other = chained.update(grads, chained.init(problem.params), problem.params, taps=taps)
    assert_close(state.reduction_ratio, other.reduction_ratio, 1e-9)
    delta, theta = _flat(updates), _flat(problem.params)
    gradient, matrix = _dense_model(problem, problem.params, START if damping_in_model else 0, L2)
    model = gradient @ delta + delta @ matrix @ delta / 2
    before, after = (
        problem.loss_fn(p, *problem.args)
        for p in (problem.params, optax.apply_updates(problem.params, updates))
    )
    change = after - before + L2 * (theta @ delta + delta @ delta / 2)
    assert_close(state.reduction_ratio, change / model, 1e-9)


def test_only_every_period(stepped, x64):
    """Between the T₁-th steps λ and r stand still."""
    problem, grads, taps = stepped
    tx = kfe.adaptive_damping(optax.scale(-1e-3), START, period=3)
    state, seen = tx.init(problem.params), []
    update = jax.jit(tx.update)
    for _ in range(6):
        _, state = update(grads, state, problem.params, taps=taps)
        seen.append(float(state.damping))
    power = (19 / 20) ** 3
    np.testing.assert_allclose(seen, [START, START, START * power] + [START * power] * 2 + [START * power**2])


def test_info_and_misuse(stepped, x64):
    """`info` shows λ and r; parameters and taps are asked for."""
    problem, grads, taps = stepped
    tx = kfe.adaptive_damping(kfe.scale_by_kfac(problem.layers(), 1.0), START, period=1)
    state = tx.init(problem.params)
    _, state = tx.update(grads, state, problem.params, taps=taps)
    told = kfe.info(state)
    assert told.damping == state.damping
    assert told.reduction_ratio == state.reduction_ratio
    with pytest.raises(ValueError, match="opt_state, params, taps=taps"):
        tx.update(grads, state, taps=taps)
    with pytest.raises(ValueError, match="needs the taps"):
        tx.update(grads, state, problem.params)
    with pytest.raises(ValueError, match="between 0 and 1"):
        kfe.adaptive_damping(optax.identity(), START, factor=1.5)
    with pytest.raises(ValueError, match="period"):
        kfe.adaptive_damping(optax.identity(), START, period=0)
    with pytest.raises(ValueError, match="initial_damping"):
        kfe.adaptive_damping(optax.identity(), -1.0)
