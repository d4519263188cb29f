"""An interaction network (Battaglia et al. 2016): the accelerations of bodies that attract each other, learned from
examples.

A graph has an edge from every body j to every other body i. A network of edges computes a message from both bodies'
features, each body adds up the messages that reach it, and a network of nodes computes its acceleration from the sum:

    message_ij = f(x_j − x_i, m_i, m_j),   acceleration_i = g(Σ_j message_ij, m_i).

The loss is the mean squared error. For K-FAC all edges of one graph are positions of the layers of f, and all its
bodies are positions of those of g, as pixels are those of a convolution: the first axis is that of the graphs, which
are the examples.

    python -m examples.graph
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfe_optax as kfe
from examples import race

Params = dict[str, dict[str, jax.Array]]


class Bodies(NamedTuple):
    """Places (n, bodies, 2), masses (n, bodies) and accelerations (n, bodies, 2)."""

    places: jax.Array
    masses: jax.Array
    accelerations: jax.Array


def edges(bodies: int) -> tuple[np.ndarray, np.ndarray]:
    """Senders and receivers of all ordered pairs."""
    senders, receivers = np.array(list(itertools.permutations(range(bodies), 2))).T
    return senders, receivers


def accelerations(places: jax.Array, masses: jax.Array, softening: float = 0.3) -> jax.Array:
    """a_i = Σ_j m_j (x_j − x_i) / (|x_j − x_i|² + ε²)^{3/2}."""
    between = places[:, None] - places[:, :, None]
    cubes = (jnp.sum(between**2, -1) + softening**2) ** 1.5
    return jnp.einsum("nijk,nj->nik", between / cubes[..., None], masses)


def sample(key: jax.Array, count: int, bodies: int = 5) -> Bodies:
    """Bodies at random in a square, with masses between ½ and 1½."""
    places = jax.random.uniform(jax.random.fold_in(key, 0), (count, bodies, 2), minval=-1, maxval=1)
    masses = jax.random.uniform(jax.random.fold_in(key, 1), (count, bodies), minval=0.5, maxval=1.5)
    return Bodies(places, masses, accelerations(places, masses))


def init(key: jax.Array, width: int = 64, message: int = 16) -> Params:
    """Both networks: kernels of He's size, and biases of zero."""
    shapes = {
        "edge_0": (4, width),
        "edge_1": (width, width),
        "edge_2": (width, message),
        "node_0": (message + 1, width),
        "node_1": (width, 2),
    }
    he = jax.nn.initializers.he_normal()
    return {
        name: {"kernel": he(jax.random.fold_in(key, i), shape), "bias": jnp.zeros(shape[1])}
        for i, (name, shape) in enumerate(shapes.items())
    }


def _network(params: Params, part: str, x: jax.Array) -> jax.Array:
    for i, layer in enumerate(layer for name, layer in params.items() if name.startswith(part)):
        x = (jax.nn.silu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def network(params: Params, places: jax.Array, masses: jax.Array) -> jax.Array:
    """Accelerations (n, bodies, 2)."""
    senders, receivers = edges(places.shape[1])
    between = places[:, senders] - places[:, receivers]
    pairs = jnp.stack([masses[:, senders], masses[:, receivers]], -1)
    messages = _network(params, "edge", jnp.concatenate([between, pairs], -1))
    received = jnp.zeros((*masses.shape, messages.shape[-1])).at[:, receivers].add(messages)
    return _network(params, "node", jnp.concatenate([received, masses[..., None]], -1))


def loss_fn(params: Params, bodies: Bodies) -> jax.Array:
    predicted = network(params, bodies.places, bodies.masses)
    return kfe.losses.squared_error(predicted, bodies.accelerations).mean()


class Graph(NamedTuple):
    """128 new graphs of five bodies a step."""

    steps: int = 600
    unit: str = "mean squared error of the accelerations"

    def start(self, key: jax.Array) -> tuple[Params, tuple[()]]:
        return init(key), ()

    def arguments(self, params: Params, carried: Any, key: jax.Array) -> tuple[tuple[Bodies], Any]:
        return (sample(key, 128),), carried

    def measure(self, params: Params, carried: Any, loss: jax.Array) -> jax.Array:
        return loss

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "An interaction network of five bodies", Graph(), (3e-2, 1e-1, 3e-1)

if __name__ == "__main__":
    race.main("graph", TITLE, PROBLEM, RATES)
