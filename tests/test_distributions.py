"""Every distribution: the loss is its density, B is a root of its Fisher, and the curvature of a network is JᵀF_R J."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from . import several_devices
from .dense import assert_close
from .distribution_cases import CASES
from .methods import quick

N, D, T = 4, 3, 2
OWN = kfe.losses.negative_log_likelihood
# The others differ from these by their formulas alone, which the first tests check.
SOME = quick("HeteroscedasticGaussian", "NegativeBinomial", of=CASES)


@pytest.fixture(params=CASES)
def case(request, x64):
    return CASES[request.param]


def test_the_registry_is_tested():
    assert {*CASES} >= {*kfe.distributions.DISTRIBUTIONS}
    for name, made in kfe.distributions.DISTRIBUTIONS.items():
        assert made is type(CASES[name].distribution)


def densities(case, z, targets):
    """log p of each event, by the case's own formula."""
    events = z.reshape(-1, *z.shape[z.ndim - case.distribution.event_ndim :])
    return jax.vmap(case.density)(events, targets.ravel()).reshape(targets.shape)


def fisher_of_event(case, z):
    """(E[∂ℓ], E[∂ℓ ∂ℓᵀ], E[∂²ℓ]) over the targets of one event, by the case's own formula."""
    nodes, weights = case.targets(z)

    def loss(flat, y):
        return -case.density(flat.reshape(z.shape), y)

    over = functools.partial(jax.vmap, in_axes=(None, 0))
    scores = over(jax.grad(loss))(z.ravel(), nodes)
    hessians = over(jax.hessian(loss))(z.ravel(), nodes)
    return (
        weights @ scores,
        jnp.einsum("k,ki,kj->ij", weights, scores, scores),
        jnp.einsum("k,kij->ij", weights, hessians),
    )


def block_diagonal(blocks):
    count, size, _ = blocks.shape
    return np.einsum("kij,kl->kilj", blocks, np.eye(count)).reshape(count * size, count * size)


def fisher_of_events(case, z):
    """The same for each event of z."""
    events = z.reshape(-1, *z.shape[z.ndim - case.distribution.event_ndim :])
    return tuple(map(np.asarray, jax.jit(jax.vmap(functools.partial(fisher_of_event, case)))(events)))


def test_the_loss_is_the_density(case):
    z = case.outputs(N, T)
    targets = case.drawn(z)
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda z, f=f: (f(z).sum(), f(z)), has_aux=True))(z)
        for f in (lambda z: OWN(z, targets, case.distribution), lambda z: -densities(case, z, targets))
    )
    assert_close(ours, theirs, 1e-12)


def test_the_root_is_that_of_the_fisher(case):
    """BᵀB = E[∂ℓ ∂ℓᵀ] = E[∂²ℓ], E[∂ℓ] = 0; events do not mix, and B is linear."""
    z = case.outputs(3, T)
    size = case.size or 1
    unit = np.eye(size).reshape(size, *z.shape[2:]) if case.size else np.ones(1)
    root = jax.jit(lambda u: case.distribution.root_transpose(z, u))
    columns = np.stack([root(np.broadcast_to(u, z.shape)) for u in unit])
    found = np.einsum("kei,kej->eij", *[columns.reshape(size, 3 * T, size)] * 2)
    mean, squares, hessian = fisher_of_events(case, z)
    np.testing.assert_array_less(np.abs(mean), 1e-10)
    assert_close(found, squares, 1e-10)
    assert_close(hessian, squares, 1e-10)
    u, v = (np.asarray(case.outputs(3, T, seed=seed)) for seed in (1, 2))
    assert_close(root(u - 2 * v), np.asarray(root(u)) - 2 * np.asarray(root(v)), 1e-12)


def test_draws(case):
    """Mean zero and covariance F_R within five standard errors, and independent between events."""
    z = case.outputs(T)
    draws = jax.jit(jax.vmap(lambda key: case.distribution.sample(key, z)))(
        jax.random.split(jax.random.key(0), 20000)
    ).reshape(20000, -1)
    draws = np.asarray(draws)
    expected = block_diagonal(fisher_of_events(case, z)[1])
    for sample, truth in ((draws, 0.0), (draws[:, :, None] * draws[:, None, :], expected)):
        standard = np.asarray(sample.std(0)) / np.sqrt(len(draws))
        assert (np.abs(sample.mean(0) - truth) <= 5 * standard + 1e-12).all()


