"""The two-level correction against its dense definition in float64, to 1e-10."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax.contrib.two_level import two_level

from . import dense_optimizers, dense_two_level, problems
from .dense import assert_close

SIZES = (3, 4, 3, 2)
PERIODS = {"factor_update_period": 1, "inverse_update_period": 2, "initial_refreshes": 1, "decay": 0.7}
CASES = {
    "constant": ("constant", "factored", {}),
    "constant, exact": ("constant", "exact", {}),
    "outputs": ("outputs", "factored", {"groups": 3}),
    "outputs, exact": ("outputs", "exact", {"groups": 2}),
    "eigenvectors": ("eigenvectors", "factored", {"count": 3}),
    "eigenvectors, exact": ("eigenvectors", "exact", {"count": 2}),
    "residual": ("residual", "exact", {}),
}


def damping(step):
    """A schedule of the coarse level's λ, for both implementations."""
    return 0.3 / (1 + step)


def cheap(layers):
    """A fine level that needs no backward pass of its own, where it does not matter which it is."""
    return kfe.scale_by_kronecker(layers, 0.1, factors=kfe.factors.gradient())


@functools.cache
def problem_of_layers():
    problem = problems.make("plain", sizes=SIZES)
    return problem, problem.layers()


def oracle_of(name, **periods):
    space, form, number = CASES[name]
    return dense_two_level.Coarse(space, form, damping, *(number.values() or (1,)), **periods)


def transformation(name, layers, fine, **periods):
    space, form, number = CASES[name]
    return two_level(fine, layers, coarse=space, form=form, damping=damping, **number, **periods)


# With another fine level, the coarse one is the same; each combination costs a compilation.
QUICK = {
    ("constant", "kfac"),
    ("constant", "ekfac"),
    ("eigenvectors", "kfac"),
    ("residual", "kfac"),
}
COMBINATIONS = [
    pytest.param(name, fine, marks=[] if (name, fine) in QUICK else pytest.mark.nightly)
    for name in CASES
    for fine in ("kfac", "ekfac")
]


@pytest.mark.parametrize(("name", "fine"), COMBINATIONS)
def test_trajectory(name, fine, x64):
    """Three steps: fine update plus correction, with running averages, a stale basis in between and a λ that acts at once."""
    problem, layers = problem_of_layers()
    if fine == "kfac":
        inner = kfe.scale_by_kfac(layers, 0.1, **PERIODS)
        fine_oracle = dense_optimizers.Kfac(lambda step: 0.1, "factored", **PERIODS)
    else:
        periods = {"factor_update_period": 1, "basis_update_period": 2, "initial_refreshes": 1, "decay": 0.7}
        inner = kfe.scale_by_ekfac(layers, 0.1, scale="batch", scale_decay=0.8, **periods)
        fine_oracle = dense_optimizers.Ekfac(lambda step: 0.1, scale_decay=0.8, **periods)
    tx = transformation(name, layers, inner, **PERIODS)
    trajectory, state = problems.run(problem, layers, optax.chain(tx, optax.scale(-0.1)), 3)

    coarse = oracle_of(name, **PERIODS)
    weights, x = list(problem.weights), problem.args[0]
    shapes = [w.shape for w in weights]
    fine_oracle.start(len(weights))
    coarse.start()
    for step in range(3):
        found = dense_two_level.curvature(weights, x, problem.loss)
        new = fine_oracle.precondition(step, weights, x, problem.loss)
        added = coarse.correct(step, found, shapes, new)
        assert np.linalg.norm(added[0]) > 1e-3 * np.linalg.norm(new[0])  # there is something to compare
        weights = [w - 0.1 * (d + c) for w, d, c in zip(weights, new, added, strict=True)]
        assert_close(trajectory[step], [np.asarray(w) for w in weights])
    values = np.maximum(np.linalg.eigvalsh(coarse.matrix), 0)
    assert_close(np.sort(state[0].coarse.basis.values), values)


