"""`kfac_adaptive`: Martens & Grosse's complete optimizer, which needs no learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from kfe_optax._aliases.registry import METHODS
from kfe_optax._jax import checks
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods.kfac import scale_by_kfac
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.roots import DampingType
from kfe_optax._wrappers.adaptive_damping import adaptive_damping
from kfe_optax._wrappers.averaging import average_iterates
from kfe_optax._wrappers.quadratic_model import scale_by_quadratic_model


def kfac_adaptive(
    layers: Layers,
    *,
    initial_damping: float = 1.0,
    l2: float = 0.0,
    preconditioner: Callable[..., optax.GradientTransformation] | None = None,
    momentum: bool = True,
    max_change: ScalarOrSchedule | None = 0.3,
    damping_period: int = 5,
    damping_factor: float = 19 / 20,
    damping_floor: float = 1e-8,
    damping_ceiling: float = 1e8,
    damping_in_model: bool = True,
    search_period: int | None = 50,
    search_floor: float = 1e-8,
    search_ceiling: float = 1e8,
    averaging: ScalarOrSchedule | None = 0.99,
    rest: optax.GradientTransformation | None = None,
    damping_type: DampingType | None = None,
    decay: ScalarOrSchedule | None = None,
    factor_update_period: int | None = None,
    inverse_update_period: int | None = None,
    initial_refreshes: int | None = None,
    refreshes_per_doubling: int | None = None,
    max_dim: int | None = None,
    distribute: Distribute | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC that finds its step size, its momentum and its damping itself (Martens & Grosse 2015, sections 6 and 7).

    The update is δ = αΔ + μδ₀ with Δ = −F̂⁻¹∇h and α, μ from the exact Fisher's quadratic model
    (`scale_by_quadratic_model`); the model's λ follows how well it foretells the loss (`adaptive_damping`), the
    preconditioner's own damping a search by the model; the running average of the parameters is kept for evaluation
    (`average_iterates`).

    Args:
      layers: what `kfe.find_layers` returned.
      initial_damping: λ₀, in units of the loss's curvature: about 1 for a classifier, 150 for a sum over an image's pixels. Too
        large costs some steps at the start, in which λ falls.
      l2: η, the strength of a penalty ½η‖θ‖² that is added here, and not by the loss function.
      preconditioner: `kfe.scale_by_kfac` (the default) or another `kfe.scale_by_...` of layers and damping, with options of its
        own through `functools.partial`; of `scale_by_two_level_kfac` the fine level's damping is adapted, and the coarse one's
        is its own.
      momentum: whether the last update takes part.
      max_change: a bound on every layer's part of the update, see `scale_by_quadratic_model`. A small batch's model foretells
        that batch's own loss, noise and all, so that λ falls without end and nothing else bounds the step. None for no bound:
        with batches of hundreds the first steps may be longer without one.
      damping_period: T₁, steps between measurements of the loss at the new parameters.
      damping_factor: ω₁ of one step.
      damping_floor: the least λ. A batch's own loss follows the model the better the smaller λ is, noise and all.
      damping_ceiling: the largest λ.
      damping_in_model: whether the reduction ratio's model has λ in it.
      search_period: T₂, steps between searches for the preconditioner's damping γ²; None: it is λ + η. Best a multiple of the
        preconditioner's `inverse_update_period` (see `scale_by_quadratic_model`). The paper searches and inverts every 20 steps
        and updates the factors on every one; here it is 50, 50 and 10, for speed.
      search_floor: the least γ².
      search_ceiling: the largest γ².
      averaging: the decay ξ of the averaged parameters (`kfe.averaged_parameters(opt_state, params)`); None for none. They lag
        by some 1/(1 − ξ) steps: for runs of a few hundred 0.9 is better.
      rest: the transformation of the parameters outside the layers, whose step size is α too: by default `optax.identity()`,
        their gradient itself.
      damping_type, decay, factor_update_period, inverse_update_period, initial_refreshes, refreshes_per_doubling, max_dim,
        distribute: the preconditioner's, see `scale_by_kfac`; None leaves its own default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)` for taps of
      `kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True)`; what it returns is added to the parameters as it is.

    Raises:
      TypeError: an alias such as `kfe.kfac` for a preconditioner; a number for `momentum`, a schedule for `initial_damping`.
      ValueError: numbers out of their ranges; in `update`: no taps, taps without the quadratic model, no parameters.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, kfe_optax as kfe
      >>> model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)])
      >>> x = jax.random.normal(jax.random.key(0), (32, 4))
      >>> labels = (x[:, 0] > x[:, 1]).astype(int)
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> def loss_fn(params):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params)
      >>> tx = kfe.kfac_adaptive(layers)                                      # no learning rate
      >>> value_grad_and_taps = kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True)
      >>> @jax.jit
      ... def step(params, opt_state, key):
      ...     loss, grads, taps = value_grad_and_taps(params, key=key)
      ...     updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
      ...     return optax.apply_updates(params, updates), opt_state, loss
      >>> opt_state, losses = tx.init(params), []
      >>> for i in range(20):
      ...     params, opt_state, loss = step(params, opt_state, jax.random.key(i))
      ...     losses.append(float(loss))
      >>> losses[-1] < losses[0] / 2
      True
    """
    given: dict[str, Any] = {
        "damping_type": damping_type,
        "decay": decay,
        "factor_update_period": factor_update_period,
        "inverse_update_period": inverse_update_period,
        "initial_refreshes": initial_refreshes,
        "refreshes_per_doubling": refreshes_per_doubling,
        "max_dim": max_dim,
        "distribute": distribute,
    }
    options = {name: option for name, option in given.items() if option is not None}
    _check(preconditioner, momentum)
    _check_initial(initial_damping, damping_floor, damping_ceiling)
    checks.number(damping_factor=damping_factor)
    checks.period("damping_period", damping_period)
    if averaging is not None:
        checks.number_or_schedule(averaging=averaging)
    tx = (preconditioner or scale_by_kfac)(layers, initial_damping, rest=rest or optax.identity(), **options)
    tx = scale_by_quadratic_model(
        tx,
        initial_damping,
        l2=l2,
        momentum=momentum,
        max_change=max_change,
        search_period=search_period,
        search_floor=search_floor,
        search_ceiling=search_ceiling,
    )
    tx = adaptive_damping(
        tx,
        initial_damping,
        period=damping_period,
        factor=damping_factor,
        floor=damping_floor,
        ceiling=damping_ceiling,
        l2=l2,
        damping_in_model=damping_in_model,
    )
    return tx if averaging is None else optax.chain(average_iterates(averaging), tx)


def _check(preconditioner: Any, momentum: Any) -> None:
    if not isinstance(momentum, bool):
        raise TypeError(
            f"momentum says whether the last update takes part, True or False, not {momentum!r}: the model finds how much."
        )
    for name, method in METHODS.items():
        if preconditioner is method.optimizer:
            raise TypeError(
                f"preconditioner is kfe.{name}, an optimizer with a learning rate: give kfe.METHODS['{name}'].scale_by."
            )


def _check_initial(damping: Any, floor: Any, ceiling: Any) -> None:
    if callable(damping):
        raise TypeError("initial_damping is a number: where λ starts, before it follows the reduction ratio.")
    checks.positive(initial_damping=damping)
    checks.number(damping_floor=floor, damping_ceiling=ceiling)
    known = all(isinstance(number, float | int) for number in (damping, floor, ceiling))
    if known and not floor <= damping <= ceiling:
        raise ValueError(
            f"initial_damping is {damping!r}; it must lie between damping_floor, {floor!r}, and damping_ceiling, {ceiling!r}."
        )
