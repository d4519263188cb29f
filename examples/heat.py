"""The heat equation by a physics-informed network: u_t = u_xx for x and t in [0, 1] × [0, 1/10], with automatic
derivatives.

The network is a plain function of one point (x, t), without tags; u_t and u_xx are `jax.jvp` of it and `jax.jvp` of
`jax.jvp`, inside the loss. K-FAC takes the value and each derivative as positions of a layer. At first u = sin πx + ½
sin 3πx, on the edge u = 0, and

    u = exp(−π²t) sin πx + ½ exp(−9π²t) sin 3πx.

    python -m examples.heat

The natural step, which the documentation recommends for equations, and `optax.lbfgs` stand beside. A line search compares
losses, so that the points of L-BFGS stay those of the first step, and a step of it costs several evaluations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kfe_optax as kfe
from examples import race

Params = dict[str, dict[str, jax.Array]]
END = 0.1


class Points(NamedTuple):
    """Points (n, 2) with coordinates x and t: where the equation is asked for, and where the values are known."""

    inside: jax.Array
    known: jax.Array


def solution(point: jax.Array) -> jax.Array:
    """u at a point (2,)."""
    x, t = point
    waves = ((1.0, 1), (0.5, 3))
    return sum(a * jnp.exp(-((k * jnp.pi) ** 2) * t) * jnp.sin(k * jnp.pi * x) for a, k in waves)


def residual(function: Callable[[jax.Array], jax.Array], point: jax.Array) -> jax.Array:
    """u_t − u_xx at a point (2,), in forward mode."""
    along_x, along_t = jnp.eye(2)

    def slope(point: jax.Array) -> jax.Array:
        return jax.jvp(function, (point,), (along_x,))[1]

    _, u_xx = jax.jvp(slope, (point,), (along_x,))
    _, u_t = jax.jvp(function, (point,), (along_t,))
    return u_t - u_xx


def sample(key: jax.Array, inside: int = 512, known: int = 256) -> Points:
    """Uniform points inside; of the known ones, a half at t = 0 and a quarter on each side."""
    keys = jax.random.split(key, 3)
    extent = jnp.array([1.0, END])
    first = jax.random.uniform(keys[1], (known // 2, 2)) * extent.at[1].set(0)
    sides = jax.random.uniform(keys[2], (known // 2, 2)) * extent
    sides = sides.at[:, 0].set(jnp.arange(known // 2) % 2)
    return Points(jax.random.uniform(keys[0], (inside, 2)) * extent, jnp.concatenate([first, sides]))


def init(key: jax.Array, widths: tuple[int, ...] = (2, 64, 64, 64, 1)) -> Params:
    """Kernels of Glorot's size, and biases of zero."""
    glorot = jax.nn.initializers.glorot_normal()
    return {
        f"dense_{i}": {"kernel": glorot(jax.random.fold_in(key, i), shape), "bias": jnp.zeros(shape[1])}
        for i, shape in enumerate(itertools.pairwise(widths))
    }


def network(params: Params, point: jax.Array) -> jax.Array:
    """The value at a point (2,), with both coordinates brought to [−1, 1]."""
    h = 2 * point / jnp.array([1.0, END]) - 1
    for i, layer in enumerate(params.values()):
        h = (jnp.tanh(h) if i else h) @ layer["kernel"] + layer["bias"]
    return h[0]


def loss_fn(params: Params, points: Points) -> jax.Array:
    """½ mean (u_t − u_xx)² inside, and ½ mean (u_θ − u)² where u is known."""

    def function(point: jax.Array) -> jax.Array:
        return network(params, point)

    left = jax.vmap(lambda point: residual(function, point))(points.inside)
    values, exact = jax.vmap(function)(points.known), jax.vmap(solution)(points.known)
    return kfe.losses.l2_loss(left).mean() + kfe.losses.l2_loss(values, exact).mean()


def error(params: Params, side: int = 41) -> jax.Array:
    """‖u_θ − u‖ / ‖u‖ on a grid."""
    grid = jnp.meshgrid(jnp.linspace(0, 1, side), jnp.linspace(0, END, side))
    points = jnp.stack(grid, -1).reshape(-1, 2)
    exact = jax.vmap(solution)(points)
    values = jax.vmap(lambda point: network(params, point))(points)
    return jnp.linalg.norm(values - exact) / jnp.linalg.norm(exact)


class Heat(NamedTuple):
    """512 new points a step inside, and 256 where the values are known."""

    steps: int = 600
    unit: str = "relative error"

    def start(self, key: jax.Array) -> tuple[Params, tuple[()]]:
        return init(key), ()

    def arguments(self, params: Params, carried: Any, key: jax.Array) -> tuple[tuple[Points], Any]:
        return (sample(key),), carried

    def measure(self, params: Params, carried: Any, loss: jax.Array) -> jax.Array:
        return error(params)

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "The heat equation", Heat(), (3e-3, 1e-2, 3e-2)

if __name__ == "__main__":
    race.main("heat", TITLE, PROBLEM, RATES, optimizers=race.PHYSICS)
