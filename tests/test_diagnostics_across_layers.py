"""F and F̃ over all layers, and the scale of squared gradients, against dense float64 matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax import diagnostics

from . import dense, problems
from .dense import assert_close


@pytest.fixture
def measured(x64):
    problem = problems.make("plain", "gaussian")
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")
    return problem, layers, *differentiate(problem.params, *problem.args)[1:]


def test_the_fisher_of_all_layers(measured):
    problem, layers, _, taps = measured
    shapes = [w.shape for w in problem.weights]
    places = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])

    def outputs(flat):
        parts = [flat[a:b].reshape(s) for a, b, s in zip(places, places[1:], shapes, strict=False)]
        return dense.forward(parts, problem.args[0])[0]

    flat = jnp.concatenate([jnp.asarray(w).ravel() for w in problem.weights])
    expected = dense.gauss_newton(outputs, problem.loss, flat)
    assert_close(diagnostics.fisher_matrix(taps), expected)
    last = list(layers)[-1]
    assert_close(diagnostics.fisher_matrix(taps, [last]), expected[places[-2] :, places[-2] :])
    assert_close(diagnostics.fisher_block(taps[last]), expected[places[-2] :, places[-2] :])


def test_kfac_of_all_layers(measured):
    problem, layers, _, taps = measured
    rows = [layers[name].rows(taps[name]) for name in layers]
    a = [np.asarray(own)[:, 0] for own, _ in rows]
    g = [np.asarray(own)[..., 0, :].reshape(-1, own.shape[-1]) for _, own in rows]
    n = len(a[0])
    blocks = [
        [np.kron(x.T @ y / n, u.T @ v / n) for y, v in zip(a, g, strict=True)]
        for x, u in zip(a, g, strict=True)
    ]
    found = diagnostics.kfac_matrix(taps)
    assert_close(found, np.block(blocks))
    first = dense.kfac_factors(problem.weights, problem.args[0], problem.loss)[0]
    size = len(blocks[0][0])
    assert_close(found[:size, :size], np.kron(*first))

    sizes = [len(row[0]) for row in blocks]
    means = diagnostics.mean_absolute_blocks(found, sizes)
    assert_close(means, [[np.abs(block).mean() for block in row] for row in blocks])


def test_squared_gradients(measured):
    _, layers, grads, taps = measured
    name = next(iter(layers))
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(layers[name].sides[0],) * 2))
    gradient = layers[name].to_matrix(grads)
    found = diagnostics.squared_gradient_scale(taps[name], gradient, (jnp.asarray(basis), None))
    assert_close(found, problems.EXAMPLES * (basis.T @ np.asarray(gradient)) ** 2)
    with pytest.raises(ValueError, match="has gradients of shape"):
        diagnostics.squared_gradient_scale(taps[name], gradient[:, :1], (None, None))


def test_misuse(x64):
    def loss_fn(params, x):
        h = jnp.einsum("nti,io->nto", x, params["shared"])
        z = jnp.einsum("nbi,bio->nbo", h, params["blocks"])
        return kfe.losses.l2_loss(z).sum((-2, -1)).mean()

    params = {"shared": jnp.ones((3, 2)), "blocks": jnp.ones((4, 2, 2))}
    x = jax.random.normal(jax.random.key(0), (5, 4, 3))
    layers = kfe.find_layers(loss_fn, params, x)
    taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)[2]
    with pytest.raises(ValueError, match="'shared' has several positions"):
        diagnostics.kfac_matrix(taps, ["shared"])
    with pytest.raises(ValueError, match="'blocks' is a stack, or has blocks"):
        diagnostics.fisher_matrix(taps)
    with pytest.raises(ValueError, match="Name fewer layers"):
        diagnostics.fisher_matrix(taps, ["shared"], max_size=5)
    with pytest.raises(ValueError, match="add up to 3, and the matrix has 2"):
        diagnostics.mean_absolute_blocks(jnp.eye(2), [1, 2])
