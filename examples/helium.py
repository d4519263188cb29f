"""The helium atom by variational Monte Carlo: the wave function whose energy is least, in atomic units.

Walkers (n, 2, 3), the places of the two electrons, are drawn from |ψ|² by Metropolis' rule. The gradient of the energy is
2 E[(E_L − E[E_L]) ∂ log|ψ|], with the local energy E_L = −½ (Δ log|ψ| + |∇ log|ψ||²) + V of each walker, and the natural
gradient's metric is E[∂ log|ψ| ∂ log|ψ|ᵀ]. Both are those of a regression: half the gradient is that of ½ (log|ψ| − t)² with the
target t = log|ψ| − (E_L − E[E_L]) held fixed, and the metric is its Gauss–Newton matrix. So the energies stand outside of what
is differentiated, and the loss's own value says nothing.

    python -m examples.helium
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

import kfe_optax as kfe
from examples import race

Params = dict[str, dict[str, jax.Array]]

ENERGY = -2.903724
"""The ground state's energy, without the motion of the nucleus, in hartree (Pekeris 1958)."""


def init(key: jax.Array, width: int = 32, terms: int = 4) -> Params:
    """A network on features of each electron, an exchange between the two, and `terms` products of orbitals."""
    shapes = {"own": (8, width), "both": (2 * width, width), "orbitals": (width, terms)}
    params = {}
    for i, (name, shape) in enumerate(shapes.items()):
        kernel = jax.nn.initializers.lecun_normal()(jax.random.fold_in(key, i), shape)
        params[name] = {"kernel": kernel, "bias": jnp.full(shape[1:], float(name == "orbitals"))}
    return params | {"envelope": {"exponents": jnp.ones(terms)}}


def _dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return kfe.tag_dense(x, x @ layer["kernel"] + layer["bias"], layer)


def log_amplitude(params: Params, walkers: jax.Array) -> jax.Array:
    """log|ψ| (n,) with ψ = Σ_k φ_k(1; 2) φ_k(2; 1), unchanged when the electrons are exchanged (their spins are opposite)."""
    between = walkers - walkers[:, ::-1]
    radius, distance = (jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (walkers, between))
    h = jnp.tanh(_dense(params["own"], jnp.concatenate([walkers, radius, between, distance], -1)))
    h = h + jnp.tanh(_dense(params["both"], jnp.concatenate([h, h[:, ::-1]], -1)))
    decay = jnp.exp(-jax.nn.softplus(params["envelope"]["exponents"]) * radius)
    return jnp.log(jnp.abs(jnp.prod(_dense(params["orbitals"], h) * decay, 1).sum(-1)))


def local_energies(params: Params, walkers: jax.Array) -> jax.Array:
    """E_L (n,): the kinetic energy, the attraction of the nucleus and the repulsion of the electrons."""

    def one(walker):
        def log_psi(flat):
            return log_amplitude(params, flat.reshape(1, 2, 3))[0]

        slope = jax.grad(log_psi)(walker.reshape(-1))
        laplacian = jnp.trace(jax.hessian(log_psi)(walker.reshape(-1)))
        attraction = -2 * jnp.sum(1 / jnp.linalg.norm(walker, axis=-1))
        return -(laplacian + slope @ slope) / 2 + attraction + 1 / jnp.linalg.norm(walker[0] - walker[1])

    return jax.vmap(one)(walkers)


def walk(
    params: Params, walkers: jax.Array, key: jax.Array, steps: int = 10, length: float = 0.4
) -> jax.Array:
    """Metropolis' rule: steps of this length, taken with probability min(1, |ψ_new/ψ|²)."""

    def step(carry, key):
        walkers, before = carry
        move, chance = jax.random.split(key)
        moved = walkers + length * jax.random.normal(move, walkers.shape)
        after = log_amplitude(params, moved)
        taken = jnp.log(jax.random.uniform(chance, before.shape)) < 2 * (after - before)
        return (jnp.where(taken[:, None, None], moved, walkers), jnp.where(taken, after, before)), None

    (walkers, _), _ = jax.lax.scan(
        step, (walkers, log_amplitude(params, walkers)), jax.random.split(key, steps)
    )
    return walkers


def start(params: Params, key: jax.Array, count: int = 512) -> jax.Array:
    """Walkers that have forgotten where they began."""
    walkers = jax.random.normal(jax.random.fold_in(key, 0), (count, 2, 3))
    return walk(params, walkers, jax.random.fold_in(key, 1), 200)


def loss_fn(params: Params, walkers: jax.Array, energies: jax.Array) -> jax.Array:
    """½ (log|ψ| − t)²; energies far from the others, of walkers near a node or a nucleus, are drawn in to five deviations."""
    middle = jnp.median(energies)
    spread = 5 * jnp.mean(jnp.abs(energies - middle))
    drawn = jnp.clip(energies, middle - spread, middle + spread)
    log_psi = log_amplitude(params, walkers)
    return kfe.losses.l2_loss(log_psi, jax.lax.stop_gradient(log_psi - (drawn - drawn.mean()))).mean()


class Walk(NamedTuple):
    """Walkers, and the local energies at these places."""

    walkers: jax.Array
    energies: jax.Array


class Helium(NamedTuple):
    """512 walkers, ten steps of each between two of the optimizer."""

    steps: int = 500
    unit: str = "energy above the exact one, hartree"

    def start(self, key: jax.Array) -> tuple[Params, Walk]:
        params = init(key)
        walkers = start(params, jax.random.fold_in(key, 1))
        return params, Walk(walkers, local_energies(params, walkers))

    def arguments(self, params: Params, carried: Walk, key: jax.Array) -> tuple[Walk, Walk]:
        walkers = walk(params, carried.walkers, key)
        carried = Walk(walkers, local_energies(params, walkers))
        return carried, carried

    def measure(self, params: Params, carried: Walk, loss: jax.Array) -> jax.Array:
        return carried.energies.mean() - ENERGY

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "The helium atom", Helium(), (1e-3, 3e-3, 1e-2)

if __name__ == "__main__":
    race.main("helium", TITLE, PROBLEM, RATES)
