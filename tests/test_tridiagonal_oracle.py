"""The block-tridiagonal inverse against explicit matrices in float64, and what its transformation does step by step."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._jax import chunks
from kfe_optax._layers.chains import find_chains
from kfe_optax._linalg.devices import ALONE
from kfe_optax._methods import chain_roots
from kfe_optax.factors import base, chained
from kfe_optax.factors.base import Source
from kfe_optax.factors.chained import ChainFactors

from . import dense, problems
from . import dense_tridiagonal as dt
from .dense import assert_close
from .models import cross_entropy

SIZES = (3, 4, 3, 2)
# One shape a side: compiling a factorization for each is what most tests take.
SQUARE = (3, 3, 3, 3)
PERIODS = {"factor_update_period": 1, "inverse_update_period": 1}


def inverse_times(roots, matrices, floor):
    """F̂⁻¹ V of one chain."""
    return chain_roots.apply({"": roots}, {"": matrices}, floor, ALONE)[""]


def damping(step):
    return 0.3 / (1 + step)


nightly = pytest.mark.nightly
FRAMEWORKS = ["linen", pytest.param("nnx", marks=nightly), pytest.param("plain", marks=nightly)]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_trajectory(framework, x64):
    """Five steps with periods, a decay and a damping schedule; the first is F̂⁻¹ times the gradient itself."""
    problem = problems.make(framework, sizes=SIZES)
    layers = problem.layers()
    options = {"factor_update_period": 2, "inverse_update_period": 3, "initial_refreshes": 2, "decay": 0.7}
    tx = optax.chain(
        kfe.scale_by_block_tridiagonal(layers, damping, **options), optax.scale_by_learning_rate(0.2)
    )
    trajectory, state = problems.run(problem, layers, tx, 5)
    assert int(kfe.info(state).failures) == 0

    weights, x = list(problem.weights), problem.args[0]
    a = g = inverse = None
    updates = 0
    for step in range(5):
        if step % 2 == 0 or step < 2:
            updates += 1
            rho = min(1 - 1 / updates, 0.7)
            new = dt.factors(weights, x, problem.loss)
            average = lambda old, new, rho=rho: rho * old + (1 - rho) * new
            a, g = new if a is None else jax.tree.map(average, (a, g), new)
        if step % 3 == 0 or step < 2:
            inverse = dt.inverse(*dt.damped(a, g, damping(step)))
        gradients = dense.gradients(weights, x, problem.loss)
        moves = dt.unflat(inverse @ dt.flat(gradients), gradients)
        weights = [w - 0.2 * move for w, move in zip(weights, moves, strict=True)]
        assert_close(trajectory[step], [np.asarray(w) for w in weights])


@functools.cache
def applied():
    """One compiled function: the factors of a chain, λ → F̂⁻¹ in full, by applying it to every unit vector."""

    def matrix(factors, strength):
        roots, failures = chain_roots.refresh(
            {"chain": factors}, {"chain": chain_roots.unit(factors)}, strength
        )
        shapes = [(len(a), len(g)) for a, g in zip(factors.input, factors.output, strict=True)]
        places = np.cumsum([0, *(m * n for m, n in shapes)])

        def column(unit):
            parts = [
                unit[start : start + m * n].reshape(m, n)
                for start, (m, n) in zip(places[:-1], shapes, strict=True)
            ]
            return jnp.concatenate([v.ravel() for v in inverse_times(roots["chain"], parts, 1e-9)])

        return jax.vmap(column)(jnp.eye(places[-1])).T, failures

    return jax.jit(matrix)


def chain_factors(a, g):
    steps = range(len(a) - 1)
    return ChainFactors(
        *(tuple(jnp.asarray(side[i][i]) for i in range(len(a))) for side in (a, g)),
        *(tuple(jnp.asarray(side[i][i + 1]) for i in steps) for side in (a, g)),
    )


def blocks(matrix, a, g):
    """{(i, j): block} of the tridiagonal part."""
    places = np.cumsum([0, *(len(a[i][i]) * len(g[i][i]) for i in range(len(a)))])
    part = lambda i: slice(places[i], places[i + 1])
    layers = range(len(a))
    return {(i, j): matrix[part(i), part(j)] for i in layers for j in layers if abs(i - j) <= 1}


def random_gram(generator, sides, rows):
    """All blocks of a covariance of random vectors with these sides."""
    samples = [generator.normal(size=(rows, d)) for d in sides]
    mixed = [s + samples[0][:, :1] for s in samples]
    return [[x.T @ y / rows for y in mixed] for x in mixed]


INS, OUTS = (4, 5, 4), (4, 3, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_inverse_is_that_of_the_tridiagonal_blocks(seed, x64):
    """Matrix-free and explicit forms agree, and F̂ has the damped A⊗G on the tridiagonal blocks; rank-deficient factors."""
    generator = np.random.default_rng(seed)
    # The joint covariances are singular: only the damping makes the inverse exist.
    a, g = random_gram(generator, INS, 4), random_gram(generator, OUTS, 3)
    found, failures = applied()(chain_factors(a, g), jnp.asarray(0.1))
    a, g = dt.damped(a, g, 0.1)
    assert_close(found, dt.inverse(a, g))
    assert int(failures) == 0
    assert_close(found, found.T, 1e-12)
    assert np.linalg.eigvalsh(found).min() > 0
    model, expected = blocks(np.linalg.inv(found), a, g), blocks(dt.whole(a, g), a, g)
    for place, block in expected.items():
        assert_close(model[place], block)


def markov(generator, sides):
    """All blocks of a covariance in which each vector depends on the next one alone: x_i = M_i x_{i+1} + noise."""
    layers = range(len(sides))
    root = lambda d: generator.normal(size=(d, d + 3)) / np.sqrt(d)
    maps = [generator.normal(size=pair) / 2 for pair in zip(sides[:-1], sides[1:], strict=True)]
    own = [root(d) for d in sides]
    own = [r @ r.T for r in own]
    for i in reversed(layers[:-1]):
        own[i] = own[i] + maps[i] @ own[i + 1] @ maps[i].T
    blocks = [[None] * len(sides) for _ in layers]
    for j in layers:
        blocks[j][j] = own[j]
        for i in reversed(range(j)):
            blocks[i][j] = maps[i] @ blocks[i + 1][j]
            blocks[j][i] = blocks[i][j].T
    return blocks


@pytest.mark.parametrize("seed", range(3))
def test_markov_chains_of_layers(seed, x64):
    """Where the ā and the g are Markov chains along the layers, F̂ is F̃, with the blocks of layers that are no neighbors."""
    generator = np.random.default_rng(seed)
    a, g = markov(generator, INS), markov(generator, OUTS)
    found, _ = applied()(chain_factors(a, g), jnp.asarray(1e-30))
    assert_close(np.linalg.inv(found), dt.whole(a, g), 1e-9)
    # The blocks in the corners are not small.
    corner = np.kron(a[0][2], g[0][2])
    assert np.linalg.norm(corner) > 0.01 * np.linalg.norm(np.kron(a[0][0], g[0][0]))


def test_deep_linear_networks(x64):
    """s₁ = s₂ = 1: Σ_i is singular, and the floor alone keeps its inverse finite."""
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(3, 3)) for _ in range(2)]
    x, h = generator.normal(size=(9, 3)), generator.normal(size=(9, 3))
    inputs, outputs = [x, x @ weights[0]], [h @ weights[1].T, h]
    gram = lambda rows: [[p.T @ q / 9 for q in rows] for p in rows]
    factors = chain_factors(gram(inputs), gram(outputs))
    roots, failures = jax.jit(
        lambda factors: chain_roots.refresh(
            {"chain": factors}, {"chain": chain_roots.unit(factors)}, jnp.asarray(1e-30)
        )
    )(factors)
    assert int(failures) == 0
    for side in roots["chain"].pencils[0]:
        assert_close(side.values, np.ones(3), 1e-8)
    v = jnp.asarray(generator.normal(size=(3, 3)))
    new = inverse_times(roots["chain"], [v, jnp.zeros_like(v)], 0.01)[0]
    expected = 100 * np.linalg.inv(factors.input[0]) @ v @ np.linalg.inv(factors.output[0])
    assert_close(new, expected, 1e-6)


@functools.cache
def square():
    """A Linen network of three like layers: problem, layers, gradients and exact taps, in float64."""
    problem = problems.make("linen", sizes=SQUARE)
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")
    _, grads, taps = differentiate(problem.params, *problem.args)
    return problem, layers, grads, taps


def moved(tx):
    """The update of the square network's matrices."""
    problem, layers, grads, taps = square()
    updates, _ = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    return [layer.to_matrix(updates) for layer in layers.values()]


