"""Preconditioning with Kronecker terms of rank 1 and 2 against dense float64 inverses, and what it guarantees."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kfe_optax as kfe
from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import ALONE
from kfe_optax._methods import roots
from kfe_optax.factors.base import Term

from . import dense_factors as df
from . import factor_rows as fr
from . import given_factors as gf
from .dense import assert_close, relative_error

RANK_1 = [("factored", ""), ("sqrt", ""), ("linear", ""), ("exact", "")]
RANK_2 = [(d, how) for d in ("factored", "sqrt", "linear") for how in ("clip", "absolute")]
FORMS = {1: RANK_1, 2: RANK_2}


def unit_gradients():
    """Every unit matrix of every layer, (units, …): a linear map on them is its matrix."""
    units = {}
    most = max(d_in * d_out for _, _, d_in, d_out in fr.SHAPES.values())
    for name, (stacked, _, d_in, d_out) in fr.SHAPES.items():
        unit = np.zeros((most, d_in, d_out))
        for k in range(d_in * d_out):
            unit[k].flat[k] = 1
        units[name] = {"kernel": np.stack([unit] * stacked, 1) if stacked else unit}
    return units


@functools.cache
def preconditioners(rank):
    """(table, λ, floor, gradients (units, …)) → {form: preconditioned gradients}, all forms compiled at once."""
    layers = fr.layers()

    @jax.jit
    def run(table, damping, floor, gradients):
        results, params = {}, fr.parameters()
        for form in FORMS[rank]:
            options = {"damping_type": form[0]}
            if rank == 2:
                options |= {"denominators": form[1], "floor": floor}
            tx = kfe.scale_by_kronecker(layers, damping, factors=gf.Given(table), **options)
            state = tx.update(jax.tree.map(lambda v: v[0], gradients), tx.init(params), params)[1]
            # The factorization is in the state; the later steps only apply it.
            results[form] = jax.lax.map(lambda v, tx=tx, s=state: tx.update(v, s, params)[0], gradients)
        return results

    return run


@pytest.mark.parametrize("size", [1, 128, 129, 300])
def test_inverse_by_halves(size, x64):
    """Below and above the size of a block; a matrix that is not positive definite is found out, wherever it fails."""
    rng = np.random.default_rng(size)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    matrix = (basis * np.geomspace(1, 1e-5, size)) @ basis.T
    broken = [matrix - 2 * np.eye(size) * (np.arange(size) == place) for place in (0, size - 1)]
    inverses, finite = jax.jit(kronecker.inverse)(
        jnp.asarray([matrix, *broken, np.full_like(matrix, np.nan)])
    )
    assert finite.tolist() == [True, False, False, False]
    assert_close(inverses[0], jnp.asarray(np.linalg.inv(matrix)), 1e-9)


@pytest.mark.parametrize("form", [roots.Inverses("factored"), roots.Pencils("factored", "clip", 0.1)])
def test_blocks_without_curvature_pass_their_gradient(form, x64):
    """Blocks 0 and 2 of three that share A lack G: V comes back through A alone; where all lack it, or A does, V itself."""
    a = jnp.asarray([[[2.0, 1.0], [1.0, 3.0]]])
    g = jnp.asarray([np.zeros((2, 2)), [[4.0, 0.0], [0.0, 5.0]], np.zeros((2, 2))])
    layers = {"layer": types.SimpleNamespace(stack_shape=(3,))}
    v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)))

    @jax.jit
    def compute(a, g):
        term, second = Term(a, g), Term(0.1 * a, 0.1 * g)
        terms = {"layer": (term, second) if isinstance(form, roots.Pencils) else (term,)}
        old = {"layer": form.init(term, 1)}
        new, failed = form.refresh(layers, terms, old, jnp.asarray(0.01), ALONE)
        return form.apply(v, new["layer"], jnp.asarray(0.01), 1), failed

    def preconditioned(a, g):
        found, failed = compute(a, g)
        assert int(failed) == 0
        return found

    some = preconditioned(a, g)
    assert relative_error(some[1], v[1]) > 0.1
    if isinstance(form, roots.Inverses):
        shift = jax.jit(damping_lib.factored, static_argnums=3)(a, g, jnp.asarray(0.01), 1)[0].reshape(())
        one_sided = np.linalg.solve(np.asarray(a[0]) + float(shift) * np.eye(2), v)
        assert_close(np.asarray(some)[[0, 2]], one_sided[[0, 2]], 1e-12)
    for zero in ((a, 0 * g), (0 * a, g)):
        assert_close(preconditioned(*zero), v, 1e-12)


def test_inverse_of_few_directions(x64):
    """Few examples and little damping, in float32: as near to the inverse as solving with the Cholesky factor."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((256, 40))
    matrix = rows @ rows.T
    matrix = np.float32(matrix / np.linalg.norm(matrix, 2) + np.eye(256) / 1e6)
    (found,), (finite,) = jax.jit(kronecker.inverse)(jnp.asarray(matrix)[None])
    exact = np.linalg.inv(matrix.astype(np.float64))
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), jnp.eye(256, dtype=jnp.float32))
    plain = np.linalg.norm(np.asarray(solved, np.float64) - exact)
    assert finite and plain < 0.1 * np.linalg.norm(exact)
    assert np.linalg.norm(np.asarray(found, np.float64) - exact) < 2 * plain


