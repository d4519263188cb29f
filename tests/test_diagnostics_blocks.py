"""`kfe.diagnostics`: exact blocks, norms, errors and spectra against dense float64 matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfe_optax import diagnostics

from . import problems
from .curvatures import CLASSES, MODELS, approximations, make
from .dense import assert_close, layer_fisher

TOLERANCE = 1e-10


@functools.cache
def measured(name):
    """Every instrument on one model, in one compiled function."""
    model = make(name)
    layer = model.layers[model.name]
    terms, bases, scale = approximations(layer)
    stacked = len(layer.stack_shape)

    @jax.jit
    def run(taps, terms, bases, scale):
        tap = taps[model.name]
        norm = diagnostics.fisher_norm(tap)
        spectrum = diagnostics.fisher_spectrum(tap)
        errors, matrices, spectra, spectrum_errors = {}, {}, {}, {}
        for key, term in terms.items():
            errors[key] = diagnostics.kronecker_error(tap, term, norm=norm)
            matrices[key] = diagnostics.kronecker_matrix(term, stacked=stacked)
            spectra[key] = diagnostics.kronecker_spectrum(term, stacked=stacked)
        for key, basis in bases.items():
            errors[key] = diagnostics.eigenbasis_error(tap, basis, scale)
            matrices[key] = diagnostics.eigenbasis_matrix(basis, scale)
            spectra[key] = diagnostics.eigenbasis_spectrum(scale)
        for key, found in spectra.items():
            spectrum_errors[key] = diagnostics.spectrum_error(spectrum, found)
        block = diagnostics.fisher_block(tap)
        return {
            "block": block,
            "block in chunks": diagnostics.fisher_block(tap, chunk_size=2),
            "trace": diagnostics.fisher_trace(tap),
            "norm": norm,
            "norm in chunks": diagnostics.fisher_norm(tap, chunk_size=2),
            "spectrum": spectrum,
            "errors": errors,
            "matrices": matrices,
            "spectra": spectra,
            "spectrum errors": spectrum_errors,
            "dense errors": {key: diagnostics.relative_error(block, m) for key, m in matrices.items()},
        }

    found = run(model.exact, terms, bases, scale)
    flat = jax.tree.map(lambda v: np.asarray(v).reshape(-1, *v.shape[stacked:]), found)
    return model, (terms, bases, scale), flat, model.fisher


def dense_of(layer, key, terms, bases, scale):
    """The approximation as a matrix, with numpy alone, (stacked or 1, d, d)."""
    count = int(np.prod(layer.stack_shape))
    pick = lambda v, i: np.asarray(v).reshape(count, *v.shape[len(layer.stack_shape) :])[i]
    full = lambda v: np.diag(v) if v.ndim == 1 else v
    if key in terms:
        return np.stack(
            [sum(np.kron(full(pick(a, i)), full(pick(b, i))) for a, b in terms[key]) for i in range(count)]
        )
    blocks = []
    for i in range(count):
        sides = (np.eye(d) if u is None else pick(u, i) for u, d in zip(bases[key], layer.sides, strict=True))
        basis = np.kron(*sides)
        blocks.append(basis @ np.diag(pick(scale, i).ravel()) @ basis.T)
    return np.stack(blocks)


norms = functools.partial(np.linalg.norm, axis=(-2, -1))
every_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in ("stacked", "twice") else [])
        for name in MODELS
    ],
)


@every_model
def test_exact_blocks(name, x64):
    """The block from taps, in whole and in chunks that do not divide the batch, and from differentiation: JᵀHJ."""
    model, _, found, fisher = measured(name)
    assert_close(found["block"], fisher, TOLERANCE)
    assert_close(found["block in chunks"], fisher, TOLERANCE)
    layer = model.layers[model.name]
    block = jax.jit(
        lambda params: diagnostics.gauss_newton_block(
            lambda params: model.outputs(params, model.x), model.plain_loss, params, layer, chunk_size=3
        )
    )(model.params)
    assert block.shape == (*layer.stack_shape, *fisher.shape[1:])
    assert_close(block.reshape(fisher.shape), fisher, TOLERANCE)


@every_model
def test_norm_trace_and_spectrum(name, x64):
    _, _, found, fisher = measured(name)
    assert_close(found["norm"], norms(fisher), TOLERANCE)
    assert_close(found["norm in chunks"], norms(fisher), TOLERANCE)
    assert_close(found["trace"], np.trace(fisher, axis1=1, axis2=2), TOLERANCE)
    assert_close(found["spectrum"], np.linalg.eigvalsh(fisher), TOLERANCE)


def test_exact_block_of_an_nnx_module(x64):
    problem = problems.make("nnx")
    for i, layer in enumerate(problem.layers().values()):
        block = jax.jit(
            lambda layer=layer: diagnostics.gauss_newton_block(
                lambda module: module(problem.args[0]), problem.loss, problem.params, layer
            )
        )()
        expected = layer_fisher(tuple(problem.weights), problem.args[0], problem.loss, i)
        assert_close(block, expected, TOLERANCE)


def test_both_ways_to_the_spectrum_are_taken(x64):
    models = {name: make(name) for name in MODELS}
    gradients = {name: len(model.x) * CLASSES for name, model in models.items()}
    sizes = {name: fisher_size(model.layers[model.name]) for name, model in models.items()}
    assert any(sizes[name] > gradients[name] for name in MODELS)
    assert any(sizes[name] < gradients[name] for name in MODELS)


@every_model
def test_errors(name, x64):
    """Matrix-free and dense errors of every form of approximation, and the errors of their spectra."""
    model, given, found, fisher = measured(name)
    spectrum = np.linalg.eigvalsh(fisher)
    for key, error in found["errors"].items():
        matrix = dense_of(model.layers[model.name], key, *given)
        expected = norms(fisher - matrix) / norms(fisher)
        assert_close(error, expected, TOLERANCE)
        assert_close(found["dense errors"][key], expected, TOLERANCE)
        assert_close(found["matrices"][key], matrix, TOLERANCE)
        values = np.linalg.eigvalsh(matrix)
        assert_close(found["spectra"][key], values, TOLERANCE)
        off = np.linalg.norm(spectrum - values, axis=-1) / np.linalg.norm(spectrum, axis=-1)
        assert_close(found["spectrum errors"][key], off, TOLERANCE)
        assert (off <= expected + 1e-12).all()  # Hoffman and Wielandt


@pytest.mark.parametrize("fisher", ["sampled", pytest.param("empirical", marks=pytest.mark.slow)])
@every_model
def test_other_targets(name, fisher, x64):
    """Three samples are averaged; the empirical Fisher is that of the examples' own gradients."""
    model = make(name)
    layer = model.layers[model.name]
    stacked = len(layer.stack_shape)
    if fisher == "empirical":
        taps, draws = model.taps("empirical"), 1
        gradients = model.example_gradients
    else:
        taps, draws = model.taps("sampled", 3, jax.random.key(0)), 3
        draw = jax.jit(lambda taps, i: taps.draw(i)[model.name].example_gradients())
        statistics = [draw(taps, i) for i in range(3)]
        gradients = np.stack(
            [np.asarray(s).reshape(-1, len(model.x), fisher_size(layer)) for s in statistics], 1
        )
        gradients = gradients.reshape(gradients.shape[0], -1, gradients.shape[-1])
    expected = np.einsum("sni,snj->sij", gradients, gradients) / (len(model.x) * draws)
    terms = approximations(layer)[0]["two"]

    @jax.jit
    def run(taps):
        tap = taps[model.name]
        return (
            diagnostics.fisher_block(tap),
            diagnostics.fisher_norm(tap),
            diagnostics.fisher_norm(tap, chunk_size=1),
            diagnostics.fisher_trace(tap),
            diagnostics.fisher_spectrum(tap),
            diagnostics.kronecker_error(tap, terms),
        )

    block, norm, chunked, trace, spectrum, error = (v.reshape(-1, *v.shape[stacked:]) for v in run(taps))
    assert_close(block, expected, TOLERANCE)
    assert_close(norm, norms(expected), TOLERANCE)
    assert_close(chunked, norms(expected), TOLERANCE)
    assert_close(trace, np.trace(expected, axis1=1, axis2=2), TOLERANCE)
    assert_close(spectrum, np.linalg.eigvalsh(expected), TOLERANCE)
    matrix = dense_of(layer, "two", {"two": terms}, {}, None)
    assert_close(error, norms(expected - matrix) / norms(expected), TOLERANCE)


def fisher_size(layer):
    return layer.sides[0] * layer.sides[1]


@pytest.mark.parametrize(("t", "d_in", "d_out"), [(1, 3, 2), (2, 3, 2), (2, 9, 8)])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_gram(t, d_in, d_out, chunk, x64):
    """Through the products of positions and through the gradients, for two draws."""
    from kfe_optax.diagnostics import examples

    generator = np.random.default_rng(0)
    a = jnp.asarray(generator.normal(size=(5, t, d_in)))
    g = jnp.asarray(generator.normal(size=(2, 5, t, d_out)))
    assert examples.by_position(a, g) == ((t, d_in) != (2, 3))
    gradients = np.einsum("nta,xntb->xnab", a, g).reshape(10, -1)
    expected = gradients @ gradients.T
    grams = lambda a, g: (examples.whole_gram(a, g, chunk), examples.squared_gram(a, g, chunk))
    assert_close(jax.jit(grams)(a, g), (expected, np.sum(expected**2)), 1e-12)
