"""Each distribution with its density and its targets by other means; a distribution of one's own is a line as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import stats

import kfe_optax as kfe

from .negative_binomial import NegativeBinomial


class Case(NamedTuple):
    """
    Attributes:
      density: (z of one event, y) → log p(y|z).
      targets: z of one event → (nodes y, weights), over which means are exact: all targets, or a quadrature.
      size: the elements of one event, None where z of an event is a number.
    """

    distribution: kfe.Distribution
    density: Callable[[Any, Any], Any]
    targets: Callable[[Any], tuple[Any, Any]]
    size: int | None = None

    def outputs(self, *shape: int, seed: int = 0) -> jax.Array:
        """Values of z for events of this shape."""
        event = () if self.size is None else (self.size,)
        return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, *event)))

    def drawn(self, z: jax.Array, seed: int = 0) -> jax.Array:
        """A target for each event of z."""
        generator = np.random.default_rng(seed)

        events = z.reshape(-1, *([] if self.size is None else [self.size]))
        chosen = []
        for nodes, weights in zip(*map(np.asarray, jax.jit(jax.vmap(self.targets))(events)), strict=True):
            weights = np.asarray(weights, np.float64)
            chosen.append(nodes[generator.choice(len(nodes), p=weights / weights.sum())])
        shape = z.shape if self.size is None else z.shape[:-1]
        return jnp.asarray(np.stack(chosen).reshape(shape))


def _counts(mass, most=400):
    """Whole numbers with their probabilities; what is beyond `most` is less than rounding."""
    counts = jnp.arange(most)
    return lambda z: (counts, jnp.exp(mass(z, counts)))


def _noise(mean, deviation):
    """Gauss–Hermite quadrature: exact for polynomials in y up to degree 39."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    return lambda z: (mean(z) + deviation(z) * nodes, weights / np.sqrt(2 * np.pi))


def _poisson(z, y):
    return stats.poisson.logpmf(y, jnp.exp(z))


def _negative_binomial(z, y):
    return stats.nbinom.logpmf(y, 2.5, 2.5 / (2.5 + jnp.exp(z)))


CASES = {
    "Categorical": Case(
        kfe.Categorical(),
        lambda z, y: jnp.log(jnp.exp(z) / jnp.exp(z).sum())[y],
        lambda z: (jnp.arange(3), jax.nn.softmax(z)),
        3,
    ),
    "Bernoulli": Case(
        kfe.Bernoulli(),
        lambda z, y: stats.bernoulli.logpmf(y, jax.nn.sigmoid(z)),
        lambda z: (jnp.arange(2), jax.nn.sigmoid(jnp.stack([-z, z]))),
    ),
    "Gaussian": Case(
        kfe.Gaussian(0.3),
        lambda z, y: stats.norm.logpdf(y, z, jnp.sqrt(0.3)),
        _noise(lambda z: z, lambda z: np.sqrt(0.3)),
    ),
    "HeteroscedasticGaussian": Case(
        kfe.HeteroscedasticGaussian(),
        lambda z, y: stats.norm.logpdf(y, z[0], jnp.exp(z[1] / 2)),
        _noise(lambda z: z[0], lambda z: jnp.exp(z[1] / 2)),
        2,
    ),
    "Poisson": Case(kfe.Poisson(), _poisson, _counts(_poisson)),
    "NegativeBinomial": Case(NegativeBinomial(), _negative_binomial, _counts(_negative_binomial)),
}
