"""Optimizers to start with: preconditioner, KL clip, momentum, decoupled weight decay and learning rate in one call."""

from __future__ import annotations

from typing import Any

import jax
import optax

from kfe_optax.layers import Layers
from kfe_optax.transforms.clip import clip_by_kl
from kfe_optax.transforms.ekfac import scale_by_ekfac
from kfe_optax.transforms.kfac import scale_by_kfac
from kfe_optax.transforms.layerwise import ScalarOrSchedule


def _assemble(
    preconditioner: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    momentum: float,
    nesterov: bool,
    max_kl: ScalarOrSchedule | None,
    weight_decay: float,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    steps: list[optax.GradientTransformation] = [preconditioner]
    if max_kl is not None:
        steps = [clip_by_kl(preconditioner, max_kl, learning_rate)]
    if _present(momentum):
        steps.append(optax.trace(momentum, nesterov))
    if _present(weight_decay):
        steps.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))


def _present(strength: Any) -> bool:
    # `optax.inject_hyperparams` makes an array of every number; a traced strength cannot be asked whether it is zero.
    return isinstance(strength, jax.Array) or bool(strength)


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    # `optax.inject_hyperparams` hands the further options over as one dictionary of that name.
    return {**options.pop("options", {}), **options}


def kfac(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    damping: ScalarOrSchedule = 1e-2,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    max_kl: ScalarOrSchedule | None = 1e-2,
    weight_decay: float = 0.0,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC, ready to use: `scale_by_kfac`, `clip_by_kl`, momentum, decoupled weight decay, learning rate.

    The factors of the first batch count in full and everything is refreshed in each of the first steps, so that the first
    step is as safe as the others.

    Args:
      learning_rate: η, a scalar or a schedule.
      layers: what `kfe.find_layers` returned.
      damping: λ, see `scale_by_kfac`: raise it when the loss rises, lower it when progress is slow.
      momentum: heavy-ball momentum on the preconditioned gradient.
      nesterov: Nesterov's form of it.
      max_kl: the bound of `clip_by_kl`; None for no clip.
      weight_decay: decoupled weight decay.
      mask: the parameters it acts on, as in `optax.adamw`.
      **options: further options of `scale_by_kfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, kfe_optax as kfe
      >>> model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)])
      >>> x, labels = jax.random.normal(jax.random.key(0), (32, 4)), jnp.arange(32) % 2
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> def loss_fn(params):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params)
      >>> tx = kfe.kfac(0.1, layers)
      >>> opt_state = tx.init(params)
      >>> value_grad_and_taps = kfe.value_grad_and_taps(loss_fn, layers)
      >>> losses = []
      >>> for step in range(20):
      ...     loss, grads, taps = value_grad_and_taps(params, key=jax.random.key(step))
      ...     updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
      ...     params = optax.apply_updates(params, updates)
      ...     losses.append(float(loss))
      >>> losses[-1] < losses[0]
      True
    """
    preconditioner = scale_by_kfac(layers, damping, **_flat(options))
    return _assemble(preconditioner, learning_rate, momentum, nesterov, max_kl, weight_decay, mask)


def ekfac(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    damping: ScalarOrSchedule = 1e-2,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    max_kl: ScalarOrSchedule | None = 1e-2,
    weight_decay: float = 0.0,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC, ready to use: `scale_by_ekfac`, `clip_by_kl`, momentum, decoupled weight decay, learning rate.

    Args:
      learning_rate: η, a scalar or a schedule.
      layers: what `kfe.find_layers` returned.
      damping: λ, see `scale_by_ekfac`.
      momentum: heavy-ball momentum on the preconditioned gradient.
      nesterov: Nesterov's form of it.
      max_kl: the bound of `clip_by_kl`; None for no clip.
      weight_decay: decoupled weight decay.
      mask: the parameters it acts on, as in `optax.adamw`.
      **options: further options of `scale_by_ekfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`; used as `kfe.kfac` is.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.squared_error(z, y).sum(-1).mean()
      >>> layers = kfe.find_layers(loss_fn, {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.ekfac(0.1, layers, damping=1e-3, scale="batch", scale_update_period=10)
    """
    preconditioner = scale_by_ekfac(layers, damping, **_flat(options))
    return _assemble(preconditioner, learning_rate, momentum, nesterov, max_kl, weight_decay, mask)
