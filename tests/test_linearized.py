"""A loss behind `jax.custom_jvp`: the energy of variational Monte Carlo as FermiNet has it, and its layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from .dense import assert_close

N, D, H = 8, 3, 4


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2)


def problem():
    return {"in": {"w": matrix(1, D, H), "b": matrix(2, H)}, "out": {"w": matrix(3, H, 1)}}, matrix(0, N, D)


def log_psi(params, x):
    def dense(x, w, b=None):
        return x @ w if b is None else x @ w + b

    return dense(jnp.tanh(dense(x, **params["in"])), **params["out"])[:, 0] - (x**2).sum(-1)


def local_energies(params, x):
    """Of a harmonic oscillator, −½ (Δ log ψ + |∇ log ψ|²) + ½ |x|²."""

    def one(x):
        of_x = lambda x: log_psi(params, x[None])[0]
        slope = jax.grad(of_x)(x)
        return -(jnp.trace(jax.hessian(of_x)(x)) + slope @ slope) / 2 + x @ x / 2

    return jax.vmap(one)(x)


@jax.custom_jvp
def total_energy(params, x):
    energies = local_energies(params, x)
    return energies.mean(), energies


@total_energy.defjvp
def _(primals, tangents):
    params, x = primals
    loss, energies = total_energy(params, x)
    tangent = jax.jvp(lambda params: log_psi(params, x), (params,), tangents[:1])[1]
    tangent = kfe.register_output(tangent[:, None], kfe.Gaussian())[:, 0]
    return (loss, energies), (2 * jnp.mean((energies - loss) * tangent), jnp.zeros_like(energies))


def surrogate(params, x, energies):
    z = log_psi(params, x)
    return kfe.losses.l2_loss(z, jax.lax.stop_gradient(z - (energies - energies.mean()))).mean()


def test_the_energy_has_the_layers_of_its_rule(x64):
    """Value and gradient are the rule's, the factors those of the surrogate, and a step lowers the energy of fixed walkers' ψ."""
    params, x = problem()
    loss_fn = kfe.losses.linearized(total_energy, has_aux=True)
    layers = kfe.find_layers(loss_fn, params, x, has_aux=True)
    assert {name: layer.shape for name, layer in layers.items()} == {"in": (D + 1, H), "out": (H, 1)}
    assert not layers.rest
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", has_aux=True)
    tx = kfe.kfac(0.1, layers)

    @jax.jit
    def read(params, x):
        value, grads, taps = differentiate(params, x)
        updates = tx.update(grads, tx.init(params), params, taps=taps)[0]
        return value, grads, {name: taps[name].covariances() for name in layers}, updates

    (loss, energies), grads, factors, updates = read(params, x)
    expected = jax.jit(jax.value_and_grad(total_energy, has_aux=True))(params, x)
    assert_close(((loss, energies), grads), expected, 1e-10)

    # The derivatives inside the energies themselves are behind the stop and count for nothing.
    found = kfe.find_layers(surrogate, params, x, energies)

    @jax.jit
    def read_surrogate(params, x, energies):
        half, taps = kfe.value_grad_and_taps(surrogate, found, fisher="exact")(params, x, energies)[1:]
        return jax.tree.map(lambda g: 2 * g, half), {name: taps[name].covariances() for name in layers}

    assert_close((grads, factors), read_surrogate(params, x, energies), 1e-10)

    @jax.jit
    def means(params, x):
        taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical", has_aux=True)(params, x)[2]
        return {name: taps[name].example_gradients().mean(-3) for name in layers}

    assert_close(means(params, x), {name: layer.to_matrix(grads) for name, layer in layers.items()}, 1e-10)
    slope = sum(np.vdot(g, u) for g, u in zip(*map(jax.tree.leaves, (grads, updates)), strict=True))
    assert slope < 0
    assert jax.tree.structure(optax.apply_updates(params, updates)) == jax.tree.structure(params)


def test_the_reason_says_what_to_do():
    """As it is, the loss has no layers; the table and the refusal name both ways."""
    params, x = problem()
    layers = kfe.find_layers(total_energy, params, x, has_aux=True)
    advice = "wrap it in kfe.losses.linearized or write the surrogate: see examples/helium.py"
    assert not layers
    assert all(
        "inside a function with a derivative of its own (jax.custom_jvp)" in why for why in layers.reasons
    )
    assert all(why.endswith(advice) for why in layers.reasons)
    with pytest.raises(ValueError, match="see examples/helium.py"):
        kfe.kfac(0.1, layers)


def test_a_rule_in_reverse_mode_alone_names_the_surrogate():
    """Nothing can be expanded of a `jax.custom_vjp`."""

    @jax.custom_vjp
    def loss_fn(params, x):
        return (x @ params["w"]).mean()

    loss_fn.defvjp(lambda p, x: (loss_fn(p, x), x), lambda x, g: ({"w": g * x.mean(0)}, jnp.zeros_like(x)))
    (reason,) = kfe.find_layers(loss_fn, {"w": matrix(1, D)}, matrix(0, N, D)).reasons
    assert "(jax.custom_vjp)" in reason
    assert reason.endswith("around a whole loss, write the surrogate: see examples/helium.py")
