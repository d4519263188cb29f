"""`kfe.diagnostics` in use: inside training, over devices, in float32, without curvature; condition numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax import diagnostics

from .curvatures import approximations, make
from .dense import assert_close

TOLERANCE = 1e-10


@pytest.mark.nightly
def test_inside_training(x64):
    """On the state of EKFAC, inside the step: the scale of one batch is the best in its basis (George et al. 2018)."""
    model = make("stacked")
    tx = kfe.scale_by_ekfac(model.layers, 1e-3, scale="batch")
    collect = kfe.value_grad_and_taps(model.loss_fn, model.layers, fisher="exact")

    @jax.jit
    def step(params, opt_state):
        _, grads, taps = collect(params, model.x, model.labels)
        _, opt_state = tx.update(grads, opt_state, params, taps=taps)
        method, tap = opt_state.method, taps[model.name]
        basis, factors = method.basis[model.name], method.factors
        terms = ((factors.input[model.name], factors.output[model.name]),)
        products = basis[0].values[..., :, None] * basis[1].values[..., None, :]
        return (
            diagnostics.kronecker_error(tap, terms),
            diagnostics.eigenbasis_error(tap, basis, products),
            diagnostics.eigenbasis_error(tap, basis, method.scale[model.name]),
        )

    kfac, same, ekfac = step(model.params, tx.init(model.params))
    assert kfac.shape == (2,)
    assert_close(same, kfac, TOLERANCE)
    assert (ekfac < kfac).all()


@pytest.mark.nightly
def test_over_devices(x64):
    """Two devices with half the examples each measure the Fisher of the whole batch."""
    model = make("positions")
    x = model.x[:6]
    labels = model.labels[:6]
    layers = kfe.find_layers(model.loss_fn, model.params, x[:3], labels[:3])
    terms = approximations(layers["shared"])[0]["one"]

    def measure(axis_name):
        collect = kfe.value_grad_and_taps(model.loss_fn, layers, fisher="exact", axis_name=axis_name)

        def run(x, labels):
            tap = collect(model.params, x, labels)[2]["shared"]
            return (
                diagnostics.fisher_norm(tap),
                diagnostics.fisher_spectrum(tap),
                diagnostics.kronecker_error(tap, terms),
                diagnostics.fisher_block(tap),
                diagnostics.gradient_correlation(tap),
            )

        return run

    halves = (x.reshape(2, 3, 3, 2), labels.reshape(2, 3))
    mapped = jax.pmap(measure("devices"), "devices", devices=jax.devices()[:2])(*halves)
    whole = measure(None)(x, labels)
    for device in range(2):
        assert_close([v[device] for v in mapped], list(whole), TOLERANCE)


def test_small_numbers_in_float32():
    """Curvature of 1e-24, whose square float32 does not hold, has the errors of the same curvature times 1e24."""
    model = make("plain")

    loss_fn = lambda params, factor: factor * model.loss_fn(params, model.x, model.labels)
    layers = kfe.find_layers(loss_fn, model.params, jnp.ones(()))
    collect = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")

    @jax.jit
    def errors(factor):
        tap = collect(model.params, factor)[2]["first"]
        scale = tap.second_moment_in(None, None)
        return (
            diagnostics.kronecker_error(tap, (tap.covariances(),)),
            diagnostics.eigenbasis_error(tap, (None, None), scale),
            diagnostics.fisher_norm(tap) / factor,
        )

    found = errors(jnp.float32(1e-24))
    assert found[0].dtype == jnp.float32
    assert_close(found, errors(jnp.float32(1)), 1e-5)


def test_resolution_in_float32():
    """Where F is a Kronecker product the matrix-free error is rounding, within what is documented."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(64, 20)), jnp.float32)
    params = {"w": {"kernel": jnp.asarray(generator.normal(size=(20, 10)), jnp.float32)}}

    def loss_fn(params, x):
        return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    tap = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)[2]["w"]
    terms = (tap.covariances(),)
    assert diagnostics.kronecker_error(tap, terms) < 1e-3
    # A norm that is rounded down leaves a negative square.
    assert diagnostics.kronecker_error(tap, terms, norm=0.99 * diagnostics.fisher_norm(tap)) == 0
    block, matrix = diagnostics.fisher_block(tap), diagnostics.kronecker_matrix(terms)
    assert diagnostics.relative_error(block, matrix) < 1e-6


