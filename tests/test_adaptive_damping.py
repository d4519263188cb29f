"""λ follows its rule on scripted reduction ratios; what is measured is the loss and the model."""

from __future__ import annotations

import itertools

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
        return problem, grads, taps


@pytest.mark.parametrize("damping_in_model", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_rule_on_scripted_ratios(stepped, damping_in_model, x64):
    """λ ← ω₁λ above 3/4, λ/ω₁ below 1/4 and for unchanged between; into what is no number no step, and 4λ."""
    problem, grads, taps = stepped
    tx = kfe.adaptive_damping(
        optax.scale(-0.1), START, period=1, l2=L2, damping_in_model=damping_in_model, factor=0.9
    )
    theta = _flat(problem.params)
    # What is inside is given ∇h.
    state, damping, delta = tx.init(problem.params), START, -0.1 * (_flat(grads) + L2 * theta)

    @jax.jit
    def update(state, new_loss):
        return tx.update(
            grads, state, problem.params, taps=taps, value=7.0, value_fn=lambda p: jnp.asarray(new_loss)
        )

    penalty = L2 * (theta @ delta + delta @ delta / 2)
    for ratio, power in SCRIPT:
        gradient, matrix = _dense_model(problem, problem.params, damping if damping_in_model else 0, L2)
        model = gradient @ delta + delta @ matrix @ delta / 2
        new_loss = 7.0 + ratio * model - penalty
        updates, state = update(state, new_loss)
        taken = np.isfinite(ratio)
        damping *= 0.9**power if taken else 4
        assert_close(state.damping, damping, 1e-9)
        np.testing.assert_allclose(state.reduction_ratio, ratio, rtol=1e-9)
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
    update = jax.jit(
        lambda state, loss: tx.update(
            grads, state, problem.params, taps=taps, value=0.0, value_fn=lambda p: loss
        )
    )
    _, state = update(tx.init(problem.params), loss)
    assert_close(state.damping, jnp.asarray(expected), 1e-12)


@pytest.mark.parametrize("damping_in_model", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_known_and_full_model_agree(stepped, damping_in_model, x64):
    """Around scale_by_quadratic_model r is that of the model in full, and the loss is that of the step's batch."""
    problem, grads, taps = stepped
    inner = kfe.scale_by_quadratic_model(optax.identity(), 9.0, l2=L2)
    tx = kfe.adaptive_damping(inner, START, period=1, l2=L2, damping_in_model=damping_in_model)
    updates, state = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    # Wrapped in a chain, the update might have been changed after the model: it is measured in full.
    chained = kfe.adaptive_damping(
        optax.chain(inner), START, period=1, l2=L2, damping_in_model=damping_in_model
    )
    _, other = jax.jit(chained.update)(grads, chained.init(problem.params), problem.params, taps=taps)
    assert_close(state.reduction_ratio, other.reduction_ratio, 1e-9)
    delta, theta = _flat(updates), _flat(problem.params)
    gradient, matrix = _dense_model(problem, problem.params, START if damping_in_model else 0, L2)
    model = gradient @ delta + delta @ matrix @ delta / 2
    before, after = (
        jax.jit(problem.loss_fn)(p, *problem.args)
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
    with pytest.raises(ValueError, match="l2 must be"):
        kfe.adaptive_damping(optax.identity(), START, l2=-1.0)
    with pytest.raises(ValueError, match="floor must be positive and at most ceiling"):
        kfe.adaptive_damping(optax.identity(), START, floor=2.0, ceiling=1.0)
    with pytest.raises(ValueError, match="pass both, or neither"):
        tx.update(grads, state, problem.params, taps=taps, value=1.0)


def test_the_penalty_of_a_chain(stepped, x64):
    """Around a chain without a model, what is inside is given ∇h and λ + η."""
    problem, grads, taps = stepped
    seen = {}

    def update(updates, state, params=None, *, request, **_):
        seen.update(gradient=updates, damping=request.damping)
        return updates, state

    inner = optax.chain(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update))
    tx = kfe.adaptive_damping(inner, START, l2=L2)
    tx.update(grads, tx.init(problem.params), problem.params, taps=taps)
    assert_close(_flat(seen["gradient"]), _flat(grads) + L2 * _flat(problem.params), 1e-12)
    assert_close(seen["damping"], jnp.asarray(START + L2), 1e-12)


@pytest.mark.parametrize("model", [True, False])
def test_a_step_into_nowhere_is_taken_back(model, x64):
    """A barrier: the loss is NaN where an unmeasured step led; the step is undone, λ rises, and training goes on."""
    params, loss_fn, layers = problems.barrier()
    inner = kfe.scale_by_kfac(layers, 1.0)
    inner = kfe.scale_by_quadratic_model(inner, 1.0) if model else optax.chain(inner, optax.scale(-1.0))
    tx = kfe.adaptive_damping(inner, 1e-3, period=1000)
    step = problems.tuned_step(tx, loss_fn, layers)
    state, seen = tx.init(params), []
    for _ in range(14):
        seen.append(float(params["kernel"][0, 0]))
        params, state, loss = step(params, state)
    assert seen[1] < 0.9  # the minimum of the model lies behind the barrier
    np.testing.assert_allclose(seen[2], seen[0], rtol=1e-12)
    assert state.rejected >= 1 and state.damping >= 4e-3
    assert np.isfinite(loss) or np.isfinite(seen[-1])
    assert seen[-1] > 0.9 or seen[-2] > 0.9
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)) if leaf.ndim)


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: optax.chain(inner, optax.identity())])
def test_a_refused_step_is_no_momentum(wrap, x64):
    """Where the measured loss is NaN nothing moves, and the next step is made without δ₀, inside a chain too."""
    problem = problems.make("plain", "softmax")
    layers = problem.layers()
    tx = kfe.adaptive_damping(
        wrap(kfe.scale_by_quadratic_model(kfe.scale_by_kfac(layers, 1.0), 1.0)), 1.0, period=1
    )
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)

    @jax.jit
    def step(params, state, trial):
        loss, grads, taps = differentiate(params, *problem.args)
        value_fn = lambda p: trial * problem.loss_fn(p, *problem.args)
        updates, state = tx.update(grads, state, params, taps=taps, value=loss, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state, momenta = problem.params, tx.init(problem.params), []
    for trial in (1.0, 1.0, jnp.nan, 1.0, 1.0):
        before = params
        params, state = step(params, state, trial)
        assert bool((_flat(params) == _flat(before)).all()) == bool(jnp.isnan(trial))
        momenta.append(float(kfe.info(state).momentum))
    assert state.rejected == 1
    assert [momentum != 0 for momentum in momenta] == [False, True, True, False, True]


@pytest.mark.parametrize("momentum", [True, False])
def test_a_loss_that_stays_lost_is_left_alone(momentum):
    """Where the batch is to blame nothing moves, the momentum stays and λ too, for one bad batch or several, of any sort."""
    params, x = {"kernel": jnp.ones((3, 2))}, jnp.diag(jnp.arange(1.0, 4.0))

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z, jnp.zeros_like(z)).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    inner = kfe.scale_by_quadratic_model(kfe.scale_by_kfac(layers, 9.0), 9.0, momentum=momentum)
    tx = kfe.adaptive_damping(inner, 9.0, period=1000)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)

    @jax.jit
    def step(params, state, x):
        _, grads, taps = differentiate(params, x)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    state, seen, momenta = tx.init(params), [params["kernel"]], []
    batches = (x, x, x * jnp.nan, x, x, x * jnp.inf, x * 1e30, x.at[0, 0].set(jnp.nan), x)
    for batch in batches:
        params, state = step(params, state, batch)
        seen.append(params["kernel"])
        momenta.append(float(state.inner.momentum))
    moves = [bool((after != before).any()) for before, after in itertools.pairwise(seen)]
    assert moves == [True, True, False, True, True, False, False, False, True]
    assert [m != 0 for m in momenta] == [momentum and moved and i > 0 for i, moved in enumerate(moves)]
    assert state.rejected == 0 and state.damping == 9.0