def test_sampled_classes_follow_the_softmax():
    """An impossible class is never drawn in float32."""
    z = jnp.tile(jnp.array([0.0, -1e30, 0.0, -1e30]), (5000, 1))
    gradient = kfe.Categorical().sample(jax.random.key(0), z)
    labels = jnp.argmin(gradient, -1)
    assert set(np.unique(labels)) == {0, 2}


def problem(case, dtype=jnp.float64):
    """One dense layer whose outputs are two events an example; the examples have weights of their own, one of them zero."""
    generator = np.random.default_rng(3)
    width = T * (case.size or 1)
    kernel, x = generator.normal(size=(D, width)) / 2, generator.normal(size=(N, D))
    targets = case.drawn(reshaped(case, jnp.asarray(x @ kernel)))
    params, x = {"kernel": jnp.asarray(kernel, dtype)}, jnp.asarray(x, dtype)
    return params, x, targets, jnp.asarray([0.5 / N, 0.0, 1.5 / N, 1.0 / N], dtype)


def reshaped(case, z):
    return z.reshape(-1, T) if case.size is None else z.reshape(-1, T, case.size)


def loss_of(case, loss=OWN):
    def loss_fn(params, x, targets, weights):
        z = reshaped(case, x @ params["kernel"])
        return (weights[:, None] * loss(z, targets, case.distribution)).sum()

    return loss_fn


def expected_fisher(case, params, x, targets, weights):
    """Σ c JᵀF_R J over the row-major kernel, F_R being the mean over the targets."""
    del targets
    kernel = params["kernel"]
    outputs = lambda flat: reshaped(case, x @ flat.reshape(kernel.shape))
    z, jacobian = jax.jit(lambda flat: (outputs(flat), jax.jacobian(outputs)(flat)))(kernel.ravel())
    jacobian = np.asarray(jacobian).reshape(N, T, -1, kernel.size)
    blocks = fisher_of_events(case, z)[1].reshape(N, T, *[jacobian.shape[2]] * 2)
    return np.einsum("n,ntip,ntij,ntjq->pq", weights, jacobian, blocks, jacobian)


def of_rows(a, g):
    """(draws or columns, pq, pq): Σ over examples of the per-example gradients' squares."""
    a, g = np.asarray(a), np.asarray(g)
    gradients = np.einsum("nta,cntb->cnab", a, g).reshape(*g.shape[:2], -1)
    return np.einsum("cni,cnj->cij", gradients, gradients) / N


def test_the_curvature_of_a_network(case):
    """fisher="exact" and products with F against the dense oracle; the gradient is that of the densities."""
    given, loss_fn = problem(case), loss_of(case)
    layers = kfe.find_layers(loss_fn, *given)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)

    @jax.jit
    def read(given, v):
        *gradient, taps = differentiate(*given)
        rows = layers["kernel"].rows(taps["kernel"])
        moment = taps["kernel"].second_moment_in(None, None)
        return gradient, rows, moment, taps.fisher_products(taps.tangent({"kernel": v}))

    v = np.random.default_rng(0).normal(size=given[0]["kernel"].shape)
    gradient, rows, moment, product = read(given, v)
    plain = loss_of(case, lambda z, y, _: -densities(case, z, y))
    assert_close(gradient, [*jax.jit(jax.value_and_grad(plain))(*given)], 1e-12)
    expected = expected_fisher(case, *given)
    assert_close(of_rows(*rows).sum(0), expected, 1e-10)
    assert_close(moment.ravel(), np.diag(expected), 1e-10)
    assert_close(product, (v.ravel() @ expected @ v.ravel()).reshape(1, 1), 1e-10)


