"""`scale_by_tekfac`: EKFAC's exact scale in the eigenbasis of TKFAC's factors (Gao et al. 2020)."""

from __future__ import annotations

import optax

from kfe_optax import factors as factors_lib
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.basis import Refresh
from kfe_optax._methods.ekfac import OnRefresh, ScaleDamping, scale_by_ekfac
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._statistics.statistics import Pairing
from kfe_optax.factors.tkfac import Averages


def scale_by_tekfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    damping_type: ScaleDamping = "trace",
    trace_floor: float = 0.01,
    decay: ScalarOrSchedule = 0.95,
    pairing: Pairing = "position",
    averages: Averages = "numerators",
    relative_damping: bool = False,
    scale_decay: ScalarOrSchedule | None = None,
    factor_update_period: int = 10,
    basis_update_period: int = 50,
    scale_update_period: int = 10,
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
    """Preconditions each layer's gradient V as U_Φ[(U_Φᵀ V U_Ψ) ⊘ (Θ + λ)]U_Ψᵀ (Gao et al. 2020, section 3.2).

    U_Φ, U_Ψ are the eigenvectors of TKFAC's Φ and Ψ, and Θ = E[(U_Φᵀ ∇W̄ U_Ψ)²] over the per-example gradients of the Fisher's
    draw, a running average as all of the paper's are. It is `scale_by_ekfac` with `kfe.factors.tkfac()` and scale="batch".

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0; a scalar or a schedule of the step.
      damping_type: "trace": Θ + λ in a fully connected network; in one with convolutions each of them has Θ_l + λ_l with λ_l =
        max{tr Θ_l, ϑ}/(d_in d_out), over all of its feature groups, and all other layers (embeddings and norms count as fully
        connected) β(Θ + λ) with β the largest λ_l. "plain": Θ + λ everywhere.
      trace_floor: ϑ.
      decay: ρ of the running averages; the k-th update of Φ and Ψ uses min(1 − 1/k, ρ).
      pairing, averages: how shared positions are weighted, and what is averaged; see `kfe.factors.tkfac`.
      factor_update_period: T_FIM, steps between updates of Φ and Ψ (the paper: 50).
      basis_update_period: T_EIG, steps between eigendecompositions (the paper: 50).
      scale_update_period: T_RE, steps between updates of Θ.
      relative_damping, scale_decay, initial_refreshes, refreshes_per_doubling, on_refresh, refresh, refresh_tolerance,
        null_threshold, max_dim, distribute, rest: see `scale_by_ekfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      ValueError: as `scale_by_ekfac` and `kfe.factors.tkfac`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, labels):
      ...     logits = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> params, x, labels = {"kernel": jnp.zeros((3, 2))}, jnp.eye(3), jnp.array([0, 1, 0])
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> tx = optax.chain(kfe.scale_by_tekfac(layers, damping=1e-3), optax.scale_by_learning_rate(0.1))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(0))
      >>> updates, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> updates["kernel"].shape
      (3, 2)
    """
    options = locals()
    own = {name: options.pop(name) for name in ("pairing", "averages")}
    return scale_by_ekfac(scale="batch", factors=factors_lib.tkfac(decay, **own), **options)
