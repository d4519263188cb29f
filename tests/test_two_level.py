"""`two_level` beyond the formula: its statistics on every kind of layer, several devices, and what it refuses."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kfe_optax as kfe
from kfe_optax._jax import chunks
from kfe_optax._linalg import kronecker
from kfe_optax.contrib.coarse import grids, level
from kfe_optax.contrib.two_level import scale_by_two_level_kfac, two_level

from . import problems
from .dense import assert_close

N, T = 4, 6


def cheap(layers):
    """A fine level that needs no backward pass of its own, where it does not matter which it is."""
    return kfe.scale_by_kronecker(layers, 0.1, factors=kfe.factors.gradient())


SPACES = {
    "constant": {},
    "outputs": {"coarse": "outputs", "groups": 2, "form": "exact"},
    "eigenvectors": {"coarse": "eigenvectors", "count": 2},
    "residual": {"coarse": "residual"},
}


class Many(nn.Module):
    """Tokens, a grouped convolution, a norm, heads, a layer that is used twice, a pooled head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="tokens")(tokens)
        x = nn.tanh(nn.Conv(4, (3,), feature_group_count=2, name="grouped")(x))
        x = nn.LayerNorm(name="norm")(x)
        x = nn.tanh(nn.DenseGeneral((2, 3), name="heads")(x))
        x = nn.DenseGeneral(3, axis=(-2, -1), name="joined")(x)
        x = nn.tanh(nn.Dense(3, name="pooled")(x))
        twice = nn.Dense(3, name="twice")
        return nn.Dense(2, name="head")(nn.tanh(twice(nn.tanh(twice(x.mean(1))))))


@functools.cache
def many():
    """(loss, parameters, arguments, layers): all kinds of statistics, one layer with its positions reduced."""
    rng = np.random.default_rng(0)
    model, tokens = Many(), jnp.asarray(rng.integers(0, 5, (N, T)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2), shapes)

    def loss_fn(params, tokens, y):
        return kfe.losses.l2_loss(model.apply({"params": params}, tokens), y).sum(-1).mean()

    args = (tokens, jnp.asarray(rng.normal(size=(N, 2))))
    layers = kfe.find_layers(loss_fn, params, *args)
    layers = layers.configure("heads", approximation="heads").configure("pooled", sharing="reduce")
    return loss_fn, params, args, layers


@pytest.fixture
def kinds(x64):
    """(layers, statistics of one draw, its per-example gradients and rows, random vectors) of all layers."""
    loss_fn, params, args, layers = many()
    live = jnp.asarray(np.random.default_rng(1).uniform(size=(N, T)) < 0.7).at[0].set(True)
    collect = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "BUDGET", 2000)  # a few examples at a time
        _, _, taps = collect(params, *args, row_mask=live)
        rng = np.random.default_rng(2)
        given = {}
        for name, layer in layers.items():
            p, q = (jnp.asarray(rng.normal(size=(*layer.stack_shape, 2, d))) for d in layer.sides)
            if layer.kind.per_example:
                p = jnp.ones_like(p)
            given[name] = p, q, jnp.asarray(rng.normal(size=layer.shape))
        weights = jnp.asarray(rng.normal(size=N))

        @jax.jit
        def ask(taps):
            statistics = taps.draw(0)
            found = {}
            for name, (p, q, matrix) in given.items():
                own = statistics[name]
                found[name] = {
                    "gradients": own.example_gradients(),
                    "project": own.project(p, q),
                    "inner": own.inner(matrix),
                    "weighted": own.weighted_gradient(weights),
                }
                if own.layer.has_rows:
                    found[name] |= {
                        "rows": own.rows(),
                        "inputs": own.project_inputs(p),
                        "outputs": own.project_outputs(q),
                        "factors": (own.input_factor(), own.output_factor()),
                    }
            return found

        return layers, given, np.asarray(weights), ask(taps)


