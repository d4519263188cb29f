"""Inner transformations (of the rest, and inside `in_kfe`): what they return that is not finite goes nowhere, and is counted."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
PARAMS = {
    "layer": {"kernel": jnp.ones((3, 2))},
    "shift": jnp.zeros(2),
    "unused": jnp.zeros(3),
}


def loss_fn(params):
    z = kfe.tag_dense(X, X @ params["layer"]["kernel"], params["layer"])
    return (
        kfe.losses.l2_loss(z * (1 + jnp.sin(params["shift"])), jnp.ones_like(z)).mean()
        + 0 * params["unused"].sum()
    )


LAYERS = kfe.find_layers(loss_fn, PARAMS)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


def gradient(seed, dtype=jnp.float32):
    """A gradient that is zero for the parameter of no use."""
    generator = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p: jnp.asarray(generator.normal(size=p.shape), dtype), PARAMS)
    return {**grads, "unused": jnp.zeros(3, dtype)}


def preconditioner(rest):
    # Factors of the mean gradient read no taps: gradients can be made up.
    return kfe.scale_by_kronecker(LAYERS, 0.1, factors=kfe.factors.gradient(), rest=rest)


def run(tx, gradients, params=PARAMS, wrap=lambda f: f):
    state, updates, update = tx.init(params), None, wrap(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
    return updates, state


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_rest_in_half_precision(dtype):
    """Adam of the rest in float32: the updates are those of float32 in the gradient's dtype, for small gradients too."""
    of = lambda tree, dtype, factor=1.0: jax.tree.map(
        lambda v: jnp.asarray(factor * np.asarray(v, np.float32), dtype), tree
    )
    grads = [of(gradient(seed), dtype, 1e-5) for seed in range(3)]
    wide = [of(g, jnp.float32) for g in grads]
    narrow_params = of(PARAMS, dtype)
    ours, state = run(preconditioner(optax.scale_by_adam()), grads, narrow_params)
    adam = optax.scale_by_adam()
    expected, _ = run(adam, wide)
    np.testing.assert_array_equal(ours["shift"], expected["shift"].astype(dtype))
    np.testing.assert_array_equal(ours["unused"], jnp.zeros(3, dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.rest.mu, state.rest.nu))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(dtype)}
    assert int(kfe.info(state).nonfinite) == 0


def test_numbers_of_the_rest_that_are_none_are_zero():
    """0/0 of an Adam without ε: that parameter stays, the others move, every such step is counted."""
    grads = [gradient(seed) for seed in range(3)]
    ours, state = run(preconditioner(optax.scale_by_adam(eps=0.0)), grads)
    expected, _ = run(optax.scale_by_adam(eps=0.0), grads)
    assert np.isnan(expected["unused"]).all()
    np.testing.assert_array_equal(ours["shift"], expected["shift"])
    assert not ours["unused"].any()
    assert int(kfe.info(state).nonfinite) == 3


class Best(NamedTuple):
    nu: optax.Updates
    best: jax.Array


def plateau():
    """A state with an infinite number in it, as a best loss so far is."""

    def init(params):
        return Best(jax.tree.map(jnp.zeros_like, params), jnp.inf)

    def update(updates, state, params=None):
        nu = jax.tree.map(lambda g: g**2, updates)
        return jax.tree.map(lambda g: g / (1 + jnp.sqrt(g**2)), updates), Best(nu, state.best)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    "rest", [optax.scale_by_adam(), optax.scale_by_rms(), optax.scale_by_rss(), plateau()]
)
def test_a_state_of_the_rest_that_overflows_is_not_taken(rest):
    """A finite gradient of 1e20, whose square is not: the rest is as if that step had not been, which is counted."""
    huge = {**gradient(1), "shift": jnp.full(2, 1e20)}
    tx = preconditioner(rest)
    updates, state = run(tx, [gradient(0), huge], wrap=jax.jit)
    assert finite(updates) and not updates["shift"].any() and updates["layer"]["kernel"].any()
    assert int(kfe.info(state).nonfinite) == 1
    assert_equal(state.rest, run(tx, [gradient(0)], wrap=jax.jit)[1].rest)


@pytest.mark.parametrize("inner", ["scale_by_adam", "scale_by_rms", "scale_by_amsgrad"])
def test_an_inner_state_that_overflows_is_not_taken(inner):
    """in_kfe: the moments stay as they were, the update is zero and counted, and the next refresh of the basis is sound."""
    make = getattr(optax, inner)
    tx = kfe.in_kfe(
        make(), LAYERS, basis=kfe.factors.gradient(), basis_update_period=3, rest=optax.identity()
    )
    huge = {**gradient(1), "layer": {"kernel": jnp.full((3, 2), 1e20)}}
    updates, state = run(tx, [gradient(0), huge], wrap=jax.jit)
    assert not updates["layer"]["kernel"].any() and updates["shift"].any()
    before = run(tx, [gradient(0)], wrap=jax.jit)[1]
    assert_equal(state.method.inner, before.method.inner)
    assert (int(kfe.info(state).failures), int(kfe.info(state).nonfinite)) == (1, 0)
    update = jax.jit(tx.update)
    for seed in range(2, 5):
        updates, state = update(gradient(seed), state, PARAMS)
        assert finite((updates, state)) and updates["layer"]["kernel"].any()
    assert int(kfe.info(state).last_refresh) == 3


def test_a_gradient_that_is_not_finite_in_a_layer_leaves_the_rest_as_it_was():
    """The step is none for all parameters alike: Adam's moments and count of the rest stay, too."""
    tx = preconditioner(optax.scale_by_adam())
    _, before = run(tx, [gradient(0)])
    grads = gradient(1)
    grads["layer"] = {"kernel": grads["layer"]["kernel"].at[0, 0].set(jnp.nan)}
    updates, after = tx.update(grads, before, PARAMS)
    assert_equal(after.rest, before.rest)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert int(after.nonfinite.sum()) == 1