PROPERTY = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("rank", [1, 2])
@PROPERTY
@given(
    seed=st.integers(0, 2**31 - 1),
    damping=st.floats(1e-2, 10),
    floor=st.sampled_from([1e-3, 0.1, 0.5, 1.0]),
    spread=st.floats(0, 3),
)
def test_dense_inverse(rank, x64, seed, damping, floor, spread):
    """All forms of damping and denominators; positive definite whatever the second term; the stated floor holds."""
    table = gf.random_table(np.random.default_rng(seed), 1, rank, spread)
    units = unit_gradients()
    results = preconditioners(rank)(table, damping, floor, units)
    clipped = False
    for form, result in results.items():
        # (units, …) → (…, units) so that `members` finds the stack first.
        moved = {name: {"kernel": np.moveaxis(own["kernel"], 0, -1)} for name, own in result.items()}
        for key, terms, (columns,) in gf.members(table, 0, moved):
            d_in, d_out, _ = columns.shape
            size = d_in * d_out
            actual = columns[..., :size].reshape(size, size)
            how = {"denominators": form[1], "floor": floor} if rank == 2 else {}
            apply = lambda v, t=terms, f=form, h=how: df.precondition(t, v, damping, f[0], **h)
            expected = np.stack([apply(unit.reshape(d_in, d_out)).ravel() for unit in np.eye(size)], 1)
            assert_close(actual, expected)
            assert relative_error(actual, actual.T) < 1e-12, (form, key)
            assert np.linalg.eigvalsh((actual + actual.T) / 2)[0] > 0, (form, key)
            if rank == 2:
                first = np.kron(*df.damp(*terms[0], damping, form[0]))
                whole = first + np.kron(*terms[1])
                least = floor if form[1] == "clip" else 1
                root = np.linalg.cholesky(first)
                assert np.linalg.eigvalsh(root.T @ actual @ root)[-1] <= 1 / least * (1 + 1e-9)
                relative = np.linalg.eigvals(np.linalg.solve(first, whole)).real.min()
                clipped |= relative < floor
                if form[1] == "clip" and relative >= floor:
                    assert relative_error(actual, np.linalg.inv(whole)) < 1e-9
    assert rank == 1 or spread < 1 or clipped


N_IN, N_OUT, SIDES = 5, 4, (4, 3)


def loss_fn(params, a, g):
    """Two stacked layers with the rows a, g (2, n, …)."""

    def body(total, given):
        own, a, g = given
        return total + jnp.sum(kfe.tag_dense(a, a @ own["kernel"], own) * g) / len(a), None

    return jax.lax.scan(body, jnp.zeros(()), (params, a, g))[0]


def product_rows(seed, groups):
    """Rows of both layers in two groups, in each of them every ā with every g: F is a sum of one or two Kronecker products."""
    generator, layers = np.random.default_rng(seed), []
    for _ in range(2):
        parts = []
        for group in range(2):
            if group < groups:
                a = generator.normal(size=(N_IN, SIDES[0])) + 0.3 * group
                g = generator.normal(size=(N_OUT, SIDES[1])) * (1 + group)
            parts.append((np.repeat(a, N_OUT, 0), np.tile(g, (N_IN, 1))))
        layers.append([np.concatenate(rows) for rows in zip(*parts, strict=True)])
    a, g = (np.stack(side) for side in zip(*layers, strict=True))
    return a, g