def test_projections_of_every_kind(kinds):
    """ζ, ⟨Z, M_n⟩ and Σ w_n M_n of the per-example gradients M_n; α and γ have pᵀAp and qᵀGq as their squares."""
    layers, given, weights, answers = kinds
    assert not layers["twice"].has_rows and layers["tokens"].kind.statistics == "tokens"
    for name, layer in layers.items():
        p, q, matrix = map(np.asarray, given[name])
        found = answers[name]
        m = np.moveaxis(np.asarray(found["gradients"]), -3, 0)  # (n, *blocks, d_in, d_out)
        z = np.einsum("...vi,...vo->v...io", p, q)
        assert_close(found["project"], np.einsum("nx,vx->nv", m.reshape(N, -1), z.reshape(2, -1)))
        assert_close(found["inner"], (m * matrix).reshape(N, -1).sum(-1))
        assert_close(found["weighted"], np.einsum("n,n...->...", weights, m))
        if not layer.has_rows:
            continue
        # E[mean_t α α] and E[Σ_t γ γ] of a block are pᵀAp and qᵀGq, with A and G of masked and reduced positions.
        alpha, gamma = (np.asarray(found[side]) for side in ("inputs", "outputs"))
        squares = [np.einsum("ntvb,ntwb->bvw", v, v) for v in (alpha, gamma)]
        if layer.kind.per_example:
            g = np.einsum("bvo,bnto->ntv", q, found["rows"][1])
            assert_close(squares[1][0], np.einsum("ntv,ntw->vw", g, g) / N)
            assert_close(squares[0][0], np.ones((2, 2)))
            continue
        for vectors, factor, square in zip((p, q), found["factors"], squares, strict=True):
            if factor.ndim == len(layer.stack_shape) + 1:
                factor = factor[..., None] * np.eye(factor.shape[-1])
            expected = np.einsum("...vi,...ij,...wj->...vw", vectors, factor, vectors)
            assert_close(square, expected.reshape(-1, 2, 2))


def test_a_layer_without_rows_has_the_exact_form_alone(x64):
    _, params, _, layers = many()
    with pytest.raises(ValueError, match="'twice' uses its parameters more than once.*form='exact'"):
        two_level(kfe.scale_by_kfac(layers, 0.1), layers).init(params)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["eigenvectors", "residual"])
def test_every_kind_in_a_space_that_moves(name, x64):
    """Coarse vectors of all kinds are orthonormal, and the correction, positive semi-definite, goes along with the gradient."""
    loss_fn, params, args, layers = many()
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, *args, key=jax.random.key(0))
    fine = kfe.scale_by_kfac(layers, 0.1)
    tx = two_level(fine, layers, **{**SPACES[name], "form": "exact"})

    @jax.jit
    def both(grads, state, fine_state, taps):
        updates, state = tx.update(grads, state, params, taps=taps)
        alone, _ = fine.update(grads, fine_state, params, taps=taps)
        return jax.tree.map(jnp.subtract, updates, alone), state

    added, state = both(grads, tx.init(params), fine.init(params), taps)
    pairs = zip(jax.tree.leaves(added), jax.tree.leaves(grads), strict=True)
    assert float(sum(jnp.vdot(a, g) for a, g in pairs)) > 0
    assert int(state.coarse.failures) == 0
    for vectors in state.coarse.space.vectors.values():
        if name == "eigenvectors":
            p, q = (np.asarray(v) for v in vectors)
            z = np.einsum("...vi,...vo->v...io", p, q).reshape(p.shape[-2], -1)
        else:
            z = np.asarray(vectors.matrix).reshape(1, -1)
        assert_close(z @ z.T, np.eye(len(z)))


@pytest.mark.parametrize("choice", ["finest", "coarsest"])
def test_grids(choice):
    """Weights keep a layer's own sums; grids of different ranks are flattened, one position fits all."""
    maps, positions = grids.resamplings([(4, 6), (), (2, 3), (3, 6)], choice)
    assert positions == (24 if choice == "finest" else 1)
    for resample, size in zip(maps, (24, 1, 6, 18), strict=True):
        same = resample(jnp.ones((2, size)))
        assert same.shape == (2, positions)
        np.testing.assert_allclose(np.square(same).sum(-1), size, rtol=1e-6)
    maps, positions = grids.resamplings([(2, 2), (8,)], "finest")
    assert positions == 8
    np.testing.assert_allclose(maps[0](jnp.arange(4.0)), np.arange(4.0).repeat(2) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["constant", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("outputs", "residual"))]
)
def test_several_devices_equal_one(name, x64):
    """pmap over halves of a batch, and a sharded batch, on sampled targets: the update of one device."""
    problem = problems.make("plain")
    layers = problem.layers()
    tx = two_level(cheap(layers), layers, **SPACES[name])

    def train_step(params, x, y, axis_name=None):
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, axis_name=axis_name)
        _, grads, taps = differentiate(params, x, y, key=jax.random.key(0))
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        return tx.update(grads, tx.init(params), params, taps=taps)[0]

    jitted = jax.jit(train_step)
    one = jitted(problem.params, *problem.args)
    halves = [v.reshape(2, -1, *v.shape[1:]) for v in problem.args]
    mapped = jax.pmap(
        functools.partial(train_step, axis_name="devices"),
        "devices",
        in_axes=(None, 0, 0),
        devices=jax.devices()[:2],
    )
    two = mapped(problem.params, *halves)
    assert_close(jax.tree.map(lambda v: np.asarray(v)[1], two), one)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    sharded = jitted(
        jax.device_put(problem.params, everywhere), *(jax.device_put(v, split) for v in problem.args)
    )
    assert_close(sharded, one)


