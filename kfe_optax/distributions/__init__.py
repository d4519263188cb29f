"""Predictive distributions p(y|z): one a file, one line in `DISTRIBUTIONS`, and all else goes through `Distribution`."""

from kfe_optax.distributions.base import Distribution
from kfe_optax.distributions.bernoulli import Bernoulli
from kfe_optax.distributions.categorical import Categorical
from kfe_optax.distributions.gaussian import Gaussian
from kfe_optax.distributions.heteroscedastic_gaussian import HeteroscedasticGaussian
from kfe_optax.distributions.poisson import Poisson

__all__ = [
    "DISTRIBUTIONS",
    "Bernoulli",
    "Categorical",
    "Distribution",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Poisson",
]

# What the conformance suite runs over.
DISTRIBUTIONS: dict[str, type[Distribution]] = {
    distribution.__name__: distribution
    for distribution in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian, Poisson)
}
