"""Layers of complex numbers go to `rest`, and the real ones around them have the right factors."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from .dense import assert_close, gauss_newton

N, D, H, C = 6, 3, 4, 2
REASON = "its numbers are complex, and factors are those of real ones"


class Spectral(nn.Module):
    """Real numbers to a spectrum, layers of it, and its magnitudes to real numbers."""

    middle: nn.Module

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(H, name="first", param_dtype=x.dtype)(x))
        spectrum = self.middle(jnp.fft.fft(h, axis=-1))
        return nn.Dense(C, name="last", param_dtype=x.dtype)(jnp.abs(spectrum).reshape(len(x), -1))


class Codebook(nn.Module):
    """The spectrum's largest frequency picks a complex factor."""

    @nn.compact
    def __call__(self, spectrum):
        return spectrum * nn.Embed(H, H, **COMPLEX)(jnp.abs(spectrum).argmax(-1))


COMPLEX = {"dtype": jnp.complex64, "param_dtype": jnp.complex64}
MIDDLES = {
    "dense": nn.Dense(H, **COMPLEX),
    "real parameters": nn.Dense(H, dtype=jnp.complex64),
    "einsum": nn.DenseGeneral((2, 2), **COMPLEX),
    "conv": nn.Conv(2, (2,), **COMPLEX),
    "embedding": Codebook(),
}


def problem(name):
    middle = MIDDLES[name]
    shaped = nn.Sequential([lambda s: s[..., None], middle]) if name == "conv" else middle
    model, x = Spectral(shaped), jnp.asarray(np.random.default_rng(0).normal(size=(N, D)))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def loss_fn(params, x):
        return kfe.losses.l2_loss(model.apply({"params": params}, x)).sum(-1).mean()

    return model, loss_fn, params, x


@pytest.mark.parametrize("name", MIDDLES)
def test_complex_layers_go_to_rest(name):
    _, loss_fn, params, x = problem(name)
    layers = kfe.find_layers(loss_fn, params, x)
    assert set(layers) == {"first", "last"}
    assert layers.rest
    assert set(layers.reasons) == {REASON}


def test_the_real_layers_have_their_factors(x64):
    """Through the complex layer, against the Gauss–Newton matrix of a network of real numbers."""
    model, loss_fn, params, x = problem("dense")
    layers = kfe.find_layers(loss_fn, params, x)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
    expected = jax.jit(jax.grad(loss_fn))(params, x)
    for part in (np.real, np.imag):
        assert_close(jax.tree.map(part, grads), jax.tree.map(part, expected), 1e-6)
    kernel = params["first"]["kernel"]

    def outputs(flat):
        own = {**params, "first": {**params["first"], "kernel": flat.reshape(kernel.shape)}}
        return model.apply({"params": own}, x)

    expected = gauss_newton(outputs, lambda z: 0.5 * (z**2).sum(-1).mean(), kernel.ravel())
    moment = taps["first"].second_moment_in(None, None)[:-1]
    assert_close(moment.ravel(), np.diag(expected), 1e-5)


def test_training():
    """All parameters move, and the loss falls."""
    _, loss_fn, params, x = problem("dense")
    layers = kfe.find_layers(loss_fn, params, x)
    tx = kfe.kfac(0.1, layers)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)

    @jax.jit
    def step(params, state, key):
        loss, grads, taps = differentiate(params, x, key=key)
        # The direction in which a loss of complex numbers falls is minus the conjugate of JAX's gradient.
        updates, state = tx.update(jax.tree.map(jnp.conj, grads), state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    state, found = tx.init(params), []
    start = params
    for i in range(5):
        params, state, loss = step(params, state, jax.random.key(i))
        found.append(float(loss))
    assert found[-1] < found[0]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), params, start)))
    assert int(kfe.info(state).nonfinite) == 0


def test_a_kernel_times_an_imaginary_number():
    params, x = {"w": jnp.ones((D, H), jnp.complex64), "o": jnp.ones((H, C))}, jnp.ones((N, D))

    def loss_fn(params, x):
        return kfe.losses.l2_loss(jnp.abs(x @ (2j * params["w"])) @ params["o"]).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert list(layers) == ["o"]
    assert "mul" in layers.reasons[0]