@functools.cache
def plain():
    problem = problems.make("plain")
    return problem, problem.layers()


def taps_of(problem, layers, key=0):
    return kfe.value_grad_and_taps(problem.loss_fn, layers)(
        problem.params, *problem.args, key=jax.random.key(key)
    )[1:]


@pytest.mark.parametrize("name", ["eigenvectors", pytest.param("residual", marks=pytest.mark.nightly)])
def test_one_compilation_and_nan(name):
    """Steps with and without refreshes: one trace, the same tree. A gradient that is not finite leaves all of it as it is."""
    problem, layers = plain()
    tx = two_level(cheap(layers), layers, **SPACES[name], initial_refreshes=1)
    state = tx.init(problem.params)
    described = jax.tree.map(lambda v: (v.shape, v.dtype, v.weak_type), state)
    jitted = jax.jit(tx.update)
    grads, taps = taps_of(problem, layers)
    for at in (0, 1, 10):
        state = state._replace(count=jnp.asarray(at, jnp.int32))
        _, state = jitted(grads, state, problem.params, taps=taps)
        assert jax.tree.map(lambda v: (v.shape, v.dtype, v.weak_type), state) == described
        assert (int(state.coarse.updates), int(state.coarse.last_refresh)) == ((2, 0) if at == 10 else (1, 0))
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    before = state._replace(count=jnp.asarray(100, jnp.int32))
    updates, after = jitted(bad, before, problem.params, taps=taps)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.coarse, before.coarse)
    assert (int(after.count), int(after.nonfinite.sum())) == (101, 1)
    # New vectors have a Fisher matrix of their own: the average starts anew.
    _, after = jitted(grads, before, problem.params, taps=taps)
    assert (int(after.coarse.updates), int(after.coarse.last_refresh)) == (1, 100)
    assert jitted._cache_size() == 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    "scale_by", [kfe.scale_by_tkfac, kfe.scale_by_kpsvd, kfe.scale_by_tekfac, kfe.scale_by_lanczos]
)
def test_any_fine_level(scale_by, x64):
    """The constant space's correction does not ask which the fine level is; seeds may be mapped over."""
    # With a softmax the sum of an output layer's gradient is zero, and so is its correction.
    problem = problems.make("plain", "gaussian")
    layers = problem.layers()
    fine, other = scale_by(layers, 0.1), cheap(layers)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)

    @jax.jit
    @jax.vmap
    def corrections(key):
        _, grads, taps = differentiate(problem.params, *problem.args, key=key)
        found = []
        for own in (fine, other):
            tx = two_level(own, layers)
            updates, _ = tx.update(grads, tx.init(problem.params), problem.params, taps=taps)
            alone, _ = own.update(grads, own.init(problem.params), problem.params, taps=taps)
            found.append(jax.tree.map(jnp.subtract, updates, alone))
        return found

    found = corrections(jax.random.split(jax.random.key(0), 2))
    assert_close(*found, 1e-9)
    assert np.abs(found[0][0]["kernel"][0] - found[0][0]["kernel"][1]).max() > 0


