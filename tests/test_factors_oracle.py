"""Every factors estimator against its dense definition, to 1e-10 in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax._statistics.rows import Rows
from kfe_optax.factors import operators
from kfe_optax.factors.base import Source, Term

from . import dense, problems
from . import factor_rows as fr
from .dense import assert_close
from .methods import quick

DECAY = 0.6


@functools.cache
def fismo():
    """Layers, the state before any gradient, and the compiled update of the state."""
    layers, factors = problems.make("plain").layers(), kfe.factors.fismo(DECAY)
    update = jax.jit(lambda state, gradients: factors.update(state, Source(layers, None, gradients), 0))
    return layers, factors.init(list(layers.values()), 8192), update


@pytest.mark.parametrize(("size", "failures"), [(1.0, 0), (1e6, 1), (np.nan, 1)])
def test_fismo_keeps_bad_gradients_out(size, failures):
    """A huge one counts as one 100 times as large as the factor, one that is not a number not at all; both are counted."""
    layers, before, update = fismo()
    generator = np.random.default_rng(0)
    gradients = {
        name: jnp.asarray(size * generator.normal(size=v.shape), jnp.float32) for name, v in layers.items()
    }
    after = update(before, gradients)
    assert int(after.failures.sum()) == failures * len(layers)
    for name, side in after.input.items():
        assert np.isfinite(side).all()
        assert_close(np.trace(side), float(side.shape[-1]), 1e-5)
        moved = np.abs(side - before.input[name]).max()
        assert moved == 0 if np.isnan(size) else moved > 0.01


def test_all_of_the_registry_is_here():
    assert set(kfe.factors.FACTORS) <= set(fr.estimators(DECAY))


@functools.cache
def history(max_dim):
    """[(rows, states, terms)] after each of three batches."""
    states, found = fr.init(DECAY, max_dim), []
    for step in range(3):
        rows = fr.random_rows(step)
        states, terms = fr.updater(DECAY)(states, rows, step)
        found.append((rows, states, terms))
    return found


@pytest.mark.parametrize(
    ("max_dim", "name"),
    [
        *((fr.WHOLE, name) for name in fr.names(fr.WHOLE)),
        *(pytest.param(fr.DIAGONAL, name, marks=pytest.mark.slow) for name in fr.names(fr.DIAGONAL)),
    ],
)
def test_dense_definition(max_dim, name, x64):
    """Dense layers, shared positions, stacks and parameters used twice; first batch, averages, warm starts, signs."""
    references = {}
    for rows, states, terms in history(max_dim):
        for key, a, g, found in fr.members(rows, terms[name]):
            reference = references.setdefault(key, fr.Reference(name, DECAY, max_dim))
            expected = reference.add(*fr.of_rows(a, g))
            assert_close(found, expected)
        assert states[name].failures.sum() == 0


@pytest.mark.parametrize("max_dim", [fr.WHOLE, fr.DIAGONAL])
@pytest.mark.parametrize("name", ["tkfac", "tkfac_example"])
def test_tkfac_keeps_the_traces(name, max_dim, x64):
    """tr Φ = tr Ψ = 1 and σ = tr F at all times, σ of paired positions the trace of E Σ_t Λ_t⊗Γ_t."""
    traces = {}
    for step, (rows, states, _) in enumerate(history(max_dim)):
        state = states[name]
        for layer in state.trace:
            a, g = rows[layer]
            m = np.einsum("...nti,...ntj->...nij", a, g)
            new = np.einsum("...nij,...nij->...", m, m) / fr.EXAMPLES
            if name == "tkfac":
                new = np.einsum("...nti,...nti,...ntj,...ntj->...", a, a, g, g) / fr.EXAMPLES
            rho = min(1 - 1 / (step + 1), DECAY)
            traces[layer] = rho * traces.get(layer, 0) + (1 - rho) * new
            assert_close(state.trace[layer], traces[layer], 1e-12)
            for side in (state.input[layer], state.output[layer]):
                stacked = bool(fr.SHAPES[layer][0])
                trace = side.sum(-1) if side.ndim == stacked + 1 else np.trace(side, axis1=-2, axis2=-1)
                assert_close(trace / state.trace[layer], np.ones(np.shape(new)), 1e-12)


# Shared positions have shown every estimator with products in matrices; here it is their sum over draws that is new.
DRAWS = {
    ("exact", 1): ("kfac", "tkfac", "tkfac_example", "kpsvd", "kfac_corrected", "gradient"),
    ("sampled", 2): ("kfac", "tkfac", "kpsvd"),
    ("sampled", 1): ("kfac", "kpsvd"),
}


@functools.cache
def of_taps(fisher, samples):
    """(problem, estimators, compiled update) on the first layer of a network; `samples` draws or all columns."""
    problem = problems.make("plain")
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher=fisher, num_samples=samples)
    own = {name: fr.estimators(DECAY)[name] for name in DRAWS[fisher, samples]}

    @jax.jit
    def update(states, params, x, y, key):
        _, grads, taps = differentiate(params, x, y, key=key)
        gradients = {name: layer.to_matrix(grads) for name, layer in layers.items()}
        source = Source(layers, taps.pulled(), gradients)
        states = {name: own[name].update(states[name], source, 0) for name in own}
        return states, {name: own[name].terms(states[name], layers)["0"] for name in own}, gradients["0"]

    return (
        problem,
        layers,
        differentiate,
        {n: e.init([layers["0"]], fr.WHOLE) for n, e in own.items()},
        update,
    )


@functools.cache
def after_two_batches(fisher, samples):
    """[(dense F, …; see `Reference.add`, terms)] of two batches; F of all columns from Jacobians, of samples from rows."""
    problem, layers, differentiate, states, update = of_taps(fisher, samples)
    found = []
    for step in range(2):
        generator = np.random.default_rng(step)
        x = jnp.asarray(generator.normal(size=problem.args[0].shape))
        key = jax.random.key(step)
        states, terms, mean = update(states, problem.params, x, problem.args[1], key)
        if fisher == "exact":
            f = np.asarray(dense.layer_fisher(problem.weights, x, problem.loss, 0))
            kfac = dense.kfac_factors(problem.weights, x, problem.loss)[0]
            d_in, d_out = layers["0"].sides
            block = f.reshape(d_in, d_out, d_in, d_out)
            traced = np.trace(f), np.einsum("ikjk->ij", block), np.einsum("kikj->ij", block)
            one = traced[0], traced[1] / traced[0], traced[2] / traced[0]
            given = f, kfac, {"position": one, "example": one}
        else:
            _, _, taps = differentiate(problem.params, x, problem.args[1], key=key)
            a, g = taps["0"].rows()
            # The mean over draws is one over draws · n examples.
            g = np.asarray(g).reshape(-1, *a.shape[1:-1], g.shape[-1])
            given = fr.of_rows(np.tile(a, (len(g) // len(a), 1, 1)), g)[:3]
        found.append(((*given, np.asarray(mean)), terms))
    return found


@pytest.mark.parametrize(
    ("fisher", "samples", "name"), [(*draws, name) for draws, names in DRAWS.items() for name in names]
)
def test_draws(fisher, samples, name, x64):
    """One draw is kept in coefficients of its rows; with several, products with Z(F) run the pull again, in matrices."""
    reference = fr.Reference(name, DECAY, fr.WHOLE)
    # update() is given count 0 twice; the weight of the past counts the updates in the state.
    for given, terms in after_two_batches(fisher, samples):
        found = [tuple(np.asarray(side) for side in term) for term in terms[name]]
        expected = reference.add(*given)
        assert len(found) == len(expected)
        assert_close(found, expected)


@pytest.mark.parametrize(
    "diagonal",
    [
        (False, True),
        *(pytest.param(d, marks=pytest.mark.slow) for d in ((False, False), (True, False), (True, True))),
    ],
)
@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.nightly), "stack"])
def test_both_forms_of_the_operator_agree(name, diagonal, x64):
    """Coefficients of the rows and matrices: forward, adjoint, inner products, further terms, deflated."""
    layers, generator = fr.layers(), np.random.default_rng(3)
    layer = layers[name]
    stacked = len(layer.stack_shape)
    a, g = (jnp.asarray(v) for v in fr.random_rows(0)[name])
    side = lambda i: layer.sides[i : i + 1] * (1 if diagonal[i] else 2)

    def symmetric(i):
        s = jnp.asarray(generator.normal(size=(*layer.stack_shape, *side(i))))
        return s if diagonal[i] else s + s.mT

    plus = [Term(symmetric(0), symmetric(1)) for _ in range(2)]
    rows = operators._in_coefficients(a[..., 0, :], g[..., 0, :], diagonal, 0.3, plus)
    pulled = Batch({name: GivenRows(layer, a, g)})
    matrices = operators._in_matrices(Source(layers, pulled, {}), layer, diagonal, 0.3, plus)
    v, w, z = (symmetric(1) for _ in range(3))

    def observe(operator):
        """Numbers and matrices that do not depend on how vectors are kept."""
        u, other = operator.first(v), operator.first(w)
        back = operator.adjoint(u)
        forth = operator.forward(back)
        again = operator.adjoint(forth)
        sides = [operator.to_input(u), operator.to_output(back), operator.to_input(forth)]
        return operator.dot_in(forth, other), operator.dot_out(back, again), sides

    def deflated(operator):
        u = operator.first(z)
        unit = operators.times(1 / jnp.sqrt(operator.dot_in(u, u)), u)
        return operators.without(operator, unit)

    def adjoint(form, own):
        """Both sides of ⟨x, F y⟩ = ⟨Fᵀ x, y⟩."""
        x, y = form.first(w), form.adjoint(form.first(v))
        return own.dot_in(x, own.forward(y)), own.dot_out(own.adjoint(x), y)

    @jax.jit
    def everything():
        found = []
        for change in (lambda operator: operator, deflated):
            forms = [change(form) for form in (rows, matrices)]
            pairs = [adjoint(form, own) for form, own in zip((rows, matrices), forms, strict=True)]
            found.append(([observe(own) for own in forms], pairs))
        return found

    for (found, expected), pairs in everything():
        assert_close(found, expected, 1e-11)
        for pair in pairs:
            assert_close(*pair, 1e-11)
        assert expected[0].shape == (2,) * stacked


class GivenRows(Rows):
    """The statistics of ā (*stack, n, t, d_in) and g (*stack, n, t, d_out) as they are."""

    def __init__(self, layer, a, g):
        n, t = a.shape[len(layer.stacked) :][:2]
        self.layer = dataclasses.replace(layer, examples=n, positions=t)
        assert not layer.bias  # ā is all of the input
        self.parts, self._scale = {"input": a, "output": g}, 1.0


class Batch:
    """The statistics of one draw as an estimator sees them, without a pull."""

    def __init__(self, own):
        self.own = own

    def reduce(self, function):
        return function(self.own)

    def both(self, inputs, outputs):
        return inputs(self.own), outputs(self.own)

    def rows(self, name):
        a, g = self.own[name].rows()
        return (a[..., 0, :], g[..., 0, :]) if a.shape[-2] == 1 else None


def test_gradient_factors_read_no_taps(x64):
    layers, factors = fr.layers(), kfe.factors.gradient(DECAY)
    state = factors.init([layers["stack"]], fr.WHOLE)
    generator = np.random.default_rng(0)
    references = [fr.Reference("gradient", DECAY, fr.WHOLE) for _ in range(2)]
    update = jax.jit(lambda state, v, step: factors.update(state, Source(layers, None, {"stack": v}), step))
    for step in range(3):
        v = generator.normal(size=layers["stack"].shape)
        state = update(state, v, step)
        ((left, right),) = factors.terms(state, layers)["stack"]
        for i, reference in enumerate(references):
            assert_close([(left[i], right[i])], reference.add(None, None, None, v[i]))


def iterate(factors, seeds, name="dense"):
    """The iterations that the estimator took for batches of these seeds, one after the other."""
    layers, found = fr.layers(), []
    layer = layers[name]
    state = factors.init([layer], fr.WHOLE)

    @jax.jit
    def update(state, a, g):
        return factors.update(state, Source(layers, Batch({name: GivenRows(layer, a, g)}), {}), 0)

    for seed in seeds:
        state = update(state, *fr.random_rows(seed)[name])
        found.append(int(state.iterations[name]))
    return found


@pytest.mark.parametrize(
    "name",
    quick("deflation", slow=["lanczos"], of=["kpsvd", "deflation", "kfac_corrected", "lanczos", "streaming"]),
)
def test_a_warm_start_takes_fewer_iterations(name, x64):
    options = {"subspace": 4, "tolerance": 1e-6, "max_restarts": 100}
    if name not in ("lanczos", "streaming"):
        options = {"tolerance": 1e-6, "max_iterations": 1000}
    # On the same batch: the average of one estimate with itself is where the iteration ended.
    cold, warm, again = iterate(kfe.factors.FACTORS[name](**options), [0, 0, 0])
    assert warm < cold and again <= warm


def test_iterations_end_at_the_limit(x64):
    make, limits = kfe.factors, {"tolerance": 0.0, "max_iterations": 3}
    assert iterate(make.kpsvd(**limits), [0]) == [3]
    assert iterate(make.deflation(**limits), [0]) == [6]  # three for each of two triples
    # A cycle after the first fills the subspace but for the two wanted vectors.
    assert iterate(make.lanczos(tolerance=0.0, subspace=5, max_restarts=2), [0]) == [5 + 2 * 3]
