"""`scale_by_kronecker` under the names of the papers' methods: TKFAC, KPSVD, deflation, Lanczos, KFAC-corrected."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import optax

from kfe_optax import factors as factors_lib
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.kronecker import scale_by_kronecker
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.roots import DampingType, Denominators
from kfe_optax._statistics.statistics import Pairing
from kfe_optax.factors.base import Factors
from kfe_optax.factors.tkfac import Averages


def _of(make: Callable[..., Factors], **options: Any) -> optax.GradientTransformationExtraArgs:
    """`scale_by_kronecker` with factors that take their own of the options."""
    own = {name: options.pop(name) for name in inspect.signature(make).parameters}
    return scale_by_kronecker(factors=make(**own), **options)


def scale_by_tkfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: DampingType = "factored",
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    pairing: Pairing = "position",
    averages: Averages = "numerators",
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with TKFAC's inverse: F ≈ σ Φ⊗Ψ, tr Φ = tr Ψ = 1 (Gao et al. 2020, section 3.1).

    It is `scale_by_kronecker` with `kfe.factors.tkfac`. The factors are √σ Φ and √σ Ψ, so that damping acts on
    matrices of the size of F's root.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay, pairing, averages: see `kfe.factors.tkfac`.
      relative_damping, damping_type, factor_update_period, inverse_update_period, initial_refreshes, refreshes_per_doubling,
        max_dim, distribute, rest: see `kfe.scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as they do.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.scale_by_tkfac(layers, damping=1e-3, decay=0.9, inverse_update_period=20)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return _of(factors_lib.tkfac, **locals())


def scale_by_kpsvd(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: DampingType = "factored",
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with KPSVD's inverse: F ≈ R⊗S, the closest Kronecker product (Koroko et al. 2022, section 3.1).

    It is `scale_by_kronecker` with `kfe.factors.kpsvd`. The authors damped R and S with √λ each:
    damping_type="sqrt".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay, tolerance, max_iterations: see `kfe.factors.kpsvd`.
      relative_damping, damping_type, factor_update_period, inverse_update_period, initial_refreshes, refreshes_per_doubling,
        max_dim, distribute, rest: see `kfe.scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as they do.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.scale_by_kpsvd(layers, damping=1e-3, decay=0.9, inverse_update_period=20)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return _of(factors_lib.kpsvd, **locals())


def scale_by_deflation(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: DampingType = "factored",
    denominators: Denominators = "clip",
    floor: float = 0.1,
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the inverse of F ≈ R⊗S + P⊗Q from deflation (Koroko et al. 2022, section 3.2).

    It is `scale_by_kronecker` with `kfe.factors.deflation`. The authors damped R and S with λ each:
    damping_type="linear".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay, tolerance, max_iterations: see `kfe.factors.deflation`.
      relative_damping, damping_type, denominators, floor, factor_update_period, inverse_update_period,
        initial_refreshes, refreshes_per_doubling, max_dim, distribute, rest: see `kfe.scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as they do.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.scale_by_deflation(layers, damping=1e-3, decay=0.9, inverse_update_period=20)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return _of(factors_lib.deflation, **locals())


def scale_by_lanczos(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: DampingType = "factored",
    denominators: Denominators = "clip",
    floor: float = 0.1,
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    subspace: int | None = None,
    max_restarts: int = 10,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the inverse of F ≈ R⊗S + P⊗Q from Lanczos (Koroko et al. 2022, section 3.3).

    It is `scale_by_kronecker` with `kfe.factors.lanczos`. The authors damped R and S with λ each:
    damping_type="linear".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay, tolerance, subspace, max_restarts: see `kfe.factors.lanczos`.
      relative_damping, damping_type, denominators, floor, factor_update_period, inverse_update_period,
        initial_refreshes, refreshes_per_doubling, max_dim, distribute, rest: see `kfe.scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as they do.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.scale_by_lanczos(layers, damping=1e-3, decay=0.9, inverse_update_period=20)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return _of(factors_lib.lanczos, **locals())


def scale_by_kfac_corrected(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: DampingType = "factored",
    denominators: Denominators = "clip",
    floor: float = 0.1,
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the inverse of F ≈ A⊗G + P⊗Q, K-FAC corrected (Koroko et al. 2022, section 3.4).

    It is `scale_by_kronecker` with `kfe.factors.kfac_corrected`. The authors damped A and G with λ each:
    damping_type="linear".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay, tolerance, max_iterations: see `kfe.factors.kfac_corrected`.
      relative_damping, damping_type, denominators, floor, factor_update_period, inverse_update_period,
        initial_refreshes, refreshes_per_doubling, max_dim, distribute, rest: see `kfe.scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as they do.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     return kfe.losses.l2_loss(x @ params["kernel"], y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> tx = kfe.scale_by_kfac_corrected(layers, damping=1e-3, decay=0.9, inverse_update_period=20)
      >>> int(kfe.info(tx.init(params)).last_refresh)
      -1
    """
    return _of(factors_lib.kfac_corrected, **locals())
