"""A distribution of one's own, in one file."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.scipy.special import gammaln

import kfe_optax as kfe


@dataclasses.dataclass(frozen=True)
class NegativeBinomial(kfe.Distribution):
    """Counts of mean m = e^z and variance m + m²/r. F_R = m r/(m + r), elementwise."""

    r: float = 2.5
    event_ndim = 0

    def negative_log_likelihood(self, z, targets):
        binomial = gammaln(targets + self.r) - gammaln(self.r) - gammaln(targets + 1.0)
        return (
            (targets + self.r) * jnp.log1p(jnp.exp(z) / self.r) - targets * (z - jnp.log(self.r)) - binomial
        )

    def root_transpose(self, z, u):
        return u / jnp.sqrt(jnp.exp(-z) + 1 / self.r)