def test_a_failed_refresh_keeps_vectors_and_basis_together(monkeypatch):
    """New vectors are of no use with the eigenvectors of the old ones' matrix: all stay, and the failure is counted."""
    problem, layers = plain()
    grads, taps = taps_of(problem, layers)
    make = lambda: two_level(cheap(layers), layers, coarse="residual", initial_refreshes=2)
    tx = make()
    _, before = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    eigh = kronecker.raw_eigh
    monkeypatch.setattr(kronecker, "raw_eigh", lambda stack: eigh(stack * jnp.nan))
    other = taps_of(problem, layers, key=1)[1]
    doubled = jax.tree.map(lambda g: 2 * g, grads)
    updates, after = jax.jit(make().update)(doubled, before, problem.params, taps=other)
    assert (int(before.coarse.failures.sum()), int(after.coarse.failures.sum())) == (0, 1)
    same = lambda state: (state.coarse.space, state.coarse.averages, state.coarse.basis, state.coarse.updates)
    jax.tree.map(np.testing.assert_array_equal, same(after), same(before))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_the_same_step_once_more(x64):
    """A request goes to the fine level; the correction of the step stays."""
    problem = problems.make("plain")
    layers = problem.layers()
    fine = kfe.scale_by_kfac(layers, 0.1)
    tx = two_level(fine, layers)
    grads, taps = taps_of(problem, layers)

    @jax.jit
    def corrections(grads, state, fine_state, taps):
        first, state = tx.update(grads, state, problem.params, taps=taps, request=kfe.Request(0.2))
        alone, fine_state = fine.update(
            grads, fine_state, problem.params, taps=taps, request=kfe.Request(0.2)
        )
        again, after = tx.update(grads, state, problem.params, taps=taps, request=kfe.Request(0.5, first))
        other, _ = fine.update(grads, fine_state, problem.params, taps=taps, request=kfe.Request(0.5, alone))
        subtract = functools.partial(jax.tree.map, jnp.subtract)
        return subtract(first, alone), subtract(again, other), state, after

    added, once_more, state, after = corrections(
        grads, tx.init(problem.params), fine.init(problem.params), taps
    )
    # The last layer's correction is rounding: over a softmax's outputs the sum of g is zero.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), once_more, added)
    jax.tree.map(np.testing.assert_array_equal, after.coarse, state.coarse)
    assert int(after.count) == int(state.count) == 1


def test_a_layer_that_is_masked_or_without_curvature():
    """The coarse space is that of the layers that are there; one that the loss does not use gets no correction."""
    problem, layers = plain()
    grads, taps = taps_of(problem, layers)
    mask = [True, False]
    tx = optax.masked(two_level(cheap(layers), layers), mask)
    updates, state = jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps)
    assert state.inner_state.coarse.basis.values.shape == (1,)
    jax.tree.map(np.testing.assert_array_equal, updates[1], grads[1])

    def half(params, x, y):
        z = kfe.tag_dense(x, x @ params["idle"]["kernel"], params["idle"])
        return problem.loss_fn(params["net"], x, y) + 0 * kfe.losses.l2_loss(z).mean()

    params = {"idle": {"kernel": jnp.ones((3, 2))}, "net": problem.params}
    layers = kfe.find_layers(half, params, *problem.args)
    fine = cheap(layers)
    tx = two_level(fine, layers)
    _, grads, taps = kfe.value_grad_and_taps(half, layers)(params, *problem.args, key=jax.random.key(0))
    grads["idle"]["kernel"] = jnp.ones((3, 2))  # such as a penalty's, which no curvature knows
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    alone, _ = jax.jit(fine.update)(grads, fine.init(params), params)
    np.testing.assert_array_equal(updates["idle"]["kernel"], alone["idle"]["kernel"])
    assert np.abs(updates["net"][0]["kernel"] - alone["net"][0]["kernel"]).max() > 0