@functools.cache
def by_kfac():
    return moved(kfe.scale_by_kfac(square()[1], 0.1))


def test_chains_of_one_are_kfac(x64):
    layers, expected = square()[1], by_kfac()
    found = moved(kfe.scale_by_block_tridiagonal(layers, 0.1, chains=[["dense_0", "dense_1"]]))
    assert_close(found[2], expected[2], 1e-14)
    assert min(dense.relative_error(found[i], expected[i]) for i in (0, 1)) > 1e-3


@pytest.mark.slow
def test_no_chain_at_all_is_kfac(x64):
    layers, expected = square()[1], by_kfac()
    assert_close(moved(kfe.scale_by_block_tridiagonal(layers, 0.1, chains=[])), expected, 1e-14)
    # Without the layer between, the others are chains of one.
    mask = {name: name != "dense_1" for name in layers}
    masked = moved(optax.masked(kfe.scale_by_block_tridiagonal(layers, 0.1), mask))
    assert_close([masked[0], masked[2]], [expected[0], expected[2]], 1e-14)


def batch_factors(layers, chains, grads, taps):
    """The factors of the one chain of a plan in one batch, and the names of the layers that are alone."""
    plan = find_chains(layers, chains, 8192)
    alone = {name: base.zero_term(layers[name], 8192) for name in plan.alone}
    gradients = {name: layer.to_matrix(grads) for name, layer in layers.items()}

    @jax.jit
    def estimated(taps):
        return chained.estimate(plan, Source(layers, taps.pulled(), gradients), alone)

    (factors,) = estimated(taps)[0].values()
    return factors, plan.alone


