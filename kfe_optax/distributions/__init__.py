"""Predictive distributions p(y|z): one a file, one line in `DISTRIBUTIONS`, and all else goes through `Distribution`."""

from kfe_optax.distributions.base import Distribution as Distribution
from kfe_optax.distributions.bernoulli import Bernoulli as Bernoulli
from kfe_optax.distributions.categorical import Categorical as Categorical
from kfe_optax.distributions.gaussian import Gaussian as Gaussian
from kfe_optax.distributions.heteroscedastic_gaussian import (
    HeteroscedasticGaussian as HeteroscedasticGaussian,
)
from kfe_optax.distributions.poisson import Poisson as Poisson

# What the conformance suite runs over.
DISTRIBUTIONS: dict[str, type[Distribution]] = {
    distribution.__name__: distribution
    for distribution in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian, Poisson)
}
