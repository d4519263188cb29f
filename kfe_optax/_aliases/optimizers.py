"""Optimizers to start with: preconditioner, momentum, length of a step, weight decay and learning rate in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

from kfe_optax._aliases.spectral import adam_of_rest, spectral_kfac
from kfe_optax._jax import checks
from kfe_optax._layers.layers import Layers
from kfe_optax._layers.paths import key_path
from kfe_optax._methods.ekfac import scale_by_ekfac
from kfe_optax._methods.kfac import scale_by_kfac
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._methods.named import (
    scale_by_deflation,
    scale_by_kfac_corrected,
    scale_by_kpsvd,
    scale_by_lanczos,
    scale_by_tkfac,
)
from kfe_optax._methods.spectral import scale_by_spectral_kfac
from kfe_optax._methods.tekfac import scale_by_tekfac
from kfe_optax._methods.tridiagonal import scale_by_block_tridiagonal
from kfe_optax._wrappers.clip import clip_by_kl
from kfe_optax._wrappers.normalize import Size, clip_layers, normalize_layers
from kfe_optax.contrib.two_level import scale_by_two_level_kfac

ScaleBy = Callable[..., optax.GradientTransformationExtraArgs]

NATURAL: Mapping[str, Any] = MappingProxyType(
    {"relative_damping": False, "size": None, "max_kl": 1e-2, "max_change": 0.1, "nesterov": False}
)
"""An alias's options for the natural gradient's own step, bounded in length: `kfe.kfac(0.1, layers, 1e-2, **kfe.NATURAL)`.

Damping and `max_kl` are then in the loss's units. For deterministic problems: autoencoders, physics-informed networks,
variational Monte Carlo.
"""

_DOCSTRING = """{title}, ready to use: `{scale_by}`, momentum, `normalize_layers`, weight decay and learning rate.

By default nothing depends on the scale of the loss, of a layer or of its gradient: the damping is relative, and each layer's
step has the length of the learning rate. A learning rate of 0.03 with a short warm-up and a decay is where to start. On
deterministic problems (autoencoders, physics-informed networks, variational Monte Carlo) the natural gradient's own length is
better: `kfe.{name}(0.1, layers, 1e-2, **kfe.NATURAL)`, with a damping in the loss's units.

Args:
  learning_rate: η, a scalar or a schedule: with size="operator" about how much a step changes a layer's outputs where its
    inputs have root mean square 1.
  layers: what `kfe.find_layers` returned.
  damping: λ, see `{scale_by}`: raise it when the loss rises, lower it when progress is slow.
  relative_damping: whether λ is a multiple of each layer's mean curvature, see `{scale_by}`{absolute}.
  size: what the length of a step is measured by, see `kfe.normalize_layers`; None leaves steps their own length.
  momentum: heavy-ball momentum on the layers' preconditioned gradient; the rest has its own.
  nesterov: Nesterov's form of it.
  max_kl: the bound of `clip_by_kl` on a step of its own length, size=None; None for no clip.
  max_change: the bound of `clip_layers` on each layer's step, which keeps steps of noisy curvature from ruining a layer; None
    for no bound.
  weight_decay: decoupled weight decay.
  mask: the parameters it acts on, as in `optax.adamw`.
  rest: the transformation of the parameters outside the layers, before the learning rate. By default
    `optax.scale_by_adam(b2=0.99)` times 0.1.
  rest_kinds: the kinds of layers that go there too.
  **options: further options of `{scale_by}`{measured}.

Returns:
  A transformation with `update(grads, state, params, *, taps)`.

Raises:
  TypeError, ValueError: as `{scale_by}` does, for a damping that is not positive among others.
  ValueError: `max_kl` together with a `size`.

Example:
  >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, kfe_optax as kfe
  >>> model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)])
  >>> x, labels = jax.random.normal(jax.random.key(0), (32, 4)), jnp.arange(32) % 2
  >>> params = model.init(jax.random.key(1), x)["params"]
  >>> def loss_fn(params):
  ...     logits = model.apply({{"params": params}}, x)
  ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  >>> layers = kfe.find_layers(loss_fn, params)
  >>> tx = kfe.{name}(0.03, layers)
  >>> opt_state = tx.init(params)
  >>> value_grad_and_taps = kfe.value_grad_and_taps(loss_fn, layers)
  >>> losses = []
  >>> for step in range(20):
  ...     loss, grads, taps = value_grad_and_taps(params, key=jax.random.key(step))
  ...     updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
  ...     params = optax.apply_updates(params, updates)
  ...     losses.append(float(loss))
  >>> losses[-1] < losses[0]
  True