@pytest.mark.parametrize("fisher", ["sampled", pytest.param("exact", marks=nightly)])
def test_factors_of_one_draw(fisher, x64):
    """G_i,i+1 is formed within a sample or a column, not between two of them."""
    problem, layers, grads, taps = square()
    if fisher == "sampled":
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, num_samples=2)
        _, grads, taps = differentiate(problem.params, *problem.args, key=jax.random.key(0))
    factors, _ = batch_factors(layers, "whole", grads, taps)
    a, g = zip(*(taps[name].rows() for name in problem.names), strict=True)
    for i in range(2):
        assert_close(factors.input_next[i], jnp.einsum("nta,ntb->ab", a[i], a[i + 1]) / problems.EXAMPLES)
        pairs = jnp.einsum("knta,kntb->ab", g[i], g[i + 1]) / problems.EXAMPLES
        assert_close(factors.output_next[i], pairs / (2 if fisher == "sampled" else 1))


def sampled_taps(loss_fn, params, args, configure=lambda layers: layers):
    layers = configure(kfe.find_layers(loss_fn, params, *args))
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, *args, key=jax.random.key(0))
    return layers, grads, taps


def tokens_model(mask):
    """Two dense layers on tokens, a mean over the live ones, a dense layer."""

    def loss_fn(params, x, labels):
        with kfe.row_mask(mask):
            h = jnp.tanh(kfe.tag_dense(x, x @ params["a"]["kernel"], params["a"]))
            h = jnp.tanh(kfe.tag_dense(h, h @ params["b"]["kernel"], params["b"]))
        h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return cross_entropy(kfe.tag_dense(h, h @ params["c"]["kernel"], params["c"]), labels)

    return loss_fn


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_positions_are_paired_one_by_one(sharing, x64):
    """Masked positions count neither in A nor in G; with "reduce" the means and sums of an example are paired."""
    generator = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape))
    mask = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], float)
    params = {name: {"kernel": normal(3, 3)} for name in "abc"}
    args = (normal(3, 4, 3), jnp.array([0, 1, 2]))
    configure = lambda layers: layers.configure("?", sharing=sharing)
    layers, grads, taps = sampled_taps(tokens_model(mask), params, args, configure)
    # Means of positions pair with the one position of the last layer, single positions do not.
    factors, alone = batch_factors(layers, "whole" if sharing == "reduce" else "split", grads, taps)
    (a, g), (b, h), (c, _) = (taps[name].rows() for name in "abc")
    if sharing == "reduce":
        counts = mask.sum(1)[:, None]
        means = [v.sum(1) / counts for v in (a, b)] + [c.sum(1)]
        expected_in, expected_out = means[0].T @ means[1] / 3, g.sum(1).T @ h.sum(1) / 3
        assert_close(factors.input_next[1], means[1].T @ means[2] / 3)
    else:
        assert alone == ("c",)
        expected_in = jnp.einsum("nta,ntb->ab", a, b) / mask.sum()
        expected_out = jnp.einsum("nta,ntb->ab", g, h) / 3
    assert_close(factors.input_next[0], expected_in)
    assert_close(factors.output_next[0], expected_out)


