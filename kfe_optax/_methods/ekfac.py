"""`scale_by_ekfac`: a diagonal scale in the Kronecker-factored eigenbasis (George et al. 2018)."""

from __future__ import annotations

from typing import Literal

import optax

from kfe_optax import factors as factors_lib
from kfe_optax._jax import checks
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods import basis as basis_lib
from kfe_optax._methods import layerwise, periods
from kfe_optax._methods.basis import Refresh
from kfe_optax._methods.ekfac_step import Ekfac
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax.factors.base import Factors

ScaleFrom = Literal["batch", "running"]
ScaleDamping = Literal["plain", "factored", "appendix_c", "trace"]
OnRefresh = Literal["carry", "restart"]


def scale_by_ekfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    scale: ScaleFrom = "running",
    damping_type: ScaleDamping = "plain",
    relative_damping: bool = False,
    trace_floor: float = 0.01,
    factors: Factors | None = None,
    decay: ScalarOrSchedule = 0.95,
    scale_decay: ScalarOrSchedule | None = None,
    factor_update_period: int = 10,
    basis_update_period: int = 50,
    scale_update_period: int = 1,
    initial_refreshes: int = 1,
    refreshes_per_doubling: int = 0,
    on_refresh: OnRefresh = "carry",
    refresh: Refresh = "eigh",
    refresh_tolerance: float | None = None,
    null_threshold: float = 1e-5,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient V as U_A[(U_Aᵀ V U_G) ⊘ (S + λ)]U_Gᵀ (George et al. 2018, sections 3 and 4).

    U_A, U_G are eigenvectors of K-FAC's factors, S the second moments of the gradient along them. "batch": S* =
    E[(U_Aᵀ ∇W̄ U_G)²] over the per-example gradients of the Fisher's draw, the best diagonal in that basis. "running" (EKFAC-ra):
    a running average of N (U_Aᵀ ∇̄ U_G)² of the mean gradient ∇̄, which needs no further backward pass; N is 1/weight of an
    element in the loss (N for a mean over N), so that S is in the units of the loss's Gauss–Newton matrix.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      scale: see above.
      damping_type: "plain" adds λ to S; "factored" adds λ + (√λ/π) s_A 1ᵀ + π√λ 1 s_Gᵀ, what K-FAC's factored damping adds to
        s_A s_Gᵀ; "appendix_c" likewise without π, as the paper prints it; "trace" is TEKFAC's (see `scale_by_tekfac`).
      relative_damping: whether λ is `damping` times each layer's own mean curvature, so that it does not depend on the scale of
        the loss nor on that of the layer; `damping` is then a number without a unit, such as 0.1.
        That is the mean of S, and with "factored" and "appendix_c" (tr A/d_in)(tr G/d_out).
      trace_floor: ϑ of "trace".
      factors: one of `kfe.factors`, whose leading term's eigenvectors are the basis; `kfe.factors.kfac(decay)` by default.
      decay: ρ of the running averages of the default factors; the k-th update uses min(1 − 1/k, ρ).
      scale_decay: ρ of S; `decay` by default, 0 takes S from the current batch alone.
      factor_update_period: steps between updates of A and G, each one more backward pass.
      basis_update_period: steps between refreshes of the basis.
      scale_update_period: steps between updates of S.
      initial_refreshes: the first steps, in each of which factors and basis are refreshed.
      refreshes_per_doubling: n > 0: periods begin at a fifth of what they are, and grow: n refreshes while the number of steps
        doubles. Curvature changes fastest in the beginning. 0: the periods as they are.
      on_refresh: "carry" takes S into the new basis by the squared rotation, which keeps its trace; "restart" sets it to
        s_A s_Gᵀ.
      refresh: "eigh", or "qr": after the first eigh, one power step and a QR with sorted columns, U ← qr(A U).
      refresh_tolerance: a side of the basis with ‖offdiag(UᵀAU)‖_F ≤ tolerance ‖A‖_F is not refreshed; None: all are.
      null_threshold: directions whose eigenvalue is below this fraction of the largest share one mean scale, since eigh's
        basis of a null space is arbitrary; 0 turns it off.
      max_dim: a side larger than this keeps the identity as its basis; None: 8192.
      distribute: "none": every device factorizes everything; "inverses": each device factorizes its share, and all get the
        results; "inverses_and_apply": likewise each device takes its share of the gradients into the basis and
        back in every step. See `scale_by_kronecker`.
      rest: the transformation of the parameters outside the layers; `optax.scale_by_adam()` by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`. A layer whose per-example gradients are not available
      (applied under a per-example vmap) keeps S = s_A s_Gᵀ with "batch". See also `scale_by_kfac`.

    Raises:
      ValueError: a damping that is not positive, a decay outside [0, 1], an option that does not exist, a period that is not a
        positive whole number; in `update`: no taps, taps of other layers, a changed or partly masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, labels):
      ...     logits = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> params, x, labels = {"kernel": jnp.zeros((3, 2))}, jnp.eye(3), jnp.array([0, 1, 0])
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> tx = optax.chain(kfe.scale_by_ekfac(layers, damping=1e-3), optax.scale_by_learning_rate(0.1))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(0))
      >>> updates, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> updates["kernel"].shape
      (3, 2)
    """
    checks.positive(damping=damping)
    checks.decay("decay", decay)
    checks.number(trace_floor=trace_floor, null_threshold=null_threshold)
    checks.decay("scale_decay", decay if scale_decay is None else scale_decay)
    if factors is None:
        factors = factors_lib.kfac(decay)
    if not factors.needs_taps:
        raise ValueError(
            "Factors of the mean gradient are in other units than EKFAC's scale; run a transformation in their basis with "
            "kfe.in_kfe(inner, layers, basis=kfe.factors.gradient())."
        )
    checks.one_of("scale", scale, ScaleFrom)
    checks.one_of("damping_type", damping_type, ScaleDamping)
    checks.one_of("on_refresh", on_refresh, OnRefresh)
    checks.refreshes(
        initial_refreshes,
        refreshes_per_doubling,
        factor_update_period=factor_update_period,
        basis_update_period=basis_update_period,
        scale_update_period=scale_update_period,
    )
    basis_lib.check(refresh, refresh_tolerance)
    method = Ekfac(
        layers=layers,
        factors=factors,
        damping=damping,
        batch=scale == "batch",
        damping_type=damping_type,
        relative=relative_damping,
        trace_floor=trace_floor,
        scale_decay=decay if scale_decay is None else scale_decay,
        factor_update_period=factor_update_period,
        basis_update_period=basis_update_period,
        scale_update_period=scale_update_period,
        early=periods.Early(initial_refreshes, refreshes_per_doubling),
        carry=on_refresh == "carry",
        refresh=refresh,
        refresh_tolerance=refresh_tolerance,
        null_threshold=null_threshold,
        max_dim=max_dim,
    )
    return layerwise.layerwise(layers, method, rest, distribute)