"""


def _alias(
    name: str,
    title: str,
    scale_by: ScaleBy,
    documented: str | None = None,
    measured: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda options: options,
    says: str = "",
    absolute: str = "",
) -> ScaleBy:
    """The optimizer around a preconditioner; all of them have one signature and one way of being put together.

    `measured` adds the options that are better than the preconditioner's own defaults, and `says` documents them; `absolute` says
    with which of its options the damping cannot be relative.
    """

    def optimizer(
        learning_rate: ScalarOrSchedule,
        layers: Layers,
        damping: ScalarOrSchedule = 10.0,
        *,
        relative_damping: bool = True,
        size: Size | None = "operator",
        momentum: float = 0.9,
        nesterov: bool = True,
        max_kl: ScalarOrSchedule | None = None,
        max_change: ScalarOrSchedule | None = None,
        weight_decay: float = 0.0,
        mask: Any = None,
        rest: optax.GradientTransformation | None = None,
        rest_kinds: Sequence[str] = ("embedding", "norm"),
        **options: Any,
    ) -> optax.GradientTransformationExtraArgs:
        # `optax.inject_hyperparams` hands the further options over as one dictionary of that name.
        options = {**options.pop("options", {}), **options}
        checks.number(momentum=momentum)
        checks.number_or_schedule(learning_rate=learning_rate, weight_decay=weight_decay)
        if max_kl is not None and size is not None:
            raise ValueError(
                f"max_kl bounds a step's own length, which size={size!r} replaces: take size=None (see kfe.NATURAL)."
            )
        inside = layers.without(kinds=rest_kinds)
        preconditioner = scale_by(
            inside,
            damping,
            relative_damping=relative_damping,
            rest=adam_of_rest() if rest is None else rest,
            **measured(options),
        )
        steps: list[optax.GradientTransformation] = [preconditioner]
        if max_kl is not None:
            steps = [clip_by_kl(preconditioner, max_kl, learning_rate)]
        if _present(momentum):
            steps.append(optax.masked(optax.trace(momentum, nesterov), _mask_of(inside)))
        if size is not None:
            steps.append(normalize_layers(inside, size))
        if _present(weight_decay):
            steps.append(optax.add_decayed_weights(weight_decay, mask))
        steps.append(optax.scale_by_learning_rate(learning_rate))
        if max_change is not None:
            steps.append(clip_layers(inside, max_change))
        return optax.chain(*steps)

    optimizer.__name__ = optimizer.__qualname__ = name
    optimizer.__doc__ = _DOCSTRING.format(
        name=name,
        title=title,
        scale_by=documented or f"scale_by_{name}",
        measured=says,
        absolute=absolute,
    )
    return optimizer


def _mask_of(layers: Layers) -> Callable[[Any], Any]:
    """Parameters → whether each of them is in a layer, in any container."""
    own = {path for layer in layers.values() for _, path in layer.paths}
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: key_path(path) in own, tree)


def _ekfac_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    # Squared mean gradients follow the loss: as it falls they say less and less of the Fisher, and steps grow. Measured on
    # autoencoders and on a physics-informed network, on which EKFAC diverged. Plain damping was unstable on CURVES.
    draws = {} if "scale" in options else {"scale": "batch", "scale_update_period": 10}
    return {**draws, "damping_type": "appendix_c", **options}


def _present(strength: Any) -> bool:
    # `optax.inject_hyperparams` makes an array of every number; a traced strength cannot be asked whether it is zero.
    return isinstance(strength, jax.Array) or bool(strength)


kfac = _alias("kfac", "K-FAC", scale_by_kfac)
ekfac = _alias(
    "ekfac",
    "EKFAC",
    scale_by_ekfac,
    measured=_ekfac_options,
    says='; without one for `scale` it is "batch", every 10 steps, and `damping_type` is "appendix_c"',
)
tkfac = _alias("tkfac", "TKFAC", scale_by_tkfac)
tekfac = _alias("tekfac", "TEKFAC", scale_by_tekfac)
kpsvd = _alias("kpsvd", "KPSVD", scale_by_kpsvd)
deflation = _alias("deflation", "Deflation (two Kronecker terms)", scale_by_deflation)
lanczos = _alias("lanczos", "Lanczos (two Kronecker terms)", scale_by_lanczos)
kfac_corrected = _alias("kfac_corrected", "KFAC-corrected", scale_by_kfac_corrected)
kfac_tridiagonal = _alias(
    "kfac_tridiagonal",
    "K-FAC with the block-tridiagonal inverse",
    scale_by_block_tridiagonal,
    "scale_by_block_tridiagonal",
)
two_level_kfac = _alias(
    "two_level_kfac",
    "Two-level K-FAC",
    scale_by_two_level_kfac,
    absolute='; coarse="residual" needs False',
)


class Method(NamedTuple):
    """A line of `METHODS`: the optimizer, and the preconditioner inside it, (layers, damping, ...)."""

    optimizer: ScaleBy
    scale_by: ScaleBy


# Every method by name: the conformance suite, the training job and the documentation read it.
METHODS: Mapping[str, Method] = {
    "kfac": Method(kfac, scale_by_kfac),
    "ekfac": Method(ekfac, scale_by_ekfac),
    "tkfac": Method(tkfac, scale_by_tkfac),
    "tekfac": Method(tekfac, scale_by_tekfac),
    "kpsvd": Method(kpsvd, scale_by_kpsvd),
    "deflation": Method(deflation, scale_by_deflation),
    "lanczos": Method(lanczos, scale_by_lanczos),
    "kfac_corrected": Method(kfac_corrected, scale_by_kfac_corrected),
    "kfac_tridiagonal": Method(kfac_tridiagonal, scale_by_block_tridiagonal),
    "two_level_kfac": Method(two_level_kfac, scale_by_two_level_kfac),
    "spectral_kfac": Method(spectral_kfac, scale_by_spectral_kfac),
}