def test_convolutions_of_one_resolution(x64, monkeypatch):
    """The rows of a convolution are its patches; they are formed a few examples at a time."""
    model = nn.Sequential([nn.Conv(2, (3,)), nn.tanh, nn.Conv(3, (1,)), nn.tanh, lambda x: x.mean(1)])
    x, labels = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 2))), jnp.array([0, 1, 2, 0, 1])
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda v: v.astype(jnp.float64), params)
    loss_fn = lambda params, x, labels: cross_entropy(model.apply({"params": params}, x), labels)
    layers, grads, taps = sampled_taps(loss_fn, params, (x, labels))
    (a, g), (b, h) = (taps[name].rows() for name in layers)
    sizes = []
    monkeypatch.setattr(chunks, "size", lambda *given: sizes.append(given) or 2)
    factors, _ = batch_factors(layers, "whole", grads, taps)
    assert_close(factors.input_next[0], jnp.einsum("nta,ntb->ab", a, b) / 20)
    assert_close(factors.output_next[0], jnp.einsum("nta,ntb->ab", g, h) / 5)
    assert (5, sum(layer.row_bytes for layer in layers.values())) in sizes


class Stack(nn.Module):
    """Dense and two blocks of two dense layers, in a scan or one after the other, Dense; or single layers and none before."""

    scanned: bool
    single: bool

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.tanh(nn.Dense(3, name="first")(x))
                return h if single else nn.tanh(nn.Dense(3, name="second")(h)), None

        single = self.single
        x = x if single else nn.tanh(nn.Dense(3, name="before")(x))
        if self.scanned:
            body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = body(name="stack")(x, None)
        else:
            for i in range(2):
                x, _ = Body(name=f"stack_{i}")(x, None)
        return nn.Dense(3, name="after")(x)


@pytest.mark.parametrize("single", [True, pytest.param(False, marks=nightly)])
def test_stacked_layers_are_those_of_the_unrolled_network(single, x64):
    generator = np.random.default_rng(0)
    x, labels = jnp.asarray(generator.normal(size=(8, 3))), jnp.asarray(generator.integers(0, 3, 8))
    shapes = Stack(True, single).init(jax.random.key(0), x)["params"]
    stacked = jax.tree.map(lambda v: jnp.asarray(generator.normal(size=v.shape)), shapes)

    def unrolled(tree):
        tree = dict(tree)
        blocks = tree.pop("stack")
        return tree | {f"stack_{i}": jax.tree.map(lambda v, i=i: v[i], blocks) for i in range(2)}

    found = []
    for scanned, params in ((True, stacked), (False, unrolled(stacked))):
        model = Stack(scanned, single)
        loss_fn = lambda params, x, labels, model=model: cross_entropy(
            model.apply({"params": params}, x), labels
        )
        layers = kfe.find_layers(loss_fn, params, x, labels)
        tx = kfe.scale_by_block_tridiagonal(layers, 0.1)
        _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(0))
        found.append(jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)[0])
    assert_close(unrolled(found[0]), found[1])


def test_two_devices_equal_one(x64):
    """pmap over the halves of a batch: both sides of all pairs are averaged over the devices."""
    problem = problems.make("plain", sizes=(2, 2, 2), examples=4)
    layers = problem.layers()
    tx = kfe.scale_by_block_tridiagonal(layers, 0.1)

    def step(params, x, y, key, axis_name=None):
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, axis_name=axis_name)
        _, grads, taps = differentiate(params, x, y, key=key)
        grads = grads if axis_name is None else jax.lax.pmean(grads, axis_name)
        updates, state = tx.update(grads, tx.init(params), params, taps=taps)
        return updates, state.method.factors

    key = jax.random.key(0)
    expected = jax.jit(step)(problem.params, *problem.args, key)
    halves = [v.reshape(2, -1, *v.shape[1:]) for v in problem.args]
    mapped = jax.pmap(
        functools.partial(step, axis_name="devices"),
        "devices",
        in_axes=(None, 0, 0, None),
        devices=jax.devices()[:2],
    )
    found = mapped(problem.params, *halves, key)
    for device in range(2):
        assert_close(jax.tree.map(lambda v, device=device: np.asarray(v)[device], found), expected, 1e-10)