def test_no_curvature(x64):
    """A loss that does not see the layer: zero is exact, anything else infinitely wrong; nothing is NaN."""
    model = make("plain")
    loss_fn = lambda params, x, labels: 0 * model.loss_fn(params, x, labels)
    layers = kfe.find_layers(loss_fn, model.params, model.x, model.labels)
    collect = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")
    tap = collect(model.params, model.x, model.labels)[2]["first"]
    zero, eye = (jnp.zeros((5, 5)), jnp.eye(5))
    assert diagnostics.fisher_norm(tap) == 0
    assert diagnostics.kronecker_error(tap, ((eye, zero),)) == 0
    assert diagnostics.kronecker_error(tap, ((eye, eye),)) == np.inf
    assert diagnostics.eigenbasis_error(tap, (None, None), zero) == 0
    assert diagnostics.eigenbasis_error(tap, (None, None), zero + 1) == np.inf
    assert diagnostics.relative_error(zero, zero) == 0
    assert diagnostics.relative_error(zero, eye) == np.inf
    assert diagnostics.spectrum_error(jnp.zeros(3), jnp.zeros(3)) == 0
    assert diagnostics.spectrum_error(jnp.zeros(3), jnp.ones(3)) == np.inf


def test_not_a_number_stays_one(x64):
    model = make("plain")
    tap = model.exact["first"]
    assert np.isnan(diagnostics.kronecker_error(tap, ((jnp.eye(5) * jnp.nan, jnp.eye(5)),)))
    assert np.isnan(diagnostics.eigenbasis_error(tap, (None, None), jnp.full((5, 5), jnp.nan)))


def test_condition_numbers(x64):
    generator = np.random.default_rng(0)
    root = lambda d: generator.normal(size=(2, d, d))
    a, b = (np.einsum("sij,skj->sik", r, r) for r in (root(4), root(3)))
    diagonal = generator.uniform(0.1, 1, (2, 3))
    damping = np.array([0.1, 0.2])
    cond = lambda m: np.linalg.cond(m)

    @jax.jit
    def read(terms):
        found = diagnostics.condition_numbers(terms, damping, stacked=1)
        spectrum = diagnostics.kronecker_spectrum(terms, stacked=1)
        factored = diagnostics.condition_numbers(terms, 0.1, damping_type="factored", stacked=1)
        return found, diagnostics.condition_number(spectrum, damping), factored

    for right in (b, diagonal):
        full = right if right.ndim == 3 else np.stack([np.diag(v) for v in right])
        terms = ((jnp.asarray(a), jnp.asarray(right)),)
        found, of_spectrum, factored = read(terms)
        assert_close(found.input, cond(a), 1e-9)
        assert_close(found.output, cond(full), 1e-9)
        products = [np.kron(x, y) + s * np.eye(12) for x, y, s in zip(a, full, damping, strict=True)]
        assert_close(found.damped, cond(np.stack(products)), 1e-9)
        assert_close(of_spectrum, found.damped, 1e-9)
        ratio = np.sqrt(np.trace(a, axis1=1, axis2=2) / 4 / (np.trace(full, axis1=1, axis2=2) / 3))
        sides = (
            a + (ratio * np.sqrt(0.1))[:, None, None] * np.eye(4),
            full + (np.sqrt(0.1) / ratio)[:, None, None] * np.eye(3),
        )
        assert_close(factored.damped, cond(sides[0]) * cond(sides[1]), 1e-9)
    singular = jax.jit(diagnostics.condition_numbers)(((jnp.asarray(np.diag([0.0, 1.0])), jnp.ones(2)),))
    assert singular.input == np.inf
    assert singular.damped == np.inf
    assert diagnostics.condition_number(jnp.array([-1.0, 1.0, 3.0])) == 3
