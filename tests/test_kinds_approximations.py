"""Where the approximations are exact, what they refuse, and the pieces that sums over examples are made of."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax._jax import chunks

from . import dense_kinds as dk
from .dense import assert_close
from .kind_networks import random


def independent_inputs():
    """All sign patterns over 4 places × 2 channels: uncorrelated places, alike everywhere, correlated channels."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=8))).reshape(-1, 4, 2)
    return signs @ np.array([[1.0, 0.4], [0.0, 0.7]]) + np.array([0.3, -0.5])


@pytest.mark.parametrize("use_bias", [True, False])
def test_sua_is_exact_where_it_should_be(use_bias, x64):
    """Uncorrelated inputs with the same mean and covariance at every place, of a convolution that wraps around."""
    x = independent_inputs()
    tables = [dk.sources(4, 3, padding="CIRCULAR")]
    rows = dk.conv_rows(x, tables, use_bias)
    exact = np.einsum("nti,ntj->ij", rows, rows) / (len(x) * 4)
    assert_close(dk.sua(x, 3, use_bias, True), exact, 1e-12)
    module = nn.Conv(2, (3,), padding="CIRCULAR", use_bias=use_bias, param_dtype=jnp.float64)
    params = {"conv": jax.jit(module.init)(jax.random.key(0), x)["params"]}

    def loss_fn(params, x):
        return kfe.losses.l2_loss(module.apply({"params": params["conv"]}, x)).sum((1, 2)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    for own in (layers, layers.configure(approximation="sua")):
        _, _, taps = kfe.value_grad_and_taps(loss_fn, own, fisher="empirical")(params, x)
        assert_close(taps["conv"].covariances()[0], exact, 1e-12)


def norm_layers(**approximation):
    module = nn.LayerNorm()
    x = jnp.asarray(random(0, 4, 2, 3), jnp.float32)
    params = {"norm": jax.jit(module.init)(jax.random.key(0), x)["params"]}

    def loss_fn(params, x):
        y = module.apply({"params": params["norm"]}, x)
        return kfe.losses.l2_loss(jnp.sin(y)).sum((1, 2)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    return (layers.configure(**approximation) if approximation else layers), loss_fn, params, x


def test_a_diagonal_norm_keeps_the_diagonal():
    terms = []
    for approximation in ({}, {"approximation": "diagonal"}):
        layers, loss_fn, params, x = norm_layers(**approximation)
        _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)
        terms += jax.jit(lambda taps: kfe.factors.estimate(kfe.factors.kfac(), taps)["norm"])(taps)
    full, diagonal = terms
    assert full.output.shape == (3, 2, 2) and diagonal.output.shape == (3, 2)
    np.testing.assert_allclose(diagonal.output, full.output.diagonal(axis1=-2, axis2=-1), rtol=1e-6)


def layers_of(module, x):
    params = {"layer": jax.jit(module.init)(jax.random.key(0), x)["params"]}

    def loss_fn(params, x):
        return kfe.losses.l2_loss(module.apply({"params": params["layer"]}, x)).mean()

    return kfe.find_layers(loss_fn, params, x), loss_fn, params


def test_a_circular_transposed_convolution_is_the_one_inside():
    """Its output is folded after the sum over the window: the positions are those from before, the bias a shift of its own."""
    module = nn.ConvTranspose(2, (3,), strides=(2,), padding="CIRCULAR")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    found, loss_fn, params = layers_of(module, x)
    assert [layer.shape for layer in found.values()] == [(9, 2), (2, 1, 1)]
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, found, fisher="empirical")(params, x)
    for name, layer in found.items():
        assert_close(taps[name].example_gradients().mean(-3), layer.to_matrix(grads), 1e-6)


@pytest.mark.parametrize(
    ("module", "shape", "options", "message"),
    [
        (nn.Conv(4, (3,), feature_group_count=2), (2, 4, 4), {"approximation": "sua"}, "2 feature groups"),
        (
            nn.Conv(4, (3,)),
            (2, 4, 3),
            {"approximation": "groups", "num_groups": 2},
            "does not divide 3 input",
        ),
        (nn.Conv(4, (3,)), (2, 4, 3), {"approximation": "groups"}, "belong together"),
        (nn.Conv(4, (3,)), (2, 4, 3), {"approximation": "sua", "num_groups": 2}, "belong together"),
        (nn.Conv(4, (3,)), (2, 4, 3), {"approximation": "sua", "sharing": "reduce"}, "single positions"),
        (nn.Conv(4, (3,)), (2, 4, 3), {"sharing": "mean"}, "'expand' or 'reduce'"),
        (nn.Dense(4), (2, 3), {"approximation": "heads"}, "needs a kernel with an axis of heads"),
        (nn.Dense(4), (2, 3), {"approximation": "sua"}, "None of the layers"),
    ],
)
def test_what_cannot_be_is_refused(module, shape, options, message):
    found, _, _ = layers_of(module, jnp.ones(shape))
    with pytest.raises(ValueError, match=message):
        found.configure(**options)


@pytest.mark.parametrize(
    ("approximation", "mask", "message"),
    [("sua", (2, 4), "which a row_mask contradicts"), ("kfc", (2, 3), r"row_mask has shape \(2, 3\)")],
)
def test_masks_that_do_not_fit(approximation, mask, message):
    x = jnp.ones((2, 4, 3))
    found, loss_fn, params = layers_of(nn.Conv(2, (3,)), x)
    found = found.configure(approximation=approximation)
    collect = kfe.value_grad_and_taps(loss_fn, found, fisher="empirical")
    with pytest.raises(ValueError, match=message):
        collect(params, x, row_mask=jnp.ones(mask, bool))[2]["layer"].covariances()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 9])
def test_pieces_add_up(chunk):
    batch = {"a": jnp.asarray(random(0, 7, 2)), "b": jnp.asarray(random(1, 7))}
    total = chunks.fold(lambda p: {"sum": (p["a"] * p["b"][:, None]).sum(0)}, batch, chunk)
    np.testing.assert_allclose(total["sum"], (batch["a"] * batch["b"][:, None]).sum(0), rtol=1e-5)
    found = chunks.mapped(lambda p: p["a"] + p["b"][:, None], batch, chunk)
    np.testing.assert_allclose(found, batch["a"] + batch["b"][:, None])


def test_pieces_fit_the_budget(monkeypatch):
    """Of whole batches, or of a power of two, which the devices that share a batch divide."""
    monkeypatch.setattr(chunks, "BUDGET", 1000)
    assert chunks.size(50, 100) == 8
    assert chunks.size(10, 100) == 10
    assert chunks.size(5, 100) == 5
    assert chunks.size(5, 10**6) == 1
    assert chunks.size(5, 0) == 5