def test_the_state_keeps_its_types():
    """Float32 updates for bfloat16 parameters: what is kept to take them back has one dtype in every step."""
    params, x = {"kernel": jnp.ones((3, 2), jnp.bfloat16)}, jnp.eye(3, dtype=jnp.bfloat16)

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z, jnp.zeros_like(z)).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    wide = optax.stateless(lambda updates, _: jax.tree.map(lambda u: -0.1 * u.astype(jnp.float32), updates))
    tx = kfe.adaptive_damping(wide, 1.0)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)
    _, grads, taps = differentiate(params, x)
    state = tx.init(params)
    _, new = jax.jit(tx.update)(grads, state, params, taps=taps)
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert_close(new.last["kernel"], -0.1 * grads["kernel"].astype(jnp.float32), 1e-2)


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize(("dtype", "factor"), [(jnp.float32, 1e5), (jnp.bfloat16, 1e2)])
def test_a_step_too_long_to_be_taken_back_is_not_taken(dtype, factor, model):
    """θ + δ − δ has lost more than half of θ's digits where ‖δ‖ > ‖θ‖/√ε; from zero any step can be taken back."""
    x, params = jnp.ones((4, 3), dtype), {"kernel": jnp.asarray([[0.3], [1.7], [-0.9]], dtype)}

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z, jnp.full_like(z, factor)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    # The model's step reaches the target, which is `factor` times as far as the parameters are large.
    inner = kfe.scale_by_quadratic_model(optax.identity(), 1e-6) if model else optax.scale(-0.3)
    tx = kfe.adaptive_damping(inner, 1e-6, period=1000)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)
    step = jax.jit(lambda p: tx.update(differentiate(p, x)[1], tx.init(p), p, taps=differentiate(p, x)[2]))
    updates, state = step(params)
    assert not np.any(updates["kernel"])
    assert state.rejected == 1
    assert_close(state.damping, jnp.asarray(4e-6), 1e-6)
    updates, state = step(jax.tree.map(jnp.zeros_like, params))
    assert np.abs(updates["kernel"]).max() > factor / 10
    assert state.rejected == 0


