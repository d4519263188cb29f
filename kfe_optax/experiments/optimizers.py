"""The table of optimizers that a config can name, each built from its sub-config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.settings import Schedule, make_schedule
from kfe_optax.transforms import layerwise


class Method(NamedTuple):
    """One line of the table.

    ``make`` takes a learning rate, the layers where ``curvature`` is set, and the sub-config's
    other fields by name. An optimizer without curvature is driven by a plain gradient, so that its
    steps cost what they cost without this library.
    """

    make: Callable[..., Any]
    curvature: bool


def adam_in_kfe(
    learning_rate: Any,
    layers: kfe.Layers,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    basis: str,
    decay: float,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of the factors named ``basis``; SOAP with those of the mean gradient."""
    if basis not in kfe.factors.FACTORS:
        raise ExperimentError(
            f"There are no factors '{basis}'; choose one of {', '.join(kfe.factors.FACTORS)}."
        )
    factors = kfe.factors.FACTORS[basis](decay=decay)
    return optax.chain(
        kfe.in_kfe(optax.scale_by_adam(b1, b2, eps), layers, basis=factors, **options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


METHODS: Mapping[str, Method] = {
    "adam": Method(optax.adam, curvature=False),
    "sgd": Method(optax.sgd, curvature=False),
    **{name: Method(method.optimizer, curvature=True) for name, method in kfe.METHODS.items()},
    "adam_in_kfe": Method(adam_in_kfe, curvature=True),
    "soap": Method(adam_in_kfe, curvature=True),
}


def find_method(name: str) -> Method:
    """The table's entry for ``name``."""
    if name not in METHODS:
        raise ExperimentError(f"There is no optimizer '{name}'; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def optimizer_settings(config: ConfigDict, name: str) -> ConfigDict:
    """The sub-config of one optimizer, ``config.<name>``."""
    if name not in config:
        raise ExperimentError(
            f"The config has no settings for '{name}'; add 'config.{name} = "
            f"settings.{name}(...)' to its file."
        )
    return config[name]


def make_optimizer(
    name: str, settings: ConfigDict, run_steps: int, layers: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer ``name`` from its sub-config.

    Schedules become functions of the step, and every other field is handed to the constructor
    under its own name, so that a config file can set any option without a change here.

    Example::

        transform = make_optimizer("ekfac", config.ekfac, run_steps=980, layers=layers)
    """
    method = find_method(name)
    options = {
        field: make_schedule(value, run_steps) if isinstance(value, ConfigDict) else value
        for field, value in settings.items()
        if field not in _FIELDS_OF_THE_STEP and field != "max_kl"
    }
    learning_rate = options.pop("learning_rate")
    if method.curvature:
        if "max_kl" in settings:
            options["max_kl"] = _clip_bound(settings.max_kl, run_steps)
        return method.make(learning_rate, layers, **options)
    return optax.with_extra_args_support(method.make(learning_rate, **options))


def _clip_bound(max_kl: Any, run_steps: int) -> float | jax.Array | Schedule | None:
    """The bound of the KL clip; 0, or a schedule that starts there, stands for no clip, which is None.

    A flag of the command line cannot say None. A traced bound, of a sweep, cannot be asked; instead of
    0 it is infinite.
    """
    scheduled = isinstance(max_kl, ConfigDict)
    start = max_kl.value if scheduled else max_kl
    traced = isinstance(start, jax.Array)
    if not traced and not start:
        return None
    if not scheduled:
        return max_kl
    bound = make_schedule(max_kl, run_steps)
    if not traced:
        return bound
    return lambda count: jnp.where(start > 0, layerwise.value(bound, count), jnp.inf)


# Which Fisher the taps sample is an option of the differentiation, not of the transform.
_FIELDS_OF_THE_STEP = ("fisher", "num_samples")


def tap_options(settings: ConfigDict) -> dict[str, Any]:
    """The fields of a sub-config that go to ``kfe.value_grad_and_taps``."""
    return {field: settings[field] for field in _FIELDS_OF_THE_STEP if field in settings}
