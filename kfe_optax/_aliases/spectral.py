"""`spectral_kfac`: steepest descent in K-FAC's metric and the spectral norm, ready to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from kfe_optax import polar
from kfe_optax._aliases.assembly import adam_of_rest
from kfe_optax._jax import checks
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.spectral import MomentumOf, scale_by_spectral_kfac
from kfe_optax._wrappers.normalize import Size, normalize_layers
from kfe_optax.factors.base import Factors


def spectral_kfac(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    damping: ScalarOrSchedule = 1.0,
    *,
    size: Size = "operator",
    momentum: ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    momentum_of: MomentumOf = "gradient",
    weight_decay: float = 0.0,
    mask: Any = None,
    rest: optax.GradientTransformation | None = None,
    rest_kinds: Sequence[str] = ("embedding", "norm"),
    factors: Factors | None = None,
    decay: ScalarOrSchedule = 0.95,
    exponents: tuple[float, float] = (0.5, 0.5),
    exponents_back: tuple[float, float] | None = None,
    coefficients: polar.Coefficients | None = None,
    iteration_dtype: jax.typing.DTypeLike | None = None,
    factor_update_period: int = 25,
    inverse_update_period: int = 50,
    initial_refreshes: int = 1,
    refreshes_per_doubling: int = 8,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_spectral_kfac`, `normalize_layers`, decoupled weight decay and a learning rate in one call.

    Each layer's matrix moves by Δ = Â^−½ msign(Â^−½ M Ĝ^−½) Ĝ^−½ times a number that gives the step the length of the learning
    rate: nothing depends on the scale of the loss, of the layer or of its gradient. A learning rate of 0.1 with a short warm-up
    and a decay is where to start.

    Args:
      learning_rate: η, a scalar or a schedule: with size="operator" about how much a step changes a layer's outputs where its
        inputs have root mean square 1.
      layers: what `kfe.find_layers` returned.
      damping: ε, relative to each layer's mean curvature. 1 is where to start; smaller values trust the curvature more.
      size: what the length of a step is measured by, see `kfe.normalize_layers`. With "fan_in" a layer with fewer outputs than
        inputs, such as the last one of a classifier, may change each output √(d_in/d_out) times as much as with "operator".
      momentum, nesterov, momentum_of: see `kfe.scale_by_spectral_kfac`.
      weight_decay: decoupled weight decay.
      mask: the parameters it acts on, as in `optax.adamw`.
      rest: the transformation of the parameters outside the layers, before the learning rate. By default
        `optax.scale_by_adam(b2=0.99)` times 0.1.
      rest_kinds: the kinds of layers that go there too.
      factors, decay, exponents, exponents_back, coefficients, iteration_dtype, factor_update_period, inverse_update_period,
        initial_refreshes, refreshes_per_doubling, max_dim, distribute: see `kfe.scale_by_spectral_kfac`.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `scale_by_spectral_kfac` and `normalize_layers` do.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, kfe_optax as kfe
      >>> model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)])
      >>> x, labels = jax.random.normal(jax.random.key(0), (32, 4)), jnp.arange(32) % 2
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> def loss_fn(params):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params)
      >>> tx = kfe.spectral_kfac(0.1, layers)
      >>> opt_state, losses = tx.init(params), []
      >>> value_grad_and_taps = kfe.value_grad_and_taps(loss_fn, layers)
      >>> for step in range(20):
      ...     loss, grads, taps = value_grad_and_taps(params, key=jax.random.key(step))
      ...     updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
      ...     params = optax.apply_updates(params, updates)
      ...     losses.append(float(loss))
      >>> losses[-1] < losses[0] / 2
      True
    """
    checks.number_or_schedule(learning_rate=learning_rate, weight_decay=weight_decay)
    preconditioner = scale_by_spectral_kfac(
        layers,
        damping,
        factors=factors,
        decay=decay,
        exponents=exponents,
        exponents_back=exponents_back,
        momentum=momentum,
        nesterov=nesterov,
        momentum_of=momentum_of,
        coefficients=coefficients,
        iteration_dtype=iteration_dtype,
        factor_update_period=factor_update_period,
        inverse_update_period=inverse_update_period,
        initial_refreshes=initial_refreshes,
        refreshes_per_doubling=refreshes_per_doubling,
        max_dim=max_dim,
        distribute=distribute,
        rest_kinds=rest_kinds,
        rest=adam_of_rest() if rest is None else rest,
    )
    return optax.chain(
        preconditioner,
        normalize_layers(layers.without(kinds=rest_kinds), size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
