"""`scale_by_kronecker` under the names of the papers' methods: TKFAC, KPSVD, deflation, Lanczos, KFAC-corrected."""

from __future__ import annotations

from typing import Any

import optax

from kfe_optax import factors as factors_lib
from kfe_optax.factors.base import Factors
from kfe_optax.layers import Layers
from kfe_optax.statistics import Pairing
from kfe_optax.transforms.kronecker import scale_by_kronecker
from kfe_optax.transforms.layerwise import ScalarOrSchedule


def scale_by_tkfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    decay: ScalarOrSchedule = 0.95,
    pairing: Pairing = "position",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with TKFAC's inverse: F ≈ σ Φ⊗Ψ, tr Φ = tr Ψ = 1 (Gao et al. 2020, section 3.1).

    It is `scale_by_kronecker` with `kfe.factors.tkfac`.
    The factors are √σ Φ and √σ Ψ, so that damping acts on matrices of the size of F's root.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay: ρ of the running averages; the k-th update uses min(1 − 1/k, ρ).
      pairing: how shared positions are weighted, see `kfe.factors.tkfac`.
      **options: further options of `scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as `scale_by_kronecker` and `kfe.factors.tkfac`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> state = kfe.scale_by_tkfac(layers, damping=1e-3).init(params)
      >>> int(state.method.factors.updates)
      0
    """
    return _scale_by(factors_lib.tkfac(decay, pairing), layers, damping, options)


def scale_by_kpsvd(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with KPSVD's inverse: F ≈ R⊗S, the closest Kronecker product (Koroko et al. 2022, section 3.1).

    It is `scale_by_kronecker` with `kfe.factors.kpsvd`.
    The authors damped R and S with √λ each: damping_type="sqrt".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay: ρ of the running averages; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the power method ends when ‖Z v − σ u‖ ≤ tolerance · σ.
      max_iterations: and after as many products with Z(F) and its transpose at the latest.
      **options: further options of `scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as `scale_by_kronecker` and `kfe.factors.kpsvd`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> state = kfe.scale_by_kpsvd(layers, damping=1e-3).init(params)
      >>> int(state.method.factors.updates)
      0
    """
    return _scale_by(factors_lib.kpsvd(decay, tolerance, max_iterations), layers, damping, options)


def scale_by_deflation(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the inverse of F ≈ R⊗S + P⊗Q from deflation (Koroko et al. 2022, section 3.2).

    It is `scale_by_kronecker` with `kfe.factors.deflation`.
    The authors damped R and S with λ each: damping_type="linear".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay: ρ of the running averages; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the power method ends when ‖Z v − σ u‖ ≤ tolerance · σ.
      max_iterations: and after as many products with Z(F) and its transpose at the latest.
      **options: further options of `scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as `scale_by_kronecker` and `kfe.factors.deflation`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> state = kfe.scale_by_deflation(layers, damping=1e-3).init(params)
      >>> int(state.method.factors.updates)
      0
    """
    return _scale_by(factors_lib.deflation(decay, tolerance, max_iterations), layers, damping, options)


def scale_by_lanczos(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    subspace: int = 8,
    max_restarts: int = 10,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the inverse of F ≈ R⊗S + P⊗Q from Lanczos (Koroko et al. 2022, section 3.3).

    It is `scale_by_kronecker` with `kfe.factors.lanczos`.
    The authors damped R and S with λ each: damping_type="linear".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay: ρ of the running averages; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the cycles end when ‖Zᵀu − σ v‖ ≤ tolerance · σ for both triples.
      subspace: the size of the bidiagonal matrix.
      max_restarts: cycles after the first, at most.
      **options: further options of `scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as `scale_by_kronecker` and `kfe.factors.lanczos`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> state = kfe.scale_by_lanczos(layers, damping=1e-3).init(params)
      >>> int(state.method.factors.updates)
      0
    """
    return _scale_by(factors_lib.lanczos(decay, tolerance, subspace, max_restarts), layers, damping, options)


def scale_by_kfac_corrected(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    decay: ScalarOrSchedule = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the inverse of F ≈ A⊗G + P⊗Q, K-FAC corrected (Koroko et al. 2022, section 3.4).

    It is `scale_by_kronecker` with `kfe.factors.kfac_corrected`.
    The authors damped A and G with λ each: damping_type="linear".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      decay: ρ of the running averages; the k-th update uses min(1 − 1/k, ρ).
      tolerance: the power method ends when ‖Z v − σ u‖ ≤ tolerance · σ.
      max_iterations: and after as many products with Z(F) and its transpose at the latest.
      **options: further options of `scale_by_kronecker`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as `scale_by_kronecker` and `kfe.factors.kfac_corrected`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
      >>> state = kfe.scale_by_kfac_corrected(layers, damping=1e-3).init(params)
      >>> int(state.method.factors.updates)
      0
    """
    return _scale_by(factors_lib.kfac_corrected(decay, tolerance, max_iterations), layers, damping, options)


def _scale_by(
    factors: Factors, layers: Layers, damping: ScalarOrSchedule, options: dict[str, Any]
) -> optax.GradientTransformationExtraArgs:
    # `optax.inject_hyperparams` hands the further options over as one dictionary of that name.
    options = {**options.pop("options", {}), **options}
    return scale_by_kronecker(layers, damping, factors=factors, **options)