def test_two_level_kfac_is_two_level_around_kfac():
    problem, layers = plain()
    grads, taps = taps_of(problem, layers)
    periods = {"factor_update_period": 3, "inverse_update_period": 6, "decay": 0.5}
    found = []
    for tx in (
        scale_by_two_level_kfac(layers, 0.1, coarse="outputs", groups=2, coarse_damping=0.3, **periods),
        two_level(
            kfe.scale_by_kfac(layers, 0.1, **periods),
            layers,
            coarse="outputs",
            groups=2,
            damping=0.3,
            **periods,
        ),
    ):
        found.append(jax.jit(tx.update)(grads, tx.init(problem.params), problem.params, taps=taps))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"coarse": "all"}, ValueError, "coarse must be 'constant', 'outputs'"),
        ({"form": "pairs"}, ValueError, "form must be 'factored' or 'exact'"),
        ({"grid": "common"}, ValueError, "grid must be 'finest' or 'coarsest'"),
        ({"groups": 3}, ValueError, "groups belongs to coarse='outputs'"),
        ({"coarse": "outputs", "count": 3}, ValueError, "count belongs to coarse='eigenvectors'"),
        ({"coarse": "outputs", "groups": 0}, ValueError, "groups must be a positive whole number"),
        ({"coarse": "outputs", "groups": jnp.asarray(2)}, ValueError, "static_args=\\('groups',\\)"),
        ({"coarse": "residual", "form": "factored"}, ValueError, "choose form='exact'"),
        ({"damping": 0.0}, ValueError, "^damping must be positive, not 0.0"),
        ({"damping": -1.0}, ValueError, "^damping must be positive, not -1.0"),
        ({"decay": 1.5}, ValueError, "^decay .* must lie in .*, not be 1.5"),
        ({"factor_update_period": 0}, ValueError, "factor_update_period must be a positive whole number"),
        ({"inverse_update_period": 2.5}, ValueError, "inverse_update_period must be a positive whole number"),
    ],
)
def test_options_that_are_refused(options, error, message):
    _, layers = plain()
    with pytest.raises(error, match=message):
        two_level(kfe.scale_by_kfac(layers, 0.1), layers, **options)


def test_both_dampings_are_positive():
    _, layers = plain()
    with pytest.raises(ValueError, match="^damping must be positive"):
        scale_by_two_level_kfac(layers, 0.0)
    with pytest.raises(ValueError, match="^coarse_damping must be positive"):
        scale_by_two_level_kfac(layers, 0.1, coarse_damping=0.0)


def test_a_schedule_of_the_damping_may_end_at_zero():
    """Nothing is corrected before the first refresh; later, no curvature is taken for less than its rounding errors."""
    problem, layers = plain()
    fine = cheap(layers)
    tx = two_level(fine, layers, damping=optax.linear_schedule(1.0, 0.0, 1), initial_refreshes=0)
    grads, taps = taps_of(problem, layers)
    update = jax.jit(tx.update)
    state = tx.init(problem.params)._replace(count=jnp.asarray(1, jnp.int32))
    alone, _ = jax.jit(fine.update)(grads, state.fine, problem.params)
    updates, _ = update(grads, state, problem.params, taps=taps)
    jax.tree.map(np.testing.assert_array_equal, updates, alone)
    # One coarse vector a layer, and none of them mixed.
    top = 2.0
    basis = kronecker.Eigenbasis(jnp.array([0.0, top]), jnp.eye(2))
    state = state._replace(coarse=state.coarse._replace(basis=basis))
    updates, _ = update(grads, state, problem.params, taps=taps)
    for i, curvature in enumerate((level.ROUNDINGS * np.finfo(np.float32).eps * top, top)):
        total = sum(np.sum(leaf) for leaf in jax.tree.leaves(grads[i]))
        for leaf, one in zip(jax.tree.leaves(updates[i]), jax.tree.leaves(alone[i]), strict=True):
            assert_close(leaf, one + total / curvature, 1e-5)


def test_other_misuse():
    problem, layers = plain()
    fine = kfe.scale_by_kfac(layers, 0.1)
    with pytest.raises(TypeError, match="the layers come second"):
        two_level(layers, fine)
    with pytest.raises(TypeError, match="what kfe.find_layers.* returns, not a tuple"):
        two_level(fine, tuple(layers))
    with pytest.raises(TypeError, match="not a transformation with a ScaleByAdamState.*inside chains"):
        two_level(optax.scale_by_adam(), layers).init(problem.params)
    tx = two_level(fine, layers)
    with pytest.raises(ValueError, match="needs the taps of the step"):
        tx.update(problem.params, tx.init(problem.params), problem.params)
    wide = {"kernel": jnp.ones((2, 9000))}
    loss_fn = lambda p, x: kfe.losses.l2_loss(kfe.tag_dense(x, x @ p["kernel"], p)).mean()
    layers = kfe.find_layers(loss_fn, wide, jnp.ones((3, 2)))
    tx = two_level(kfe.scale_by_kfac(layers, 0.1), layers, coarse="outputs", groups=9000)
    with pytest.raises(ValueError, match="9000 rows, more than 8192"):
        jax.eval_shape(tx.init, wide)