def test_a_failed_factorization_keeps_the_whole_chain():
    """One compilation serves all steps; a retry forms the roots anew from the factors as they are."""
    problem = problems.make("linen", sizes=SQUARE)
    layers = problem.layers()
    options = {**PERIODS, "inverse_update_period": 100}
    tx = kfe.scale_by_block_tridiagonal(layers, 0.1, chains=[["dense_0", "dense_1"]], **options)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)
    update = jax.jit(tx.update)
    state = tx.init(problem.params)
    _, grads, taps = differentiate(problem.params, *problem.args, key=jax.random.key(0))
    first, good = update(grads, state, problem.params, taps=taps, request=kfe.Request(jnp.asarray(0.1)))
    good = good._replace(count=jnp.asarray(100, jnp.int32))
    # The root of a negative λ is not a number: both the chain and the layer that is alone (two sides) keep what they had.
    same, bad = update(grads, good, problem.params, taps=taps, request=kfe.Request(jnp.asarray(-1.0)))
    assert int(kfe.info(bad).failures) == 3
    assert_close(bad.method.roots, good.method.roots, 1e-12)
    assert_close(same, first, 1e-12)
    assert update._cache_size() == 1
    # A step on which no refresh is due.
    bad = bad._replace(count=jnp.asarray(150, jnp.int32))
    again, retried = update(
        grads, bad, problem.params, taps=taps, request=kfe.Request(jnp.asarray(0.4), first)
    )
    assert_close(retried.method.factors, bad.method.factors, 1e-12)
    other, _ = update(grads, state, problem.params, taps=taps, request=kfe.Request(jnp.asarray(0.4)))
    assert_close(again, other, 1e-4)
    assert dense.relative_error(again["dense_0"]["kernel"], first["dense_0"]["kernel"]) > 0.1


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3, name="stem")(x))
        h = nn.tanh(nn.Dense(4, name="up")(x))
        return nn.Dense(2, name="head")(x + nn.Dense(3, name="down")(h))


def test_options_and_messages():
    x, labels = jnp.ones((4, 3)), jnp.zeros(4, int)
    params = jax.jit(Residual().init)(jax.random.key(0), x)["params"]
    loss_fn = lambda params: cross_entropy(Residual().apply({"params": params}, x), labels)
    layers = kfe.find_layers(loss_fn, params)
    message = "layer 'head' stands after layer 'down' and is fed by down and stem.*chains='split'"
    with pytest.raises(ValueError, match=message):
        kfe.scale_by_block_tridiagonal(layers, 0.1)
    state = kfe.scale_by_block_tridiagonal(layers, 0.1, chains="split").init(params).method
    assert set(state.factors.chains) == {"up"} and set(state.factors.alone) == {"stem", "head"}
    assert [v.shape for v in state.roots.chains["up"].input] == [(4, 5)]
    with pytest.raises(ValueError, match=r"floor must lie in \(0, 1\]"):
        kfe.scale_by_block_tridiagonal(layers, 0.1, chains="split", floor=0.0)
    with pytest.raises(ValueError, match="inverse_update_period must be a positive whole number"):
        kfe.scale_by_block_tridiagonal(layers, 0.1, chains="split", inverse_update_period=0)
    with pytest.raises(ValueError, match="damping must be positive, not -1.0"):
        kfe.scale_by_block_tridiagonal(layers, -1.0, chains="split")
    with pytest.raises(TypeError, match="chains must be 'whole', 'split' or lists of layer names"):
        kfe.scale_by_block_tridiagonal(layers, 0.1, chains=5)
    with pytest.raises(TypeError, match="layers must be what kfe.find_layers"):
        kfe.scale_by_block_tridiagonal(params, 0.1)
