"""Misuse of `kfe.diagnostics` ends in a sentence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax import diagnostics
from kfe_optax._linalg.kronecker import Eigenbasis

from .curvatures import make
from .dense import assert_close

TOLERANCE = 1e-10


def test_misuse(x64):
    model = make("plain")
    tap, eye = model.exact["first"], jnp.eye(5)
    layer = model.layers["first"]
    with pytest.raises(ValueError, match="25 rows, more than max_size=24"):
        diagnostics.fisher_block(tap, max_size=24)
    with pytest.raises(ValueError, match="matrix-free"):
        diagnostics.gauss_newton_block(lambda p: p, jnp.sum, model.params, layer, max_size=24)
    with pytest.raises(ValueError, match="loss_fn must map the outputs to a scalar"):
        diagnostics.gauss_newton_block(lambda p: model.outputs(p, model.x), jnp.square, model.params, layer)
    with pytest.raises(ValueError, match="smaller batch or fewer draws"):
        diagnostics.fisher_spectrum(tap, max_size=14)
    with pytest.raises(ValueError, match="raise max_size"):
        diagnostics.kronecker_matrix(((eye, eye),), max_size=24)
    with pytest.raises(ValueError, match="raise max_size"):
        diagnostics.kronecker_spectrum(((eye, eye), (eye, eye)), max_size=24)
    with pytest.raises(ValueError, match="raise max_size"):
        diagnostics.eigenbasis_matrix((None, None), eye, max_size=24)
    for chunk_size in (0, -1):
        with pytest.raises(ValueError, match="chunk_size counts examples"):
            diagnostics.fisher_norm(tap, chunk_size=chunk_size)
        with pytest.raises(ValueError, match="chunk_size counts examples"):
            diagnostics.fisher_block(tap, chunk_size=chunk_size)
    for terms in ((), (eye, eye), ((eye, eye, eye),)):
        with pytest.raises(ValueError, match="a single product is"):
            diagnostics.kronecker_error(tap, terms)
    with pytest.raises(ValueError, match="output factor of layer 'first' has shape"):
        diagnostics.kronecker_error(tap, ((eye, jnp.eye(4)),))
    with pytest.raises(ValueError, match="A basis is a pair"):
        diagnostics.eigenbasis_error(tap, eye, eye)
    with pytest.raises(ValueError, match="input basis of layer 'first' has shape"):
        diagnostics.eigenbasis_error(tap, (jnp.eye(4), None), eye)
    with pytest.raises(ValueError, match="scale of layer 'first' has shape"):
        diagnostics.eigenbasis_error(tap, (None, None), jnp.ones(25))
    with pytest.raises(ValueError, match="give two of one shape"):
        diagnostics.relative_error(eye, jnp.eye(4))
    with pytest.raises(ValueError, match="all eigenvalues of both"):
        diagnostics.spectrum_error(jnp.ones(3), jnp.ones(4))
    with pytest.raises(ValueError, match="does not follow from its factors"):
        diagnostics.condition_numbers(((eye, eye), (eye, eye)))
    with pytest.raises(ValueError, match="damping_type must be"):
        diagnostics.condition_numbers(((eye, eye),), damping_type="none")


def test_a_layer_without_example_gradients(x64):
    """One example at a time: the taps refuse, differentiation gives the block."""
    generator = np.random.default_rng(0)
    params = {"w": {"kernel": jnp.asarray(generator.normal(size=(3, 2)))}}
    x = jnp.asarray(generator.normal(size=(4, 3)))

    def outputs_fn(params):
        return jax.vmap(lambda x: kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"]))(x)

    def loss_fn(params):
        return kfe.losses.l2_loss(outputs_fn(params)).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params)
    tap = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params)[2]["w"]
    basis = (Eigenbasis(jnp.ones(3), jnp.eye(3)), Eigenbasis(jnp.ones(2), None))
    for measure in (
        diagnostics.fisher_block,
        diagnostics.fisher_norm,
        diagnostics.fisher_trace,
        diagnostics.fisher_spectrum,
        diagnostics.gradient_correlation,
        lambda tap: diagnostics.kronecker_error(tap, ((jnp.eye(3), jnp.eye(2)),), norm=jnp.ones(())),
        lambda tap: diagnostics.eigenbasis_error(tap, basis, jnp.ones((3, 2)), norm=jnp.ones(())),
    ):
        with pytest.raises(ValueError, match="call the model on the whole batch"):
            measure(tap)
    plain_loss = lambda z: 0.5 * (z**2).sum(-1).mean()
    block = diagnostics.gauss_newton_block(outputs_fn, plain_loss, params, layers["w"])
    assert_close(block, np.kron(x.T @ x / 4, np.eye(2)), TOLERANCE)