def test_a_step_beyond_all_numbers_is_not_taken():
    """θ + δ overflows float16 although δ does not."""
    x, params = jnp.ones((4, 1), jnp.float16), {"kernel": jnp.full((1, 1), 6e4, jnp.float16)}

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ (params["kernel"] * 1e-5).astype(jnp.float16), params)
        return kfe.losses.l2_loss(z, jnp.ones_like(z)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    far = optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, 6e4), updates))
    tx = kfe.adaptive_damping(far, 1.0, period=1000)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)
    _, grads, taps = differentiate(params, x)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    assert updates["kernel"] == 0
    assert state.rejected == 1 and state.damping == 4.0


def test_a_foretold_rise_raises_the_damping(x64):
    """A chain that walks uphill: loss and model rise together, and r is negative all the same."""
    params, x = {"kernel": jnp.ones((3, 2))}, jnp.eye(3)

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z, jnp.zeros_like(z)).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    tx = kfe.adaptive_damping(optax.scale(3.0), 1.0, period=1)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)(params, x)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    assert state.reduction_ratio < 0
    assert_close(state.damping, jnp.asarray(20 / 19), 1e-12)


@pytest.mark.parametrize("outer", [None, L2])
def test_the_penalty_of_the_model_inside(outer, stepped, x64):
    """Unless it has one itself, the η of the quadratic model inside counts, in the step and in r."""
    problem, grads, taps = stepped
    fine = kfe.scale_by_kfac(problem.layers(), 1.0)
    inside = 0.0 if outer else L2
    both = [
        kfe.adaptive_damping(kfe.scale_by_quadratic_model(fine, 1.0, l2=inside), START, period=1, l2=outer),
        kfe.adaptive_damping(kfe.scale_by_quadratic_model(fine, 1.0, l2=L2), START, period=1, l2=L2),
    ]
    (ours, state), (expected, expected_state) = (
        tx.update(grads, tx.init(problem.params), problem.params, taps=taps) for tx in both
    )
    assert_close(ours, expected, 1e-12)
    assert_close(state.reduction_ratio, expected_state.reduction_ratio, 1e-9)
