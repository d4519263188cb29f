"""`kfe.diagnostics.gradient_correlation` against the dense Fisher block and `np.corrcoef`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax import diagnostics
from kfe_optax._linalg.kronecker import Eigenbasis

from .curvatures import MODELS, make
from .dense import assert_close
from .methods import quick

TOLERANCE = 1e-10
correlation = jax.jit(diagnostics.gradient_correlation)
summarized = jax.jit(diagnostics.mean_absolute_correlation)
every_model = pytest.mark.parametrize("name", quick("positions", slow=["stacked"], of=MODELS))


def scaled(covariance):
    deviation = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
    return covariance / deviation[..., :, None] / deviation[..., None, :]


def orthogonal(layer):
    generator = np.random.default_rng(0)
    return [np.linalg.qr(generator.normal(size=(*layer.stack_shape, d, d)))[0] for d in layer.sides]


@every_model
def test_exact(name, x64):
    """F_ij / sqrt(F_ii F_jj) in parameter space and in a basis, whole and in part, inside jit."""
    model = make(name)
    layer = model.layers[model.name]
    fisher, basis = model.fisher, orthogonal(layer)
    indices = np.array([3, 0, fisher.shape[-1] - 1])
    stacked = len(layer.stack_shape)

    @jax.jit
    def run(taps, basis, traced):
        tap = taps[model.name]
        return (
            diagnostics.gradient_correlation(tap),
            diagnostics.gradient_correlation(tap, basis),
            diagnostics.gradient_correlation(tap, indices=[3, 0, fisher.shape[-1] - 1]),
            diagnostics.gradient_correlation(tap, (basis[0], None), indices=traced),
        )

    found = run(model.exact, jax.tree.map(jnp.asarray, basis), jnp.asarray(indices))
    found = [np.asarray(v).reshape(-1, *v.shape[stacked:]) for v in found]
    u_in, u_out = (u.reshape(-1, *u.shape[stacked:]) for u in basis)
    both = np.stack([np.kron(a, g) for a, g in zip(u_in, u_out, strict=True)])
    left = np.stack([np.kron(a, np.eye(layer.sides[1])) for a in u_in])
    rotated = lambda u: scaled(np.swapaxes(u, -1, -2) @ fisher @ u)
    assert_close(found[0], scaled(fisher), TOLERANCE)
    assert_close(found[1], rotated(both), TOLERANCE)
    assert_close(found[2], scaled(fisher)[:, indices][:, :, indices], TOLERANCE)
    assert_close(found[3], rotated(left)[:, indices][:, :, indices], TOLERANCE)


@every_model
def test_empirical(name, x64):
    """The mean of the examples' own gradients is subtracted: Pearson's correlations."""
    model = make(name)
    layer = model.layers[model.name]
    found = correlation(model.taps("empirical")[model.name])
    gradients = model.example_gradients
    expected = np.stack([np.corrcoef(g.T) for g in gradients])
    assert_close(found.reshape(expected.shape), expected, TOLERANCE)
    summary = summarized(found)
    d = expected.shape[-1]
    off = np.abs(expected - np.eye(d)).sum((-2, -1)) / (d * (d - 1))
    assert summary.shape == layer.stack_shape
    assert_close(summary.reshape(-1), off, 1e-9)


def test_samples_are_averaged(x64):
    model = make("positions")
    taps = model.taps("sampled", 3, jax.random.key(0))
    draw = jax.jit(lambda taps, i: taps.draw(i)["shared"].example_gradients())
    gradients = np.stack([draw(taps, i) for i in range(3)])
    flat = gradients.reshape(-1, gradients.shape[-2] * gradients.shape[-1])
    assert_close(correlation(taps["shared"]), scaled(flat.T @ flat), TOLERANCE)


def test_the_eigenbasis_decorrelates(x64):
    """What the figure of George et al. shows, here on a random network."""
    tap = make("plain").exact["first"]
    basis = tuple(Eigenbasis(*map(jnp.asarray, np.linalg.eigh(factor))) for factor in tap.covariances())
    inside, outside = (correlation(tap, b) for b in (basis, (None, None)))
    assert summarized(inside) < 0.7 * summarized(outside)


@pytest.mark.parametrize("double", [False, True])
def test_coordinates_without_variance(double):
    """An input that is always zero, and the null space of a batch smaller than the layer: zeros, no NaN, left out."""
    with jax.enable_x64(double):
        generator = np.random.default_rng(0)
        x = generator.normal(size=(3, 6))
        x[:, 2] = 0
        x = jnp.asarray(x, jnp.float64 if double else jnp.float32)
        params = {"w": {"kernel": jnp.ones((6, 1), x.dtype)}}

        def loss_fn(params, x):
            return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()

        layers = kfe.find_layers(loss_fn, params, x)
        tap = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)[2]["w"]
        found = np.asarray(correlation(tap))
        assert found.dtype == x.dtype
        np.testing.assert_allclose(np.diag(found), [1, 1, 0, 1, 1, 1], rtol=1e-6)
        assert not found[2].any() and not found[:, 2].any()
        others = np.delete(np.arange(6), 2)
        inside = np.abs(found[others][:, others])
        mean = (inside.sum() - 5) / 20
        np.testing.assert_allclose(summarized(found), mean, rtol=1e-5)
        _, vectors = np.linalg.eigh(np.asarray(x.T @ x))
        rotated = correlation(tap, (jnp.asarray(vectors), None))
        np.testing.assert_allclose(np.diag(rotated), [0, 0, 0, 1, 1, 1], rtol=1e-6)
        assert summarized(rotated) < (1e-12 if double else 1e-4)
    assert summarized(jnp.zeros((2, 2))) == 0
    assert summarized(jnp.ones((1, 1))) == 0


def test_misuse(x64):
    tap = make("plain").exact["first"]
    with pytest.raises(ValueError, match="Choose some of the coordinates"):
        diagnostics.gradient_correlation(tap, max_size=24)
    assert diagnostics.gradient_correlation(tap, indices=range(24), max_size=24).shape == (24, 24)
    for indices in ([25], [-1]):
        with pytest.raises(ValueError, match="must lie in 0..24"):
            diagnostics.gradient_correlation(tap, indices=indices)
    for indices in ([], [0.5], [[0]], jnp.ones((2, 2), int)):
        with pytest.raises(ValueError, match="list of integers"):
            diagnostics.gradient_correlation(tap, indices=indices)
    with pytest.raises(ValueError, match="output basis of layer 'first'"):
        diagnostics.gradient_correlation(tap, (None, jnp.eye(3)))