def test_coarse_fisher_of_one_batch(x64):
    """From per-example sums: Z F̃ Zᵀ of the cross-layer factors, and Z F Zᵀ, not only their inverses."""
    problem, layers = problem_of_layers()
    _, _, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    found = dense_two_level.curvature(problem.weights, problem.args[0], problem.loss)
    shapes = [w.shape for w in problem.weights]
    z = dense_two_level.stack([dense_two_level.groups(shape, 1) for shape in shapes], shapes)
    ones = jax.tree.map(jnp.ones_like, problem.params)
    for form, fisher in (
        ("factored", dense_two_level.kronecker(found.a, found.g, shapes)),
        ("exact", found.fisher),
    ):
        tx = two_level(cheap(layers), layers, form=form)
        _, state = jax.jit(tx.update)(ones, tx.init(problem.params), problem.params, taps=taps)
        averages = state.coarse.averages
        matrix = averages[0] * averages[1] if form == "factored" else averages[0]
        assert_close(matrix, z @ fisher @ z.T)


def deep(params, x, scan):
    """A network whose middle layers are alike, as a scan or one by one."""
    x = jnp.tanh(kfe.tag_dense(x, x @ params["first"]["kernel"], params["first"]))

    def block(x, layer):
        y = x @ layer["kernel"] + layer["bias"]
        return jnp.tanh(kfe.tag_dense(x, y, layer)), None

    if scan:
        x, _ = jax.lax.scan(block, x, params["blocks"])
    else:
        for layer in params["blocks"]:
            x, _ = block(x, layer)
    return kfe.tag_dense(x, x @ params["last"]["kernel"], params["last"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["eigenvectors", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("outputs", "residual"))]
)
def test_a_stack_is_its_layers(name, x64):
    """A coarse vector for each layer of a scan: the update of the same network written out."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 2)))
    blocks = [
        {"kernel": jnp.asarray(rng.normal(size=(3, 3))), "bias": jnp.asarray(rng.normal(size=3))}
        for _ in range(2)
    ]
    ends = {
        "first": {"kernel": jnp.asarray(rng.normal(size=(3, 3)))},
        "last": {"kernel": jnp.asarray(rng.normal(size=(3, 2)))},
    }
    stacked = lambda tree: {**tree, "blocks": jax.tree.map(lambda *v: jnp.stack(v), *tree["blocks"])}
    found = []
    for scan in (False, True):
        params = {**ends, "blocks": blocks}
        params = stacked(params) if scan else params
        loss_fn = lambda params, x, y, scan=scan: kfe.losses.l2_loss(deep(params, x, scan), y).sum(-1).mean()
        layers = kfe.find_layers(loss_fn, params, x, y)
        assert len(layers) == (3 if scan else 4)
        tx = transformation(name, layers, cheap(layers))
        _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, y)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
        found.append((updates, np.sort(state.coarse.basis.values)))
    assert_close(found[1], (stacked(found[0][0]), found[0][1]))


class Convolutions(nn.Module):
    """Positions 4 × 4, 2 × 2 and one."""

    @nn.compact
    def __call__(self, x, shifts):
        y = nn.Conv(3, (3, 3), name="wide")(x) + shifts["wide"]
        z = nn.Conv(2, (3, 3), (2, 2), padding=((0, 1), (0, 1)), use_bias=False, name="narrow")(jnp.tanh(y))
        z = z + shifts["narrow"]
        flat = jnp.tanh(z).reshape(len(x), -1)
        return nn.Dense(2, name="head")(flat) + shifts["head"], {
            "wide": x,
            "narrow": jnp.tanh(y),
            "head": flat,
        }


@functools.cache
def convolutions():
    """(loss, parameters, inputs, layers, {layer: α (n, *positions)}, {layer: γ (c, n, *positions)}), by explicit loops."""
    n, rng = 4, np.random.default_rng(0)
    model, x = Convolutions(), jnp.asarray(rng.normal(size=(4, 4, 4, 2)))
    shifts = {"wide": jnp.zeros((n, 4, 4, 3)), "narrow": jnp.zeros((n, 2, 2, 2)), "head": jnp.zeros((n, 2))}
    params = jax.eval_shape(model.init, jax.random.key(0), x, shifts)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), params)

    def loss_fn(params, x):
        return kfe.losses.l2_loss(model.apply({"params": params}, x, shifts)[0]).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    outputs = jax.jit(lambda s: model.apply({"params": params}, x, s))
    inputs = {name: np.asarray(v) for name, v in outputs(shifts)[1].items()}
    # ∂z_c of every example; the Hessian of ½‖z‖² is the identity.
    jacobian = jax.jit(jax.jacobian(lambda s: outputs(s)[0].sum(0)))(shifts)
    gamma = {name: np.asarray(j).sum(-1) for name, j in jacobian.items()}
    alpha = {"wide": np.zeros((n, 4, 4)), "narrow": np.zeros((n, 2, 2)), "head": inputs["head"].sum(1) + 1}
    for name, stride, before, bias in (("wide", 1, 1, 1), ("narrow", 2, 0, 0)):
        for i, row, column in np.ndindex(alpha[name].shape):
            total = float(bias)
            for r in range(3):
                for c in range(3):
                    at = row * stride + r - before, column * stride + c - before
                    if 0 <= at[0] < 4 and 0 <= at[1] < 4:
                        total += inputs[name][i, at[0], at[1]].sum()
            alpha[name][i, row, column] = total
    return loss_fn, params, x, layers, alpha, gamma


def at(values, row, column, common, axis):
    """The nearest of a layer's positions to one of the common grid."""
    if values.ndim == axis:
        return values
    size = values.shape[axis]
    row, column = (int((v + 0.5) * size / common) for v in (row, column))
    return values[(slice(None),) * axis + (row, column)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "common"), [("finest", 4), pytest.param("coarsest", 1, marks=pytest.mark.nightly)]
)
def test_convolutions(grid, common, x64):
    """All pairs by loops over examples and positions; on the finest grid a layer with itself is 1ᵀ(A⊗G)1."""
    loss_fn, params, x, layers, alpha, gamma = convolutions()
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
    fine = kfe.scale_by_kfac(layers, 0.1) if grid == "finest" else cheap(layers)
    tx = two_level(fine, layers, grid=grid)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    factors = state.method.factors
    sizes = {"wide": 16, "narrow": 4, "head": 1}
    expected = np.zeros((3, 3))
    for i, one in enumerate(layers):
        for j, other in enumerate(layers):
            product = []
            for values, axis in ((alpha, 1), (gamma, 2)):
                total = 0.0
                for row in range(common):
                    for column in range(common):
                        pair = [at(values[name], row, column, common, axis) for name in (one, other)]
                        total += (pair[0] * pair[1]).sum()
                product.append(total / 4)
            # A mean over the common positions; a sum over as many positions as the layers have in the geometric mean.
            positions = common**2
            mean_input = product[0] / positions
            sum_output = product[1] / positions * np.sqrt(sizes[one] * sizes[other])
            expected[i, j] = mean_input * sum_output
        if grid == "finest":
            assert_close(expected[i, i], factors.input[one].sum() * factors.output[one].sum())
    assert_close(state.coarse.averages[0] * state.coarse.averages[1], expected)
    sums = np.array([float(layers[name].to_matrix(grads).sum()) for name in layers])
    correction = np.linalg.solve(expected + 1e-2 * np.eye(3), sums)
    fine_updates, _ = jax.jit(fine.update)(grads, fine.init(params), params, taps=taps)
    for c, name in zip(correction, layers, strict=True):
        assert_close(layers[name].to_matrix(updates), layers[name].to_matrix(fine_updates) + c)


def test_convolutions_exactly(x64):
    """E[ζ ζᵀ] with ζ the sum of an example's gradient, from jacobians of its own outputs."""
    loss_fn, params, x, layers, _, _ = convolutions()
    _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
    zero = jax.tree.map(lambda v: v[:1], {"wide": jnp.zeros((1, 4, 4, 3)), "narrow": jnp.zeros((1, 2, 2, 2))})
    shifts = {**zero, "head": jnp.zeros((1, 2))}
    own = lambda p, image: Convolutions().apply({"params": p}, image[None], shifts)[0][0]
    jacobian = jax.jit(jax.vmap(jax.jacobian(own), (None, 0)))(params, x)
    zeta = np.stack(
        [
            sum(np.asarray(leaf).reshape(4, 2, -1).sum(-1) for leaf in jax.tree.leaves(jacobian[name]))
            for name in layers
        ]
    )
    expected = np.einsum("inc,jnc->ij", zeta, zeta) / 4
    tx = two_level(cheap(layers), layers, form="exact")
    _, state = jax.jit(lambda v, taps: tx.update(v, tx.init(v), v, taps=taps))(params, taps)
    assert_close(state.coarse.averages[0], expected)
