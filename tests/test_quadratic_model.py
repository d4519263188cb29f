"""The quadratic model's step against dense solves; the search for the preconditioner's damping; what it refuses."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._methods import request as request_lib
from kfe_optax._methods.layerwise import LayerwiseState
from kfe_optax._wrappers.damping_search import SEARCH_FACTOR
from kfe_optax._wrappers.minimum import solve

from . import dense, problems
from .dense import assert_close
from .methods import quick

L2, DAMPING = 0.03, 0.2


@jax.jit
def _flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@functools.cache
def _dense_terms(loss, l2):
    """(parameters, x) → (∇h, F) of `loss` at the outputs, compiled once for all steps of a test."""

    @jax.jit
    def compute(params, x):
        flat, rebuild = jax.flatten_util.ravel_pytree(params)

        def outputs(vector):
            return problems.plain_forward(rebuild(vector), x)

        gradient = jax.grad(lambda p: loss(outputs(p)) + l2 * p @ p / 2)(flat)
        return gradient, dense.gauss_newton(outputs, loss, flat)

    return compute


def _dense_model(problem, params, damping, l2):
    """(∇h, F + (λ + η)I) over all parameters, flattened; F from Jacobians and the Hessian at the outputs."""
    gradient, fisher = map(np.asarray, _dense_terms(problem.loss, l2)(params, problem.args[0]))
    return gradient, fisher + (damping + l2) * np.eye(len(fisher))


def _trained(problem, tx, steps, **options):
    """(params, updates, state) of each step."""
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)

    @jax.jit
    def step(params, state):
        _, grads, taps = differentiate(params, *problem.args)
        return tx.update(grads, state, params, taps=taps, **options)

    params, state = problem.params, tx.init(problem.params)
    for _ in range(steps):
        updates, new_state = step(params, state)
        yield params, updates, state, new_state
        params, state = optax.apply_updates(params, updates), new_state


@pytest.mark.parametrize("kind", ["softmax", pytest.param("pixels", marks=pytest.mark.nightly)])
def test_step_minimizes_the_model(kind, x64):
    """δ is the minimum of the model in the span of the proposal and the last update, and M(δ) − M(0) = ½∇hᵀδ there."""
    problem = problems.make("plain", kind)
    inner = kfe.scale_by_kfac(problem.layers(), 1.0, inverse_update_period=1, factor_update_period=1)
    tx = kfe.scale_by_quadratic_model(inner, DAMPING, l2=L2)
    previous = np.zeros_like(_flat(problem.params))
    for params, updates, state, new_state in _trained(problem, tx, 3):
        gradient, matrix = _dense_model(problem, params, DAMPING, L2)
        delta = np.asarray(_flat(updates))
        model = lambda d, gradient=gradient, matrix=matrix: gradient @ d + d @ matrix @ d / 2
        proposal = np.asarray(_flat(_proposal(problem, inner, params, state.inner)))
        basis = np.stack([proposal, previous])[: 1 + bool(np.any(previous != 0))].T
        best = basis @ np.linalg.solve(basis.T @ matrix @ basis, -basis.T @ gradient)
        assert_close(delta, best, 1e-9)
        assert_close(new_state.model_change, model(delta), 1e-9)
        assert_close(new_state.model_change, gradient @ delta / 2, 1e-9)
        assert_close(new_state.squared_norm, delta @ delta, 1e-9)
        assert_close(_flat(new_state.previous), delta, 1e-12)
        previous = delta
    assert new_state.momentum != 0


def _proposal(problem, inner, params, state):
    """What the preconditioner says to the gradient of h with damping λ + η."""
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)(
        params, *problem.args
    )
    regularized = jax.tree.map(lambda g, p: g + L2 * p, grads, params)
    return inner.update(regularized, state, params, taps=taps, request=kfe.Request(DAMPING + L2))[0]


def test_without_momentum(x64):
    """The step is along the proposal alone."""
    problem = problems.make("plain", "softmax")
    tx = kfe.scale_by_quadratic_model(optax.identity(), DAMPING, momentum=False)
    for params, updates, _, new_state in _trained(problem, tx, 2):
        gradient, matrix = _dense_model(problem, params, DAMPING, 0)
        size = gradient @ gradient / (gradient @ matrix @ gradient)
        assert_close(_flat(updates), -size * gradient, 1e-10)
        assert_close(new_state.step_size, size, 1e-10)
        assert new_state.momentum == 0


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_one_step_to_the_minimum_of_a_quadratic(fisher, x64):
    """A linear model with a quadratic loss: F̂ is the Hessian up to its scale, and the model's α mends the scale."""
    problem = problems.make("plain", "gaussian", sizes=(3, 2), examples=16)
    layers = problem.layers()
    inner = kfe.scale_by_kfac(layers, 1e-12, damping_type="exact")
    tx = kfe.scale_by_quadratic_model(inner, 1e-12)
    differentiate = kfe.value_grad_and_taps(
        problem.loss_fn,
        layers,
        fisher=fisher,
        num_samples=500 if fisher == "sampled" else 1,
        quadratic_model=True,
    )
    _, grads, taps = differentiate(problem.params, *problem.args, key=jax.random.key(0))
    updates, _ = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    after = jax.jit(jax.grad(problem.loss_fn))(optax.apply_updates(problem.params, updates), *problem.args)
    left = jnp.linalg.norm(_flat(after)) / jnp.linalg.norm(_flat(grads))
    # Sampled targets leave noise in G; the direction is the better the more samples there are.
    assert left < (1e-8 if fisher == "exact" else 0.15)


