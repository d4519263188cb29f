"""Poisson's equation by a physics-informed network: −Δu = f on the unit square with u = 0 on its edge, u = sin πx sin πy.

The Laplacian is a derivative inside the loss. For K-FAC its products are further uses of each layer, without the bias (Dangel,
Müller & Zeinhofer 2024).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kfe_optax as kfe

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
    """Kernels (d_in, d_out) of Glorot's size, and biases of zero."""
    params = {}
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        kernel = jax.nn.initializers.glorot_normal()(jax.random.fold_in(key, i), (d_in, d_out))
        params[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(d_out)}
    return params


def sample(key: jax.Array, inside: int = 512, edge: int = 512) -> Points:
    """Uniform points: a batch of a step."""
    keys = jax.random.split(key, 3)
    along = jax.random.uniform(keys[1], (edge,))
    side = jax.random.randint(keys[2], (edge,), 0, 4)
    across = (side % 2).astype(along.dtype)
    first, second = jnp.where(side < 2, along, across), jnp.where(side < 2, across, along)
    return Points(jax.random.uniform(keys[0], (inside, 2)), jnp.stack([first, second], -1))


def network(params: Params, points: jax.Array) -> jax.Array:
    """u (n,) at points (n, 2)."""
    h = points
    for i, layer in enumerate(params.values()):
        h = (jnp.tanh(h) if i else h) @ layer["kernel"] + layer["bias"]
    return h[:, 0]


def laplacian(params: Params, points: jax.Array) -> jax.Array:
    """Δu (n,): the second derivatives by forward mode over forward mode, along one axis after the other."""

    def along(direction: jax.Array) -> jax.Array:
        def slope(points: jax.Array) -> jax.Array:
            return jax.jvp(lambda points: network(params, points), (points,), (direction,))[1]

        return jax.jvp(slope, (points,), (direction,))[1]

    return sum(along(jnp.broadcast_to(axis, points.shape)) for axis in jnp.eye(2, dtype=points.dtype))


def loss_fn(params: Params, points: Points) -> jax.Array:
    """½ mean (Δu + f)² inside, and ½ mean u² on the edge."""
    edge = network(params, points.edge)
    return (
        kfe.losses.l2_loss(laplacian(params, points.inside), -source(points.inside)).mean()
        + kfe.losses.l2_loss(edge, jnp.zeros_like(edge)).mean()
    )


def error(params: Params, side: int = 51) -> jax.Array:
    """‖u_θ − u‖ / ‖u‖ on a grid of the square."""
    axis = jnp.linspace(0, 1, side)
    points = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    exact = solution(points)
    return jnp.linalg.norm(network(params, points) - exact) / jnp.linalg.norm(exact)


def find_layers(params: Params) -> Any:
    """The layers of the loss."""
    return kfe.find_layers(loss_fn, params, sample(jax.random.key(0)))
