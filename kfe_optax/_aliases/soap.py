"""`soap`: Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2024), ready to use."""

from __future__ import annotations

from typing import Any

import optax

from kfe_optax import factors as factors_lib
from kfe_optax._jax import checks
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.basis import Refresh
from kfe_optax._methods.kfe import in_kfe
from kfe_optax._methods.layerwise import ScalarOrSchedule


def soap(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    decay: ScalarOrSchedule = 0.95,
    basis_update_period: int = 10,
    refresh: Refresh = "qr",
    rotate_second_moment: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of L = E[V Vᵀ] and R = E[Vᵀ V] (Vyas et al. 2024): `in_kfe(optax.scale_by_adam())` without taps.

    The update is U_L Adam(U_Lᵀ V U_R) U_Rᵀ, with V the gradient of a layer's matrix, its bias included; the momentum turns with
    the basis. Defaults are those of the paper, with the basis from the first gradient on (the authors' first step has no update).

    Args:
      learning_rate: η, a scalar or a schedule; Adam's is where to start.
      layers: what `kfe.find_layers` returned. Embeddings and norms are layers with a diagonal side.
      b1, b2, eps: Adam's.
      decay: ρ of L and R; the k-th gradient uses min(1 − 1/k, ρ).
      basis_update_period: steps between refreshes of the basis.
      refresh: "qr": after the first eigh, one power step and a QR; or "eigh".
      rotate_second_moment: False: second moments follow their eigenvectors' order, unturned (the paper's); True: they turn with
        the basis, v ← (R_L∘R_L) v (R_R∘R_R)ᵀ.
      weight_decay: decoupled weight decay.
      mask: the parameters it acts on, as in `optax.adamw`.
      max_dim: a side larger than this keeps the identity as its basis; None: 8192.
      distribute: how devices share the factorizations, see `kfe.in_kfe`.
      rest: the transformation of the parameters outside the layers, before the learning rate; the same Adam by default.

    Returns:
      A transformation with `update(grads, state, params)`; `taps` of `kfe.value_grad_and_taps` may be given and are not read.

    Raises:
      TypeError, ValueError: as `in_kfe` does.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, labels):
      ...     logits = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> params, x, labels = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.array([0, 1, 0])
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> tx = kfe.soap(3e-3, layers)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params, x, labels), tx.init(params), params)
      >>> updates["kernel"].shape
      (3, 2)
    """
    checks.number_or_schedule(learning_rate=learning_rate, weight_decay=weight_decay)
    checks.number(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        in_kfe(
            optax.scale_by_adam(b1, b2, eps),
            layers,
            basis=factors_lib.gradient(decay),
            carry={"nu": "second" if rotate_second_moment else "columns"},
            factor_update_period=1,
            basis_update_period=basis_update_period,
            refresh=refresh,
            max_dim=max_dim,
            distribute=distribute,
            rest=rest,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
