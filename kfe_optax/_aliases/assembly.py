"""What the optimizers are put together from: preconditioner, momentum, length of a step, weight decay and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import optax

from kfe_optax._jax import checks
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._layers.paths import key_path
from kfe_optax._methods.layerwise import ScalarOrSchedule
from kfe_optax._wrappers.clip import clip_by_kl
from kfe_optax._wrappers.normalize import Size, clip_layers, normalize_layers

ScaleBy = Callable[..., optax.GradientTransformationExtraArgs]

NATURAL: Mapping[str, Any] = MappingProxyType(
    {"relative_damping": False, "size": None, "max_kl": 1e-2, "max_change": 0.1, "nesterov": False}
)
"""An alias's options for the natural gradient's own step, bounded in length: `kfe.kfac(0.1, layers, 1e-2, **kfe.NATURAL)`.

Damping and `max_kl` are then in the loss's units. For deterministic problems: autoencoders, physics-informed networks,
variational Monte Carlo.
"""


def adam_of_rest() -> optax.GradientTransformation:
    """What the optimizers do to the parameters outside the layers: a tenth of Adam's step."""
    return optax.chain(optax.scale_by_adam(b2=0.99), optax.scale(0.1))


def around(
    scale_by: ScaleBy,
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    damping: ScalarOrSchedule = 3.0,
    *,
    relative_damping: bool = True,
    size: Size | None = "spectral",
    momentum: ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    max_kl: ScalarOrSchedule | None = None,
    max_change: ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    rest: optax.GradientTransformation | None = None,
    rest_kinds: Sequence[str] = ("embedding", "norm"),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer around a preconditioner, which has the further options; `kfe.kfac` explains the others, the same for all."""
    checks.number_or_schedule(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if max_kl is not None and size is not None:
        raise ValueError(
            f"max_kl bounds a step's own length, which size={size!r} replaces: take size=None (see kfe.NATURAL)."
        )
    require_layers(layers)
    inside = layers.without(kinds=rest_kinds)
    preconditioner = scale_by(
        inside,
        damping,
        relative_damping=relative_damping,
        rest=adam_of_rest() if rest is None else rest,
        **options,
    )
    steps: list[optax.GradientTransformation] = [preconditioner]
    if max_kl is not None:
        steps = [clip_by_kl(preconditioner, max_kl, learning_rate)]
    if _present(momentum):
        steps.append(optax.masked(_trace(momentum, nesterov), _mask_of(inside)))
    if size is not None:
        steps.append(normalize_layers(inside, size))
    if _present(weight_decay):
        steps.append(optax.add_decayed_weights(weight_decay, mask))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if max_change is not None:
        steps.append(clip_layers(inside, max_change))
    return optax.chain(*steps)


def _trace(momentum: ScalarOrSchedule, nesterov: bool) -> optax.GradientTransformation:
    if callable(momentum):
        return optax.inject_hyperparams(optax.trace)(decay=momentum, nesterov=nesterov)
    return optax.trace(momentum, nesterov)


def _mask_of(layers: Layers) -> Callable[[Any], Any]:
    """Parameters → whether each of them is in a layer, in any container."""
    own = {path for layer in layers.values() for _, path in layer.paths}
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: key_path(path) in own, tree)


def _present(number: Any) -> bool:
    # `optax.inject_hyperparams` makes an array of every number; a traced one cannot be asked whether it is zero.
    return isinstance(number, jax.Array) or bool(number)
