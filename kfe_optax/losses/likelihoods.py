"""Losses that are −log p(y|z) of a distribution, which they register: those that Optax has not, and any of one's own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfe_optax._marks.registrations import Spec
from kfe_optax._statistics import tags
from kfe_optax.distributions import Distribution, HeteroscedasticGaussian, Poisson
from kfe_optax.distributions.base import check, check_values

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Num


@functools.cache
def _spec(name: str, distribution: Distribution) -> Spec:
    return Spec(name, distribution, distribution.negative_log_likelihood)


def negative_log_likelihood(
    z: Float[Array, " n *rest"], targets: Any, distribution: Distribution
) -> Float[Array, " n *elements"]:
    """−log p(y|z) of each event under a distribution, which it registers: a loss of your own (see `kfe.Distribution`).

    The weight of each event in the scalar loss, of either a mean, a sum or a mask, is read off the backward pass, as with the
    other functions of `kfe.losses`.

    Args:
      z: the outputs that parameterize the distribution, floating; the first axis is the batch, the last `event_ndim` an event.
      targets: y, as the distribution's own `negative_log_likelihood` takes it.
      distribution: one of `kfe.distributions`, or of your own.

    Returns:
      The loss of each event, the shape of `z` without its last `event_ndim` axes.

    Raises:
      TypeError: `distribution` is none, or is not compared by its fields; z is not floating.
      ValueError: what the distribution returns has another shape than its outputs.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> z, counts = jnp.zeros((2, 3)), jnp.ones((2, 3), int)
      >>> kfe.losses.negative_log_likelihood(z, counts, kfe.Poisson()).shape
      (2, 3)
    """
    return _registered("negative_log_likelihood", z, targets, distribution)


def poisson_nll_loss(
    log_rates: Float[Array, "*shape"], targets: Num[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """e^z − yz + log y!, −log p of counts y ~ Poisson(e^z); registers a `Poisson` for each element.

    PyTorch's `poisson_nll_loss`, which leaves log y! out (it has no gradient) or approximates it.

    Args:
      log_rates: z, any shape, floating; the first axis is the batch.
      targets: counts y ≥ 0 of the same shape, whole or not.

    Returns:
      The loss of each element, the shape of `log_rates`.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> kfe.losses.poisson_nll_loss(jnp.zeros(2), jnp.array([0, 3])).round(2)     # 1 and 1 + log 6
      Array([1.  , 2.79], dtype=float32)
    """
    log_rates = jnp.asarray(log_rates)
    _check_targets("poisson_nll_loss", log_rates, targets)
    return _registered("poisson_nll_loss", log_rates, targets, Poisson())


def gaussian_nll_loss(
    means: Float[Array, "*shape"], targets: Float[Array, "*shape"], *, log_variances: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """½((y − μ)²/σ² + log 2πσ²), −log p of y ~ N(μ, σ²); registers a `HeteroscedasticGaussian` of (μ, log σ²).

    PyTorch's `gaussian_nll_loss(full=True)`, but for the variance, which is given by its logarithm: that is unbounded, as a
    layer's outputs are. Of a variance in another form pass `jnp.log(variance)`; the Fisher of the parameters is the same.

    Args:
      means: μ, any shape, floating; the first axis is the batch.
      targets: y, of the same shape.
      log_variances: log σ², broadcastable to `means`.

    Returns:
      The loss of each element, the shape of `means`.

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> outputs, y = jnp.ones((4, 6)), jnp.ones((4, 3))
      >>> means, log_variances = jnp.split(outputs, 2, -1)
      >>> kfe.losses.gaussian_nll_loss(means, y, log_variances=log_variances).shape
      (4, 3)
    """
    means = jnp.asarray(means)
    _check_targets("gaussian_nll_loss", means, targets)
    shape = jnp.shape(log_variances)
    if len(shape) > means.ndim or jnp.broadcast_shapes(shape, means.shape) != means.shape:
        raise ValueError(
            f"gaussian_nll_loss takes a log variance for each mean: those of shape {shape} do not broadcast to {means.shape}."
        )
    # One array, so that both are parameters of one distribution and a draw is one of both.
    z = jnp.stack([means, jnp.broadcast_to(log_variances, means.shape)], -1)
    return _registered("gaussian_nll_loss", z, targets, HeteroscedasticGaussian())


def _check_targets(name: str, z: jax.Array, targets: Any) -> None:
    """An (n, 1) array against (n,) would broadcast to all pairs of examples."""
    if jnp.shape(targets) != z.shape:
        raise ValueError(
            f"{name} takes a target for each output: targets of shape {jnp.shape(targets)} do not fit outputs of shape "
            f"{z.shape}; reshape or broadcast them."
        )


def _registered(name: str, z: Any, targets: Any, distribution: Distribution) -> jax.Array:
    z = jnp.asarray(z)
    check(distribution, z)
    loss = distribution.negative_log_likelihood
    if tags.listener() is None:
        values = loss(z, targets)
        check_values(distribution, z, values)
        return values
    targets = jax.tree.map(jnp.asarray, targets)
    check_values(distribution, z, jax.eval_shape(loss, z, targets))
    return tags.mark_loss(_spec(name, distribution), z, (targets,))
