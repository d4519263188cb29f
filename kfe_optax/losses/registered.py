"""Drop-in `optax.losses` that also say which distribution the model predicts.

Outside `find_layers` and `value_grad_and_taps` each function is its Optax namesake. Inside, the weight of each element in the
scalar loss (a mean, a sum, a mask, 1/pixels, several heads) is read off the backward pass, so that the Fisher is the
Gauss–Newton matrix of the scalar loss as written. No convention is asked of the user.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from kfe_optax._marks.registrations import Spec
from kfe_optax._statistics import tags
from kfe_optax.distributions import Bernoulli, Categorical, Distribution, Gaussian
from kfe_optax.distributions.base import check

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def _integer_labels(z, labels, where):
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, labels, where=where)


def _policy_gradient(z, actions, advantages):
    return advantages * _integer_labels(z, actions, None)


def _soft_labels(z, labels, where):
    return optax.losses.softmax_cross_entropy(z, labels, where=where)


def _label_mass(z, labels, where):
    del z
    return jnp.sum(labels, -1, where=where)


def _live(z, labels, where):
    """Events without a single admitted class have loss zero."""
    del labels
    return jnp.ones(z.shape[:-1]) if where is None else jnp.any(where, -1)


def _admitted(z, labels, where):
    """Logits without mass on excluded classes; the finite value keeps 0·∞ out of the distribution's arithmetic."""
    del labels
    return z if where is None else jnp.where(where, z, jnp.finfo(z.dtype).min / 2)


_INTEGER = Spec("softmax_cross_entropy_with_integer_labels", Categorical(), _integer_labels, _live, _admitted)
_SOFT = Spec("softmax_cross_entropy", Categorical(), _soft_labels, _label_mass, _admitted, signed=True)
_SIGMOID = Spec("sigmoid_binary_cross_entropy", Bernoulli(), optax.losses.sigmoid_binary_cross_entropy)
_SQUARED = Spec("squared_error", Gaussian(0.5), optax.losses.squared_error)
_L2 = Spec("l2_loss", Gaussian(), optax.losses.l2_loss)
_POLICY = Spec("policy_gradient_loss", Categorical(), _policy_gradient)


