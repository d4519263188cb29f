"""TKFAC, KPSVD, deflation, Lanczos and KFAC-corrected, ready to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from kfe_optax._aliases.assembly import around
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.named import (
    scale_by_deflation,
    scale_by_kfac_corrected,
    scale_by_kpsvd,
    scale_by_lanczos,
    scale_by_tkfac,
)
from kfe_optax._methods.roots import DampingType, Denominators
from kfe_optax._statistics.statistics import Pairing
from kfe_optax._wrappers.normalize import Size
from kfe_optax.factors.tkfac import Averages


def tkfac(
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
    pairing: Pairing = "position",
    averages: Averages = "numerators",
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """TKFAC, ready to use: `scale_by_tkfac` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      damping_type, decay, pairing, averages, factor_update_period, inverse_update_period, initial_refreshes,
        refreshes_per_doubling, max_dim, distribute: see `kfe.scale_by_tkfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_tkfac` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.tkfac(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_tkfac, **locals())


def kpsvd(
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
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """KPSVD, ready to use: `scale_by_kpsvd` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      damping_type, decay, tolerance, max_iterations, factor_update_period, inverse_update_period, initial_refreshes,
        refreshes_per_doubling, max_dim, distribute: see `kfe.scale_by_kpsvd`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_kpsvd` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.kpsvd(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_kpsvd, **locals())


def deflation(
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
    denominators: Denominators = "clip",
    floor: float = 0.1,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """Deflation (two Kronecker terms), ready to use: `scale_by_deflation` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      damping_type, denominators, floor, decay, tolerance, max_iterations, factor_update_period,
        inverse_update_period, initial_refreshes, refreshes_per_doubling, max_dim, distribute: see `kfe.scale_by_deflation`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_deflation` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.deflation(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_deflation, **locals())


def lanczos(
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
    denominators: Denominators = "clip",
    floor: float = 0.1,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    subspace: int | None = None,
    max_restarts: int = 10,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """Lanczos (two Kronecker terms), ready to use: `scale_by_lanczos` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      damping_type, denominators, floor, decay, tolerance, subspace, max_restarts, factor_update_period,
        inverse_update_period, initial_refreshes, refreshes_per_doubling, max_dim, distribute: see `kfe.scale_by_lanczos`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_lanczos` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.lanczos(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_lanczos, **locals())


def kfac_corrected(
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
    denominators: Denominators = "clip",
    floor: float = 0.1,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 16,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """KFAC-corrected, ready to use: `scale_by_kfac_corrected` in the chain of `kfe.kfac`.

    Args:
      learning_rate, layers, damping, relative_damping, size, momentum, nesterov, max_kl, max_change, weight_decay, mask, rest,
        rest_kinds: see `kfe.kfac`.
      damping_type, denominators, floor, decay, tolerance, max_iterations, factor_update_period, inverse_update_period,
        initial_refreshes, refreshes_per_doubling, max_dim, distribute: see `kfe.scale_by_kfac_corrected`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `kfe.kfac` and `scale_by_kfac_corrected` do.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.kfac_corrected(optax.cosine_decay_schedule(0.15, 1000), layers)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return around(scale_by_kfac_corrected, **locals())