@pytest.mark.parametrize("case", SOME, indirect=True)
def test_sampled_converges_to_it(case):
    given, loss_fn, samples = problem(case), loss_of(case), 2000
    layers = kfe.find_layers(loss_fn, *given)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, num_samples=samples)
    taps = differentiate(*given, key=jax.random.key(0))[2]
    draws = of_rows(*layers["kernel"].rows(taps["kernel"]))
    expected = expected_fisher(case, *given)
    standard = draws.std(0) / np.sqrt(samples)
    assert (np.abs(draws.mean(0) - expected) <= 5 * standard + 1e-12).all()
    assert standard.max() < 0.1 * np.abs(expected).max()  # the bound says something


@pytest.mark.parametrize(
    ("case", "fisher"),
    [
        *(pytest.param(*param.values, "sampled", marks=param.marks) for param in SOME),
        pytest.param("HeteroscedasticGaussian", "exact", marks=pytest.mark.slow),
        *(
            pytest.param(name, "exact", marks=pytest.mark.nightly)
            for name in CASES
            if name != "HeteroscedasticGaussian"
        ),
    ],
    indirect=["case"],
)
def test_devices_and_microbatches_change_nothing(case, fisher):
    """Draws follow the global example."""
    given, loss_fn = problem(case), loss_of(case)
    params, *batch = given
    layers = kfe.find_layers(loss_fn, *given)
    tx = kfe.scale_by_kfac(layers, 0.1)
    arguments = (params, tx.init(params), tuple(batch), jax.random.key(1))

    def make(axis_name, k=1):
        # A sum over the batch is the mean over its parts, times how many they are.
        scaled = lambda params, x, targets, weights: loss_fn(params, x, targets, N * weights) / len(x)
        parts = {"microbatches": k, "fisher": fisher}
        return several_devices.train_step(
            scaled, kfe.find_layers(scaled, *given), tx, axis_name, size=0.1, **parts
        )

    expected = jax.jit(make(None))(*arguments)
    for step in (jax.jit(make(None, 2)), several_devices.divided("shard_map", 2, make)):
        assert several_devices.difference(step(*arguments)[0], expected[0], params) < 1e-10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SOME)
def test_half_precision(name, dtype):
    """Loss and gradient in the model's dtype, curvature as in float32."""
    case, found = CASES[name], {}
    for kind in (dtype, jnp.float32):
        given = problem(case, kind)
        layers = kfe.find_layers(loss_of(case), *given)

        @jax.jit
        def read(*given, layers=layers):
            loss, grads, taps = kfe.value_grad_and_taps(loss_of(case), layers, fisher="exact")(*given)
            return loss, grads, taps["kernel"].covariances()

        found[kind] = read(*given)
        assert found[kind][1]["kernel"].dtype == kind
    assert_close(found[dtype], found[jnp.float32], 0.05)
    assert {v.dtype for v in found[dtype][2]} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["HeteroscedasticGaussian", "Poisson"])
def test_what_is_not_finite_reaches_no_parameter(name):
    """Rates and variances that overflow either way: the step is left out, or finite, and the next one counts."""
    case = CASES[name]
    params, x, targets, weights = problem(case, jnp.float32)
    loss_fn = loss_of(case)
    layers = kfe.find_layers(loss_fn, params, x, targets, weights)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)
    tx = kfe.kfac(0.1, layers)

    @jax.jit
    def step(state, x):
        _, grads, taps = differentiate(params, x, targets, weights, key=jax.random.key(0))
        updates, state = tx.update(grads, state, params, taps=taps)
        return updates, state, jax.tree.map(jnp.isfinite, grads)["kernel"].all()

    left_out, state = 0, tx.init(params)
    for factor in (1e3, -1e3, np.nan, 30.0, -30.0):
        updates, state, finite = step(state, x.at[0].multiply(factor))
        assert np.isfinite(updates["kernel"]).all()
        assert finite or not np.any(updates["kernel"])
        left_out += not finite
        assert kfe.info(state).nonfinite == left_out
    assert left_out >= 2
    updates, state, finite = step(state, x)
    assert finite and np.any(updates["kernel"]) and np.isfinite(updates["kernel"]).all()