@pytest.mark.parametrize("seed", range(5))
def test_solving_two_by_two(seed, x64):
    """A dense solve; a zero vector is dropped, and of two parallel ones the second."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(2, 3)) * np.array([[1], [10.0**-seed]])
    matrix, right = jnp.asarray(root @ root.T), jnp.asarray(generator.normal(size=2))
    assert_close(solve(matrix, right), jnp.linalg.solve(matrix, right), 1e-9)
    for gone in (0, 1):
        keep = jnp.arange(2) != gone
        dropped = solve(jnp.where(keep[:, None] & keep, matrix, 0), jnp.where(keep, right, 0))
        assert_close(dropped, jnp.where(keep, right / jnp.diagonal(matrix), 0), 1e-12)
    parallel = jnp.outer(matrix[0], matrix[0])
    assert_close(solve(parallel, 3 * matrix[0]), jnp.array([3 / matrix[0, 0], 0]), 1e-9)
    assert_close(solve(jnp.zeros((2, 2)), right), jnp.zeros(2))


class _ToldState(NamedTuple):
    damping: jax.Array
    calls: jax.Array
    kept: jax.Array
    last_refresh: jax.Array


class _Told:
    """A preconditioner D = ∇ / (h + γ²), whose state remembers what it was told."""

    curvature = 0.4

    def init(self, params):
        told = _ToldState(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.ones(3), jnp.asarray(-1))
        return LayerwiseState(*(jnp.zeros(()) for _ in range(2)), told, (), jnp.zeros(()), jnp.zeros(()))

    def update(self, updates, state, params=None, *, taps, request):
        own = jnp.arange(1, 1 + len(jax.tree.leaves(updates))) * self.curvature
        leaves = [leaf / (h + request.damping) for leaf, h in zip(jax.tree.leaves(updates), own, strict=True)]
        old = state.method
        told = _ToldState(request.damping, old.calls + (request.first is None), old.kept, old.last_refresh)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state._replace(method=told)


def test_search_takes_the_lowest_of_three(x64):
    """γ² is that of the three whose update the dense model likes best, on every T₂-th step; the state is its own."""
    problem = problems.make("plain", "softmax")
    told, period = _Told(), 2
    tx = kfe.scale_by_quadratic_model(
        optax.GradientTransformationExtraArgs(told.init, told.update), DAMPING, search_period=period
    )
    previous = 0 * _flat(problem.params)
    moved = 0
    for i, (params, updates, state, new_state) in enumerate(_trained(problem, tx, 7)):
        gradient, matrix = _dense_model(problem, params, DAMPING, 0)
        start = DAMPING if i == 0 else float(state.inner_damping)
        searched = i > 0 and i % period == 0
        candidates = [start * SEARCH_FACTOR ** (2 * period * k) for k in ((0, 1, -1) if searched else (0,))]
        found = []
        for candidate in candidates:
            grads = jax.tree.unflatten(jax.tree.structure(params), _split(gradient, params))
            direction = np.asarray(
                _flat(told.update(grads, told.init(None), taps=None, request=kfe.Request(candidate))[0])
            )
            basis = np.stack([direction, previous])[: 1 + (i > 0)].T
            x = np.linalg.solve(basis.T @ matrix @ basis, -basis.T @ gradient)
            found.append((float(gradient @ basis @ x / 2), candidate, basis @ x))
        change, best, delta = min(found, key=lambda f: f[0])
        assert_close(new_state.inner_damping, best, 1e-12)
        assert_close(new_state.inner.method.damping, best, 1e-12)
        assert_close(new_state.model_change, change, 1e-9)
        assert_close(_flat(updates), delta, 1e-8)
        assert new_state.inner.method.calls == i + 1
        moved += best != start
        previous = np.asarray(_flat(updates))
    assert moved


def _split(vector, like):
    sizes = np.cumsum([leaf.size for leaf in jax.tree.leaves(like)])[:-1]
    return [
        part.reshape(leaf.shape)
        for part, leaf in zip(np.split(vector, sizes), jax.tree.leaves(like), strict=True)
    ]


def _fine_level_anew(layers, damping, inverse_update_period, **options):
    """Two-level K-FAC with a period of the fine level alone: another damping leaves the correction of the step as it is."""
    fine = kfe.scale_by_kfac(layers, damping, inverse_update_period=inverse_update_period, **options)
    return kfe.two_level(fine, layers, initial_refreshes=1, factor_update_period=99, inverse_update_period=99)


@pytest.mark.parametrize(
    "name",
    quick("kfac", "ekfac", of=[n for n in kfe.METHODS if n != "spectral_kfac"]),  # its damping is relative
)
def test_search_with_a_real_preconditioner(name, x64):
    """On a step on which nothing is due, the search forms new inverses from the factors as they are, with the chosen damping.

    The parameters outside the layers have one step, whatever is tried.
    """
    base = problems.make("plain", "softmax")
    params = {"net": base.params, "temperature": jnp.ones(1)}

    def loss_fn(params, x, y):
        z = params["temperature"] * problems.plain_forward(params["net"], x)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    layers = kfe.find_layers(loss_fn, params, *base.args)
    make = _fine_level_anew if name == "two_level_kfac" else kfe.METHODS[name].scale_by
    rest = optax.scale_by_adam()
    never = {"initial_refreshes": 1, "factor_update_period": 99, "rest": rest}
    in_a_basis = name in ("ekfac", "tekfac")
    period = "basis_update_period" if in_a_basis else "inverse_update_period"
    inner = make(layers, 1.0, **{period: 99}, **never)
    tx = kfe.scale_by_quadratic_model(inner, DAMPING, search_period=1)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)

    @jax.jit
    def step(params, state):
        _, grads, taps = differentiate(params, *base.args)
        updates, new = tx.update(grads, state, params, taps=taps)
        # The same step without a search, of a method that refreshes its inverses always; in a basis λ acts at once.
        fresh = inner if in_a_basis else make(layers, 1.0, **{period: 1}, **never)
        plain = fresh.update(grads, state.inner, params, taps=taps, request=kfe.Request(new.inner_damping))
        return optax.apply_updates(params, updates), new, grads, updates, plain

    state = tx.init(params)
    for _ in range(3):
        before = state
        params, state, _, updates, (direction, plain) = step(params, state)
    assert state.inner_damping != before.inner_damping
    assert_close(state.inner.method.factors, before.inner.method.factors, 1e-12)
    assert_close(state.inner, plain, 1e-9)
    expected = jax.tree.map(
        lambda d, old: -state.step_size * d + state.momentum * old, direction, before.previous
    )
    assert_close(updates, expected, 1e-9)


def test_search_leaves_the_factors_outside_its_branch(x64):
    """What another damping does not change would be copied on every step if it passed through the branch."""
    problem = problems.make("plain", "softmax")
    tx = kfe.scale_by_kfac(problem.layers(), 1.0)
    differentiate = kfe.value_grad_and_taps(
        problem.loss_fn, problem.layers(), fisher="exact", quadratic_model=True
    )
    _, grads, taps = differentiate(problem.params, *problem.args)
    request = kfe.Request(jnp.asarray(2.0), first=grads)
    _, state = tx.update(grads, tx.init(problem.params), problem.params, taps=taps)
    _, again = tx.update(grads, state, problem.params, taps=taps, request=request)
    changed, put_back = request_lib.divided(again)
    assert changed.keys() == {"roots", "damping", "failures", "last_refresh"}
    # All that is not in it is as it was.
    jax.tree.map(np.testing.assert_array_equal, request_lib.divided(state)[1](changed), again)
    jax.tree.map(np.testing.assert_array_equal, put_back(changed), again)
    for new, old in zip(
        jax.tree.leaves(again.method.roots), jax.tree.leaves(state.method.roots), strict=True
    ):
        assert bool((new != old).any())


class _Aging(_Told):
    """The same with inverses of the first step, which are better than any that it would make anew."""

    def update(self, updates, state, params=None, *, taps, request):
        new, told = super().update(updates, state, params, taps=taps, request=request)
        if request.first is None:
            return updates, told
        # Next to nothing but the first leaf moves.
        first, *rest = jax.tree.leaves(new)
        return jax.tree.unflatten(jax.tree.structure(updates), [first, *(1e-3 * leaf for leaf in rest)]), told


def test_search_compares_inverses_of_one_age(x64):
    """Between refreshes the proposal of old inverses is none of the three, even where it is the best."""
    problem = problems.make("plain", "softmax")
    told = _Aging()
    transform = optax.GradientTransformationExtraArgs(told.init, told.update)
    tx = kfe.scale_by_quadratic_model(transform, DAMPING, search_period=2, momentum=False)
    *_, (params, updates, _, state) = _trained(problem, tx, 3)
    gradient, matrix = _dense_model(problem, params, DAMPING, 0)
    plain = -gradient * (gradient @ gradient) / (gradient @ matrix @ gradient)
    assert gradient @ plain / 2 < state.model_change
    first, *rest = jax.tree.leaves(updates)
    assert all(jnp.abs(leaf).max() < 0.1 * jnp.abs(first).max() for leaf in rest)


def test_numbers_that_are_none(x64):
    """A gradient or a proposal that is not finite: a zero update, and nothing of it stays."""
    problem = problems.make("plain", "softmax")
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)
    _, grads, taps = differentiate(problem.params, *problem.args)
    for inner, poison in ((kfe.scale_by_kfac(layers, 0.1), True), (optax.scale(jnp.inf), False)):
        tx = kfe.scale_by_quadratic_model(inner, DAMPING)
        state = tx.init(problem.params)._replace(previous=grads)
        given = jax.tree.map(lambda g, poison=poison: g * jnp.nan if poison else g, grads)
        updates, new_state = jax.jit(tx.update)(given, state, problem.params, taps=taps)
        assert_close(updates, jax.tree.map(jnp.zeros_like, grads))
        assert_close(_flat(new_state.previous), _flat(updates), 1e-12)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new_state))


def test_misuse():
    """No taps, taps without the model, no parameters for the penalty, nonsense numbers."""
    problem = problems.make("plain", "softmax")
    layers = problem.layers()
    tx = kfe.scale_by_quadratic_model(optax.identity(), DAMPING, l2=L2)
    grads, state = problem.params, tx.init(problem.params)
    with pytest.raises(ValueError, match="needs the taps of the step"):
        tx.update(grads, state, problem.params)
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    with pytest.raises(ValueError, match="quadratic_model=True"):
        tx.update(grads, state, problem.params, taps=taps)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)
    _, grads, taps = differentiate(problem.params, *problem.args)
    with pytest.raises(ValueError, match="l2 needs the parameters"):
        tx.update(grads, state, taps=taps)
    with pytest.raises(ValueError, match="l2 must be zero or positive"):
        kfe.scale_by_quadratic_model(optax.identity(), DAMPING, l2=-1.0)
    with pytest.raises(ValueError, match="damping must be positive"):
        kfe.scale_by_quadratic_model(optax.identity(), 0.0)
    for inner in (
        optax.chain(kfe.scale_by_kfac(layers, 1.0), optax.trace(0.9)),
        kfe.clip_by_kl(kfe.scale_by_kfac(layers, 1.0), 1.0),
        kfe.in_kfe(optax.scale_by_adam(), layers),
    ):
        with pytest.raises(ValueError, match="the preconditioner itself"):
            kfe.scale_by_quadratic_model(inner, 1.0, search_period=5).init(problem.params)
    with pytest.raises(ValueError, match="search_period"):
        kfe.scale_by_quadratic_model(optax.identity(), DAMPING, search_period=0)
