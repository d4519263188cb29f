"""K-FAC, ready to use: block-diagonal, block-tridiagonal, and with a coarse level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from kfe_optax._aliases.assembly import around
from kfe_optax._layers.chains import Chains
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.kfac import scale_by_kfac
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.roots import DampingType
from kfe_optax._methods.tridiagonal import scale_by_block_tridiagonal
from kfe_optax._wrappers.normalize import Size
from kfe_optax.contrib.coarse.grids import Choice
from kfe_optax.contrib.coarse.options import FormName, SpaceName
from kfe_optax.contrib.two_level import scale_by_two_level_kfac


def kfac(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    damping: ScalarOrSchedule = 3.0,
    *,
    relative_damping: bool = True,
    size: Size | None = "spectral",
    momentum: ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    max_kl: ScalarOrSchedule | None = None,
    max_change: ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    rest: optax.GradientTransformation | None = None,
    rest_kinds: Sequence[str] = ("embedding", "norm"),
    damping_type: DampingType = "factored",
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """K-FAC, ready to use: `scale_by_kfac`, momentum, `normalize_layers`, weight decay and learning rate.

    By default nothing depends on the scale of the loss, of a layer or of its gradient: the damping is relative, and each layer's
    step has the length of the learning rate. A learning rate of 0.15 with a short warm-up and a decay is where to start. On
    deterministic problems (autoencoders, physics-informed networks, variational Monte Carlo) the natural gradient's own length is
    better: `kfe.kfac(0.1, layers, 1e-2, **kfe.NATURAL)`, with a damping in the loss's units.

    Args:
      learning_rate: η, a scalar or a schedule: with size="spectral" the most that a step changes a layer's outputs where its
        inputs have root mean square 1.
      layers: what `kfe.find_layers` returned.
      damping: λ, see `scale_by_kfac`: raise it when the loss rises, lower it when progress is slow.
      relative_damping: whether λ is a multiple of each layer's mean curvature, see `scale_by_kfac`.
      size: what the length of a step is measured by, see `kfe.normalize_layers`; None leaves steps their own length.
      momentum: heavy-ball momentum on the layers' preconditioned gradient, a scalar or a schedule; the rest has its own.
      nesterov: Nesterov's form of it.
      max_kl: the bound of `clip_by_kl` on a step of its own length, size=None; None for no clip.
      max_change: the bound of `clip_layers` on each layer's step, which keeps steps of noisy curvature from ruining a layer; None
        for no bound.
      weight_decay: decoupled weight decay.
      mask: the parameters it acts on, as in `optax.adamw`.
      rest: the transformation of the parameters outside the layers, before the learning rate. By default
        `optax.scale_by_adam(b2=0.99)` times 0.1.
      rest_kinds: the kinds of layers that go there too.
      damping_type, decay, factor_update_period, inverse_update_period, initial_refreshes, refreshes_per_doubling, max_dim,
        distribute: see `scale_by_kfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `scale_by_kfac` does, for a damping that is not positive among others.
      ValueError: `max_kl` together with a `size`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, kfe_optax as kfe
      >>> model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)])
      >>> x, labels = jax.random.normal(jax.random.key(0), (32, 4)), jnp.arange(32) % 2
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> def loss_fn(params):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params)
      >>> tx = kfe.kfac(0.15, layers)
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
    return around(scale_by_kfac, **locals())


def kfac_tridiagonal(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    damping: ScalarOrSchedule = 3.0,
    *,
    relative_damping: bool = True,
    size: Size | None = "spectral",
    momentum: ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    max_kl: ScalarOrSchedule | None = None,
    max_change: ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    rest: optax.GradientTransformation | None = None,
    rest_kinds: Sequence[str] = ("embedding", "norm"),
    chains: Chains = "whole",
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    floor: float = 1e-4,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with the block-tridiagonal inverse, ready to use: `scale_by_block_tridiagonal` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      chains, decay, factor_update_period, inverse_update_period, initial_refreshes, refreshes_per_doubling, floor, max_dim,
        distribute: see `kfe.scale_by_block_tridiagonal`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_block_tridiagonal` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.kfac_tridiagonal(optax.cosine_decay_schedule(0.15, 1000), layers, chains='split')
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_block_tridiagonal, **locals())


def two_level_kfac(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    damping: ScalarOrSchedule = 3.0,
    *,
    relative_damping: bool = True,
    size: Size | None = "spectral",
    momentum: ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    max_kl: ScalarOrSchedule | None = None,
    max_change: ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    rest: optax.GradientTransformation | None = None,
    rest_kinds: Sequence[str] = ("embedding", "norm"),
    coarse: SpaceName = "constant",
    groups: int | None = None,
    count: int | None = None,
    form: FormName | None = None,
    grid: Choice = "finest",
    coarse_damping: ScalarOrSchedule = 1e-2,
    damping_type: DampingType = "factored",
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """Two-level K-FAC, ready to use: `scale_by_two_level_kfac` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      coarse, groups, count, form, grid, coarse_damping, damping_type, decay, factor_update_period, inverse_update_period,
        initial_refreshes, refreshes_per_doubling, max_dim, distribute: see `kfe.scale_by_two_level_kfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_two_level_kfac` do.
      ValueError: coarse="residual" with a relative damping.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.two_level_kfac(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_two_level_kfac, **locals())
