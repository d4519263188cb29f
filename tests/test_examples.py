"""The examples' mathematics: what is written by hand there against automatic derivatives and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from benchmarks import physics
from benchmarks.today.tasks import OPTIMIZERS
from examples import helium, poisson

from .dense import assert_close


def test_poisson_carries_the_laplacian(x64):
    params = jax.tree.map(lambda w: w + 0.1, poisson.init(jax.random.key(0), (2, 5, 4, 1)))
    points = poisson.sample(jax.random.key(1), 6, 3)
    h = jnp.zeros((6, 4, 2)).at[:, 0].set(points.inside).at[:, 1:3].set(jnp.eye(2))
    found = poisson.network(params, h)

    def value(point):
        return poisson.network(params, point[None, None])[0, 0]

    assert_close(found[:, 0], jax.vmap(value)(points.inside), 1e-12)
    assert_close(found[:, 1:3], jax.vmap(jax.grad(value))(points.inside), 1e-12)
    hessians = jax.vmap(jax.hessian(value))(points.inside)
    assert_close(found[:, 3], jnp.trace(hessians, axis1=1, axis2=2), 1e-12)
    assert list(kfe.find_layers(poisson.loss_fn, params, points)) == ["dense_0", "dense_1", "dense_2"]


def test_poisson_is_solved_by_its_solution(x64):
    points = poisson.sample(jax.random.key(1), 6, 8)
    hessians = jax.vmap(jax.hessian(lambda p: poisson.solution(p[None])[0]))(points.inside)
    assert_close(-jnp.trace(hessians, axis1=1, axis2=2), poisson.source(points.inside), 1e-12)
    np.testing.assert_allclose(poisson.solution(points.edge), 0, atol=1e-15)
    assert {0.0, 1.0} <= set(np.asarray(points.edge).ravel())


def test_helium(x64):
    """Exchange, the local energy by finite differences, and the gradient that its docstring promises."""
    params = helium.init(jax.random.key(0), width=6, terms=2)
    walkers = jax.jit(helium.start, static_argnums=2)(params, jax.random.key(1), 16)
    log_amplitude = jax.jit(helium.log_amplitude)
    log_psi = log_amplitude(params, walkers)
    assert_close(log_amplitude(params, walkers[:, ::-1]), log_psi, 1e-12)

    flat, step = np.asarray(walkers).reshape(16, 6), 1e-4
    slope, laplacian = np.zeros((16, 6)), np.zeros(16)
    for i, unit in enumerate(step * np.eye(6)):
        up, down = (log_amplitude(params, (flat + sign * unit).reshape(16, 2, 3)) for sign in (1, -1))
        slope[:, i], laplacian = (up - down) / (2 * step), laplacian + (up - 2 * log_psi + down) / step**2
    radius = np.linalg.norm(flat.reshape(16, 2, 3), axis=-1)
    potential = -2 * (1 / radius).sum(-1) + 1 / np.linalg.norm(flat[:, :3] - flat[:, 3:], axis=-1)
    energies = jax.jit(helium.local_energies)(params, walkers)
    assert_close(energies, -(laplacian + (slope**2).sum(-1)) / 2 + potential, 1e-5)

    assert list(kfe.find_layers(helium.loss_fn, params, walkers, energies)) == ["own", "both", "orbitals"]
    deviations = jnp.clip(energies, -3.5, -2.5)  # so narrow that nothing is drawn in
    jacobian = jax.jit(jax.jacobian(helium.log_amplitude))(params, walkers)
    deviations = deviations - deviations.mean()
    expected = jax.tree.map(lambda j: jnp.tensordot(deviations, j, 1) / 16, jacobian)
    assert_close(
        jax.jit(jax.grad(helium.loss_fn))(params, walkers, jnp.clip(energies, -3.5, -2.5)), expected, 1e-10
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "ekfac", "spectral_kfac"])
@pytest.mark.parametrize(("problem", "bound"), [("poisson", 0.25), ("helium", 0.02)])
def test_default_settings_converge(name, problem, bound):
    """At the recommended rate; where the scale of EKFAC is that of squared mean gradients it ends at an error of 2."""
    recipe = OPTIMIZERS[name]
    found, _ = physics.train(physics.PROBLEMS[problem]._replace(steps=150), recipe, recipe.unit, 0)
    assert np.abs(found[-1]) < bound < found[0]