def _classes_last(z, axis):
    """Moves the class axes to the end and joins them."""
    axes = tuple(range(z.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    axes = tuple(a % z.ndim for a in axes)
    z = jnp.moveaxis(z, axes, range(z.ndim - len(axes), z.ndim))
    return z.reshape(*z.shape[: z.ndim - len(axes)], math.prod(z.shape[z.ndim - len(axes) :]))


def softmax_cross_entropy(logits, labels, axis=-1, where=None):
    """`optax.losses.softmax_cross_entropy`; registers a `Categorical` over the class axes.

    Labels that sum to m instead of one scale the event's Gauss–Newton matrix by m.

    Args:
      logits: (..., C) floating.
      labels: (..., C) class probabilities.
      axis: the class axis or axes.
      where: elements to include.

    Returns:
      The loss of each event, the shape of `logits` without the class axes.
    """
    if tags.listener() is None:
        return optax.losses.softmax_cross_entropy(logits, labels, axis=axis, where=where)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if where is not None:
        if where.ndim != logits.ndim:
            where = jnp.expand_dims(where, axis)
        where = _classes_last(jnp.broadcast_to(where, logits.shape), axis)
    labels = jnp.broadcast_to(labels, logits.shape)
    return _register(_SOFT, _classes_last(logits, axis), (_classes_last(labels, axis), where))


def softmax_cross_entropy_with_integer_labels(logits, labels, axis=-1, where=None):
    """`optax.losses.softmax_cross_entropy_with_integer_labels`; registers a `Categorical` over the class axes.

    Args:
      logits: (..., C) floating.
      labels: (...) integers in [0, C).
      axis: the class axis or axes.
      where: elements to include.

    Returns:
      The loss of each event, (...).

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> kfe.losses.softmax_cross_entropy_with_integer_labels(jnp.zeros((2, 4)), jnp.array([0, 3])).shape
      (2,)
    """
    if tags.listener() is None:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis, where=where)
    logits = jnp.asarray(logits)
    if where is not None:
        where = _classes_last(jnp.broadcast_to(where, logits.shape), axis)
    return _register(_INTEGER, _classes_last(logits, axis), (jnp.asarray(labels), where))


def sigmoid_binary_cross_entropy(logits, labels):
    """`optax.losses.sigmoid_binary_cross_entropy`; registers a `Bernoulli` for each element.

    Args:
      logits: any shape, floating; the first axis is the batch.
      labels: broadcastable to `logits`.

    Returns:
      The loss of each element, the shape of `logits`.
    """
    if tags.listener() is None:
        return optax.losses.sigmoid_binary_cross_entropy(logits, labels)
    logits = jnp.asarray(logits)
    return _register(_SIGMOID, logits, (jnp.broadcast_to(labels, logits.shape),))


def squared_error(predictions, targets=None):
    """`optax.losses.squared_error`, (z − y)²; registers `Gaussian(variance=1/2)`, whose −log p it is.

    Args:
      predictions: any shape, floating; the first axis is the batch.
      targets: of the same shape; zeros when None.

    Returns:
      The squared differences, elementwise.
    """
    if tags.listener() is None:
        return optax.losses.squared_error(predictions, targets)
    return _register(_SQUARED, *_regression(predictions, targets))


def l2_loss(predictions, targets=None):
    """`optax.losses.l2_loss`, ½(z − y)²; registers `Gaussian(variance=1)`.

    Args:
      predictions: any shape, floating; the first axis is the batch.
      targets: of the same shape; zeros when None.

    Returns:
      Half the squared differences, elementwise.
    """
    if tags.listener() is None:
        return optax.losses.l2_loss(predictions, targets)
    return _register(_L2, *_regression(predictions, targets))


def _regression(predictions, targets):
    predictions = jnp.asarray(predictions)
    optax.losses.squared_error(predictions, targets)  # Optax's own checks of dtype and shapes
    return predictions, (jnp.zeros_like(predictions) if targets is None else jnp.asarray(targets),)


def policy_gradient_loss(logits, actions, advantages):
    """−advantage · log π(action), π = softmax(logits); registers `Categorical` with the weight of the product, 1/n in a mean.

    An advantage has either sign, and minus a Fisher matrix is none: the curvature of a policy gradient is that of the policy,
    F = E_s E_{a~π}[∇log π(a|s) ∇log π(a|s)ᵀ] under `fisher="sampled"` or `"exact"` (the natural policy gradient, Kakade
    2001; Wu et al. 2017). For a policy over other actions register its outputs with `register_output`.

    Args:
      logits: (..., C) floating.
      actions: (...) integers in [0, C).
      advantages: (...), constants: no derivative passes through them.

    Returns:
      The loss of each event, (...).

    Raises:
      ValueError: actions or advantages are not one an event.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> kfe.losses.policy_gradient_loss(jnp.zeros((2, 4)), jnp.array([0, 3]), jnp.array([1.0, -0.5])).shape
      (2,)
    """
    logits, advantages = jnp.asarray(logits), jax.lax.stop_gradient(advantages)
    if jnp.shape(actions) != logits.shape[:-1] or jnp.shape(advantages) != logits.shape[:-1]:
        raise ValueError(
            f"policy_gradient_loss takes an action and an advantage for each event: logits {logits.shape} need both of shape "
            f"{logits.shape[:-1]}, not {jnp.shape(actions)} and {jnp.shape(advantages)}."
        )
    if tags.listener() is None:
        return _policy_gradient(logits, actions, advantages)
    return _register(_POLICY, logits, (jnp.asarray(actions), jnp.asarray(advantages)))


@functools.cache
def _output_spec(distribution: Distribution) -> Spec:
    return Spec("register_output", distribution, None)


def register_output(
    z: Float[Array, " n *rest"], distribution: Distribution, weights: Float[Array, "*elements"] | None = None
) -> Float[Array, " n *rest"]:
    """Says that the loss is Σᵢ weightsᵢ (−log p(yᵢ|zᵢ)) in its dependence on z, for a loss of one's own; returns z unchanged.

    Args:
      z: the outputs that parameterize the distribution, (n, ...): feed the returned z to the loss.
      distribution: one of `kfe.distributions`, such as `kfe.Categorical()` (z are logits along the last axis) or
        `kfe.Gaussian(variance)` (means), or one of your own (see `kfe.Distribution`). Where the loss is −log p itself,
        `kfe.losses.negative_log_likelihood` reads the weights off the backward pass.
      weights: the weight of each event in the scalar loss, a prefix (n, ...) of the event shape; 1/n an example by default,
        which is the mean over the batch of each example's sum. Zero leaves an example out, and so does a negative weight
        (see `kfe.Info.negative_weights`).

    Raises:
      TypeError: `distribution` is none, or is not compared by its fields; z is not floating.
      ValueError: `weights` is not a prefix of the events' shape; what the distribution returns has another shape than z.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):          # a mean over examples of the Huber loss, treated as a Gaussian's
      ...     z = kfe.register_output(x @ params["kernel"], kfe.Gaussian())
      ...     return jnp.mean(jnp.sum(jnp.where(abs(z - y) < 1, (z - y) ** 2 / 2, abs(z - y) - 0.5), -1))
    """
    z = jnp.asarray(z)
    check(distribution, z)
    if weights is not None:
        weights = jnp.asarray(weights, jnp.result_type(weights, jnp.float32))
        events = z.shape[: z.ndim - distribution.event_ndim]
        if weights.shape != events[: weights.ndim]:
            raise ValueError(
                f"register_output's weights have shape {weights.shape}, which is no prefix of the events' shape {events}; "
                "give one weight an example, or one an event."
            )
    if tags.listener() is None:
        return z
    return tags.mark_loss(_output_spec(distribution), z, (weights,))


def _register(spec: Spec, z: jax.Array, args: tuple) -> jax.Array:
    return tags.mark_loss(spec, z, args)
