"""EKFAC and TEKFAC, ready to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from kfe_optax._aliases.assembly import around
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.basis import Refresh
from kfe_optax._methods.ekfac import OnRefresh, ScaleDamping, ScaleFrom, scale_by_ekfac
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.tekfac import scale_by_tekfac
from kfe_optax._statistics.statistics import Pairing
from kfe_optax._wrappers.normalize import Size
from kfe_optax.factors.base import Factors
from kfe_optax.factors.tkfac import Averages


def ekfac(
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
    scale: ScaleFrom = "batch",
    damping_type: ScaleDamping = "factored",
    trace_floor: float = 0.01,
    factors: Factors | None = None,
    decay: ScalarOrSchedule = 0.95,
    scale_decay: ScalarOrSchedule | None = None,
    factor_update_period: int = 10,
    basis_update_period: int = 50,
    scale_update_period: int | None = None,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    on_refresh: OnRefresh = "carry",
    refresh: Refresh = "eigh",
    refresh_tolerance: float | None = None,
    null_threshold: float = 1e-5,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """EKFAC, ready to use: `scale_by_ekfac` in the chain of `kfe.kfac`.

    Its scale is that of the Fisher's draws, "batch": "running" averages squared mean gradients, which follow the loss, so that
    steps grow as it falls; on autoencoders and on a physics-informed network that diverged. "factored" is there because plain
    damping was unstable on CURVES.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      scale, damping_type, trace_floor, factors, decay, scale_decay, factor_update_period, basis_update_period,
        initial_refreshes, refreshes_per_doubling, on_refresh, refresh, refresh_tolerance, null_threshold, max_dim, distribute:
        see `kfe.scale_by_ekfac`.
      scale_update_period: steps between updates of the scale; None: 10, or every one with scale="running", which needs no further
        backward pass.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_ekfac` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.ekfac(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    options = locals()
    if scale_update_period is None:
        options["scale_update_period"] = 1 if scale == "running" else 10
    return around(scale_by_ekfac, **options)


def tekfac(
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
    damping_type: ScaleDamping = "trace",
    trace_floor: float = 0.01,
    decay: ScalarOrSchedule = 0.95,
    pairing: Pairing = "position",
    averages: Averages = "numerators",
    scale_decay: ScalarOrSchedule | None = None,
    factor_update_period: int = 10,
    basis_update_period: int = 50,
    scale_update_period: int = 10,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    on_refresh: OnRefresh = "carry",
    refresh: Refresh = "eigh",
    refresh_tolerance: float | None = None,
    null_threshold: float = 1e-5,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """TEKFAC, ready to use: `scale_by_tekfac` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      damping_type, trace_floor, decay, pairing, averages, scale_decay, factor_update_period, basis_update_period,
        scale_update_period, initial_refreshes, refreshes_per_doubling, on_refresh, refresh, refresh_tolerance, null_threshold,
        max_dim, distribute: see `kfe.scale_by_tekfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_tekfac` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.tekfac(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_tekfac, **locals())
