"""`normalize_layers`, `clip_layers` and `graft`: the length of each layer's step, by a rule, a bound or another optimizer."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks, counts, explicit_axes
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._methods import layerwise, matrices
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.matrices import root_mean_square

Size = Literal["rms", "fan_in", "operator", "spectral"]


def normalize_layers(layers: Layers, size: Size = "rms") -> optax.GradientTransformation:
    """Gives every layer's update one length, so that a learning rate says how far a layer moves in one step.

    Δ_l ← c Δ_l / rms(Δ_l) for each matrix (d_in, d_out) of each layer, stacked ones apart, with rms the root mean square of the
    entries. "rms": c = 1, the learning rate is the size of a weight's step. "fan_in": c = 1/√d_in, it is that size relative to
    the weights' usual standard deviation at the start, so that one rate fits narrow and wide layers. "operator": c =
    √min(d_in, d_out) / d_in, for which √(d_in/d_out) times the root mean square of the singular values is 1: inputs of root
    mean square 1 change outputs by about the learning rate (Yang et al. 2023; Bernstein & Newhouse 2024). "spectral": the same
    of the largest singular value, by three power iterations, for updates in which few directions lead, as in those of K-FAC.

    Args:
      layers: what `kfe.find_layers` returned, or those of them that are to be normalized (`layers.without(...)`). Parameters
        outside them are left as they are, and so are updates of zero.
      size: see above.

    Returns:
      An Optax transformation without a state.

    Raises:
      TypeError: no layers.
      ValueError: an unknown `size`; in `update`, a tree that is not that of the layers.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"], params)).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3))
      >>> tx = kfe.normalize_layers(layers)
      >>> updates, _ = tx.update({"kernel": jnp.full((3, 2), 5.0)}, tx.init(params))
      >>> updates["kernel"][0].tolist()
      [1.0, 1.0]
    """
    require_layers(layers)
    checks.one_of("size", size, Size)

    def init(params):
        del params
        return optax.EmptyState()

    def factor(delta):
        if size == "spectral":
            return _inverse(matrices.change(delta))
        d_in, d_out = delta.shape[-2:]
        target = {"rms": 1.0, "fan_in": 1 / math.sqrt(d_in), "operator": math.sqrt(min(d_in, d_out)) / d_in}
        return target[size] * _inverse(root_mean_square(delta))

    def update(updates, state, params=None):
        del params
        return matrices.rescaled(layers, factor, updates), state

    return optax.GradientTransformation(init, explicit_axes.on_any_mesh(update))


def clip_layers(layers: Layers, max_change: ScalarOrSchedule) -> optax.GradientTransformation:
    """Bounds every layer's step: √(d_in/d_out) ‖Δ_l‖₂ ≤ `max_change`, for each matrix by itself, stacked ones apart.

    That is how much outputs can change, in units of inputs of root mean square 1. Where batches are small and curvature noisy,
    or one layer has little of it, a step in K-FAC's metric may be many times as long as its layer's weights, and a ReLU that it
    turns off is off for good; a KL clip, which looks at the sum over layers and at directions that the batch has seen, does not
    see it. Where steps are short it changes nothing. To stand behind the learning rate.

    Args:
      layers: what `kfe.find_layers` returned; parameters outside them are left as they are.
      max_change: the bound, a scalar or a schedule of the step.

    Returns:
      An Optax transformation; its state is the count of steps.

    Raises:
      TypeError: no layers.
      ValueError: a bound that is not positive; in `update`, a tree that is not that of the layers.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"], params)).mean()
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(2))
      >>> tx = kfe.clip_layers(layers, 0.5)
      >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([4.0, 2.0]))}, tx.init(params))
      >>> [round(float(number), 3) for number in jnp.diag(updates["kernel"])]
      [0.5, 0.25]
    """
    require_layers(layers)
    checks.bound(max_change=max_change)

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        bound = layerwise.value(max_change, state.count, "max_change")

        def factor(delta):
            change = matrices.change(delta)
            return jnp.where(change > bound, bound.astype(delta.dtype) * _inverse(change), 1)

        return matrices.rescaled(layers, factor, updates), optax.ScaleByScheduleState(
            counts.following(state.count)
        )

    return optax.GradientTransformation(init, explicit_axes.on_any_mesh(update))


class GraftState(NamedTuple):
    """State of `graft`.

    Attributes:
      direction: the state of the transformation that gives the direction.
      magnitude: that of the one that gives the length.
    """

    direction: Any
    magnitude: Any


def graft(
    direction: optax.GradientTransformation, magnitude: optax.GradientTransformation, layers: Layers
) -> optax.GradientTransformationExtraArgs:
    """The direction of one update with the length of another, layer by layer: Δ_l ‖Δ'_l‖ / ‖Δ_l‖ (Agarwal et al. 2020).

    Args:
      direction: gives Δ, such as `kfe.scale_by_kfac(...)`.
      magnitude: gives Δ', such as `optax.scale_by_adam()`; it is given the same gradient.
      layers: what `kfe.find_layers` returned. Lengths are those of each layer's matrix, stacked ones apart; of a parameter
        outside the layers, its own.

    Returns:
      A transformation that hands all extra arguments, such as `taps`, to both. A Δ of zero stays zero.

    Raises:
      TypeError: no layers.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"], params)).mean()
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(2))
      >>> tx = kfe.graft(optax.identity(), optax.scale_by_sign(), layers)
      >>> updates, _ = tx.update({"kernel": jnp.diag(jnp.array([3.0, 4.0]))}, tx.init(params))
      >>> round(float(jnp.linalg.norm(updates["kernel"])), 4)
      1.4142
    """
    require_layers(layers)
    first, second = map(optax.with_extra_args_support, (direction, magnitude))

    def init(params):
        return GraftState(first.init(params), second.init(params))

    def of_matrix(delta, other):
        return root_mean_square(other) * _inverse(root_mean_square(delta))

    def of_leaf(delta, other):
        axes = tuple(range(delta.ndim))
        return root_mean_square(other, axes) * _inverse(root_mean_square(delta, axes))

    def update(updates, state, params=None, **extra):
        checks.state(state, GraftState)
        delta, first_state = first.update(updates, state.direction, params, **extra)
        other, second_state = second.update(updates, state.magnitude, params, **extra)
        new = matrices.rescaled(layers, of_matrix, delta, other, outside=of_leaf)
        return new, GraftState(first_state, second_state)

    return optax.GradientTransformationExtraArgs(init, explicit_axes.on_any_mesh(update))


def _inverse(number: jax.Array) -> jax.Array:
    return jnp.where(number > 0, 1 / jnp.where(number > 0, number, 1), 0)