PARAMS = {"kernel": np.ones((2, *SIDES))}


@functools.cache
def methods():
    """(state or None, rows, λ) → {factors: (update, state, terms)} of every factors estimator."""
    layers = kfe.find_layers(loss_fn, PARAMS, *product_rows(0, 2))
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    limits = {"tolerance": 1e-13, "max_iterations": 2000}
    subspace = {"tolerance": 1e-13, "max_restarts": 200}
    options = {"kfac": {}, "tkfac": {}, "gradient": {}, "lanczos": subspace, "streaming": subspace}
    estimators = {
        name: make(decay=0.6, **options.get(name, limits)) for name, make in kfe.factors.FACTORS.items()
    }

    def transforms(damping):
        for name, factors in estimators.items():
            form = {"floor": 1e-6} if factors.rank == 2 else {}
            yield (
                name,
                kfe.scale_by_kronecker(
                    layers,
                    damping,
                    factors=factors,
                    damping_type="linear",
                    factor_update_period=1,
                    inverse_update_period=2,
                    initial_refreshes=1,
                    **form,
                ),
            )

    @jax.jit
    def run(states, a, g, damping):
        _, grads, taps = differentiate(PARAMS, a, g)
        results = {}
        for name, tx in transforms(damping):
            new, state = tx.update(grads, states[name], PARAMS, taps=taps)
            (terms,) = estimators[name].terms(state.method.factors, layers).values()
            results[name] = new["kernel"], state, terms
        return results, grads["kernel"]

    return {name: tx.init(PARAMS) for name, tx in transforms(1.0)}, run


REPRODUCED = {
    1: ("kfac", "tkfac", "kpsvd", "deflation", "lanczos", "kfac_corrected", "streaming"),
    2: ("deflation", "lanczos", "kfac_corrected", "streaming"),
}


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_sums_of_products_are_reproduced_and_inverted(groups, x64):
    """Every fitting method finds F and F⁻¹. Of two groups K-FAC leaves w(1 − w)(A₁ − A₂)⊗(G₁ − G₂), one product more."""
    init, run = methods()
    a, g = product_rows(7, groups)
    results, v = run(init, a, g, 1e-13)
    for name in REPRODUCED[groups]:
        new, state, terms = results[name]
        assert int(kfe.info(state).failures) == 0
        for i in range(2):
            f = df.fisher_of_rows(a[i][:, None], g[i][:, None])
            assert np.linalg.cond(f) < 1e4
            found = df.matrix([(np.asarray(t.input[i]), np.asarray(t.output[i])) for t in terms])
            assert relative_error(found, f) < 1e-8, name
            assert relative_error(new[i].ravel(), np.linalg.solve(f, v[i].ravel())) < 1e-8, name


def test_two_groups_are_not_one_product(x64):
    """The check above can fail: no method of rank 1 passes it on two groups."""
    init, run = methods()
    a, g = product_rows(7, 2)
    results, _ = run(init, a, g, 1e-13)
    f = df.fisher_of_rows(a[0][:, None], g[0][:, None])
    for name in ("kfac", "tkfac", "kpsvd"):
        (term,) = results[name][2]
        assert relative_error(np.kron(term.input[0], term.output[0]), f) > 1e-2


def test_every_estimator_preconditions_with_its_terms(x64):
    """Random rows, averages and warm starts; the inverse of the last refresh stays until the next."""
    init, run = methods()
    states, frozen = dict(init), {}
    for step in range(4):
        generator = np.random.default_rng(step)
        count = len(product_rows(0, 2)[0][0])
        a, g = generator.normal(size=(2, count, SIDES[0])), generator.normal(size=(2, count, SIDES[1]))
        damping = 0.3 / (1 + step)
        results, v = run(states, a, g, damping)
        for name, (new, state, terms) in results.items():
            if step % 2 == 0:
                frozen[name] = (
                    damping,
                    [[(np.asarray(t.input[i]), np.asarray(t.output[i])) for t in terms] for i in range(2)],
                )
            used, own = frozen[name]
            for i in range(2):
                expected = df.precondition(own[i], np.asarray(v[i]), used, "linear", "clip", 1e-6)
                assert_close(new[i], expected)
            states[name] = state
            assert int(state.method.last_refresh) == step - step % 2
