"""`scale_by_kfac`: preconditioning with K-FAC's factors, damped in the factors or exactly."""

from __future__ import annotations

import optax

from kfe_optax import factors as factors_lib
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.kronecker import scale_by_kronecker
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.roots import DampingType


def scale_by_kfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: DampingType = "factored",
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient V with K-FAC's inverse (Martens & Grosse 2015, sections 4 and 6.3).

    "factored": (A + π√λ I)⁻¹ V (G + (√λ/π) I)⁻¹ with π = sqrt[(tr A/d_in)/(tr G/d_out)]. "exact": (A⊗G + λI)⁻¹ through the
    eigenvectors, U_A[(U_Aᵀ V U_G) ⊘ (s_A s_Gᵀ + λ)]U_Gᵀ, where a changing λ acts at once. It is `scale_by_kronecker` with
    `kfe.factors.kfac()`, which explains the other forms.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0, in units of the loss's curvature; a scalar or a schedule of the step.
      damping_type: see above.
      relative_damping: whether λ is `damping` times each layer's own mean curvature, so that it does not depend on the scale of
        the loss nor on that of the layer; `damping` is then a number without a unit, such as 0.1.
        With "factored" it adds √damping times the mean eigenvalue to each factor.
      decay: ρ of the factors' running averages; the k-th update uses min(1 − 1/k, ρ).
      factor_update_period: steps between updates of A and G, each one more backward pass.
      inverse_update_period: steps between refreshes of the inverses (or eigenbases).
      initial_refreshes: the first steps, in each of which everything is refreshed.
      refreshes_per_doubling: n > 0: periods begin at a fifth of what they are, and grow: n refreshes while the number of steps
        doubles. Curvature changes fastest in the beginning. 0: the periods as they are.
      max_dim: a side larger than this is treated as diagonal; None: 8192.
      distribute: "none": every device factorizes everything; "inverses": each device factorizes its share, and all get the
        results; "inverses_and_apply": likewise each device preconditions its share in every step. See `scale_by_kronecker`.
      rest: the transformation of the parameters outside the layers; `optax.scale_by_adam()` by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`. Factors and inverses are float32 (float64 for
      float64 parameters). A factorization that fails keeps the last good one and is counted (`kfe.info`). A layer whose
      factors are zero passes its gradient on.

    Raises:
      ValueError: a damping that is not positive, a decay outside [0, 1], a period that is not a positive whole number; in
        `update`: no taps, taps of other layers, a changed or partly masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> tx = optax.chain(kfe.scale_by_kfac(layers, damping=1e-6), optax.scale_by_learning_rate(1.0))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, y)
      >>> updates, _ = tx.update(grads, tx.init(params), params, taps=taps)
      >>> bool(jnp.allclose(params["kernel"] + updates["kernel"], 0, atol=1e-2))   # one Newton step
      True
    """
    return scale_by_kronecker(
        layers,
        damping,
        factors=factors_lib.kfac(decay),
        damping_type=damping_type,
        relative_damping=relative_damping,
        factor_update_period=factor_update_period,
        inverse_update_period=inverse_update_period,
        initial_refreshes=initial_refreshes,
        refreshes_per_doubling=refreshes_per_doubling,
        max_dim=max_dim,
        distribute=distribute,
        rest=rest,
    )
