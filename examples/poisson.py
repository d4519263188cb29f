"""Poisson's equation by a physics-informed network: −Δu = f on the unit square with u = 0 on its edge, u = sin πx sin πy.

The Laplacian is carried forward by hand. An array h (n, 4, width) holds the value, the two first derivatives and the
Laplacian of every hidden unit; a dense layer acts on the four alike and a nonlinearity mixes them. For K-FAC the four are
positions of one layer (Dangel, Müller & Zeinhofer 2024). The bias is the last row of a kernel, and the value alone meets it.

    python -m examples.poisson

The natural step, which the documentation recommends for equations, and `optax.lbfgs` stand beside. A line search compares
losses, so that the points of L-BFGS stay those of the first step, and a step of it costs several evaluations.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import kfe_optax as kfe
from examples import race

Params = dict[str, dict[str, jax.Array]]


class Points(NamedTuple):
    """Where the equation and the condition at the edge are asked for: (n, 2) each."""

    inside: jax.Array
    edge: jax.Array


def solution(points: jax.Array) -> jax.Array:
    """u (n,) at points (n, 2)."""
    return jnp.prod(jnp.sin(jnp.pi * points), -1)


def source(points: jax.Array) -> jax.Array:
    """f = −Δu (n,)."""
    return 2 * jnp.pi**2 * solution(points)


def init(key: jax.Array, widths: tuple[int, ...] = (2, 64, 64, 64, 1)) -> Params:
    """Kernels (d_in + 1, d_out) of Glorot's size, with zeros for the bias in the last row."""
    params = {}
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        kernel = jax.nn.initializers.glorot_normal()(jax.random.fold_in(key, i), (d_in, d_out))
        params[f"dense_{i}"] = {"kernel": jnp.concatenate([kernel, jnp.zeros((1, d_out))])}
    return params


def sample(key: jax.Array, inside: int = 512, edge: int = 512) -> Points:
    """Uniform points: a batch of a step."""
    keys = jax.random.split(key, 3)
    along = jax.random.uniform(keys[1], (edge,))
    side = jax.random.randint(keys[2], (edge,), 0, 4)
    across = (side % 2).astype(along.dtype)
    first, second = jnp.where(side < 2, along, across), jnp.where(side < 2, across, along)
    return Points(jax.random.uniform(keys[0], (inside, 2)), jnp.stack([first, second], -1))


def network(params: Params, h: jax.Array) -> jax.Array:
    """(n, p, 2) to (n, p): p = 1, the value alone, or p = 4, with the derivatives and the Laplacian."""
    unit = jnp.zeros((h.shape[1], 1)).at[0].set(1)
    for i, layer in enumerate(params.values()):
        x = jnp.concatenate([_tanh(h) if i else h, jnp.broadcast_to(unit, (*h.shape[:2], 1))], -1)
        h = kfe.tag_dense(x, x @ layer["kernel"], layer)
    return h[..., 0]


def _tanh(h: jax.Array) -> jax.Array:
    """σ(z), σ'(z) ∂z, σ'(z) Δz + σ''(z) |∇z|²."""
    value = jnp.tanh(h[:, :1])
    if h.shape[1] == 1:
        return value
    slope = 1 - value**2
    first, second = h[:, 1:-1], h[:, -1:]
    bent = -2 * value * slope * jnp.sum(first**2, 1, keepdims=True)
    return jnp.concatenate([value, slope * first, slope * second + bent], 1)


def loss_fn(params: Params, points: Points) -> jax.Array:
    """½ mean (Δu + f)² inside, and ½ mean u² on the edge."""
    inside = jnp.zeros((len(points.inside), 4, 2)).at[:, 0].set(points.inside).at[:, 1:3].set(jnp.eye(2))
    laplacian = network(params, inside)[:, -1]
    edge = network(params, points.edge[:, None])[:, 0]
    return (
        kfe.losses.l2_loss(laplacian, -source(points.inside)).mean()
        + kfe.losses.l2_loss(edge, jnp.zeros_like(edge)).mean()
    )


def error(params: Params, side: int = 51) -> jax.Array:
    """‖u_θ − u‖ / ‖u‖ on a grid of the square."""
    axis = jnp.linspace(0, 1, side)
    points = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    exact = solution(points)
    return jnp.linalg.norm(network(params, points[:, None])[:, 0] - exact) / jnp.linalg.norm(exact)


class Poisson(NamedTuple):
    """512 new points a step inside, and as many on the edge."""

    steps: int = 600
    unit: str = "relative error"

    def start(self, key: jax.Array) -> tuple[Params, tuple[()]]:
        return init(key), ()

    def arguments(
        self, params: Params, carried: tuple[()], key: jax.Array
    ) -> tuple[tuple[Points], tuple[()]]:
        return (sample(key),), carried

    def measure(self, params: Params, carried: tuple[()], loss: jax.Array) -> jax.Array:
        return error(params)

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "Poisson's equation", Poisson(), (3e-3, 1e-2, 3e-2)

if __name__ == "__main__":
    race.main("poisson", TITLE, PROBLEM, RATES, optimizers=race.PHYSICS)
