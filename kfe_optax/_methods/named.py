"""`scale_by_kronecker` under the names of the papers' methods: TKFAC, KPSVD, deflation, Lanczos, KFAC-corrected."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import optax

from kfe_optax import factors as factors_lib
from kfe_optax._layers.layers import Layers
from kfe_optax._methods.kronecker import scale_by_kronecker
from kfe_optax._methods.layerwise import ScalarOrSchedule

_DOCSTRING = """Preconditions gradients with {title}.

It is `scale_by_kronecker` with `kfe.factors.{name}`. {note}

Args:
  layers: what `kfe.find_layers` returned.
  damping: λ > 0; a scalar or a schedule of the step.
  **options: those of `kfe.factors.{name}` ({own}) and of `scale_by_kronecker`.

Returns:
  A transformation with `update(grads, state, params, *, taps)`.

Raises:
  TypeError: an option that neither of them has.
  ValueError: as they do.

Example:
  >>> import jax.numpy as jnp, kfe_optax as kfe
  >>> def loss_fn(params, x, y):
  ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
  ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
  >>> params = {{"kernel": jnp.ones((3, 2))}}
  >>> layers = kfe.find_layers(loss_fn, params, jnp.eye(3), jnp.zeros((3, 2)))
  >>> tx = kfe.scale_by_{name}(layers, damping=1e-3, decay=0.9, inverse_update_period=20)
  >>> int(kfe.info(tx.init(params)).last_refresh)
  -1
"""


def _named(name: str, title: str, note: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    make = factors_lib.FACTORS[name]
    own = tuple(inspect.signature(make).parameters)

    def scale_by(
        layers: Layers, damping: ScalarOrSchedule, **options: Any
    ) -> optax.GradientTransformationExtraArgs:
        # `optax.inject_hyperparams` hands the options over as one dictionary of that name.
        options = {**options.pop("options", {}), **options}
        factors = make(**{option: options.pop(option) for option in own if option in options})
        return scale_by_kronecker(layers, damping, factors=factors, **options)

    scale_by.__name__ = scale_by.__qualname__ = f"scale_by_{name}"
    scale_by.__doc__ = _DOCSTRING.format(name=name, title=title, note=note, own=", ".join(own))
    return scale_by


scale_by_tkfac = _named(
    "tkfac",
    "TKFAC's inverse: F ≈ σ Φ⊗Ψ, tr Φ = tr Ψ = 1 (Gao et al. 2020, section 3.1)",
    "The factors are √σ Φ and √σ Ψ, so that damping acts on matrices of the size of F's root.",
)
scale_by_kpsvd = _named(
    "kpsvd",
    "KPSVD's inverse: F ≈ R⊗S, the closest Kronecker product (Koroko et al. 2022, section 3.1)",
    'The authors damped R and S with √λ each: damping_type="sqrt".',
)
scale_by_deflation = _named(
    "deflation",
    "the inverse of F ≈ R⊗S + P⊗Q from deflation (Koroko et al. 2022, section 3.2)",
    'The authors damped R and S with λ each: damping_type="linear".',
)
scale_by_lanczos = _named(
    "lanczos",
    "the inverse of F ≈ R⊗S + P⊗Q from Lanczos (Koroko et al. 2022, section 3.3)",
    'The authors damped R and S with λ each: damping_type="linear".',
)
scale_by_kfac_corrected = _named(
    "kfac_corrected",
    "the inverse of F ≈ A⊗G + P⊗Q, K-FAC corrected (Koroko et al. 2022, section 3.4)",
    'The authors damped A and G with λ each: damping_type="linear".',
)
