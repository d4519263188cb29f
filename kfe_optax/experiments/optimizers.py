"""The table of optimizers that a config can name, each built from its sub-config."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.ranges import check_settings
from kfe_optax.experiments.schedules import Schedule, make_schedule


class Method(NamedTuple):
    """One line of the table.

    ``make`` takes a learning rate, the layers where ``curvature`` is set, and the sub-config's
    other fields by name. An optimizer without curvature is driven by a plain gradient, so that its
    steps cost what they cost without this library. A ``self_tuning`` one takes no learning rate: it
    finds the length of its steps itself, for which its taps also tell the loss at other parameters.
    """

    make: Callable[..., Any]
    curvature: bool
    self_tuning: bool = False


def _with_weight_decay(make: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizer with ``weight_decay`` times the parameters added to its gradient, an L2 penalty's."""

    @functools.wraps(make)
    def optimizer(learning_rate: Any, *, weight_decay: Any = 0.0, **options: Any) -> Any:
        transform = make(learning_rate, **options)
        if not isinstance(weight_decay, jax.Array) and not weight_decay:
            return transform
        return optax.chain(optax.add_decayed_weights(weight_decay), transform)

    own = inspect.signature(make)
    decay = inspect.Parameter("weight_decay", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=float)
    optimizer.__signature__ = own.replace(parameters=[*own.parameters.values(), decay])  # ty: ignore[missing-attribute]
    return optimizer


def adam_in_kfe(
    learning_rate: Any,
    layers: kfe.Layers,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    basis: str = "kfac",
    decay: Any = 0.95,
    factor_update_period: int = 10,
    basis_update_period: int = 50,
    initial_refreshes: int = 1,
    refresh: str = "eigh",
    refresh_tolerance: float | None = None,
    max_dim: int | None = None,
    distribute: Any = "none",
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of the factors named ``basis``.

    Args:
      learning_rate, layers, b1, b2, eps, weight_decay: see `kfe.soap`.
      basis: a key of `kfe.factors.FACTORS`.
      decay: ρ of the factors' running averages.
      factor_update_period, basis_update_period, initial_refreshes, refresh, refresh_tolerance, max_dim, distribute: see
        `kfe.in_kfe`.
    """
    options = locals()
    for name in ("learning_rate", "layers", "b1", "b2", "eps", "weight_decay", "basis", "decay"):
        del options[name]
    return optax.chain(
        kfe.in_kfe(optax.scale_by_adam(b1, b2, eps), layers, basis=_factors(basis, decay), **options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _factors(name: str, decay: Any) -> kfe.factors.Factors:
    if name not in kfe.factors.FACTORS:
        raise ExperimentError(
            f"There are no factors '{name}'; choose one of {', '.join(kfe.factors.FACTORS)}."
        )
    return kfe.factors.FACTORS[name](decay=decay)


def _preconditioner(name: str) -> Callable[..., Any]:
    if name not in kfe.METHODS:
        raise ExperimentError(f"There is no preconditioner '{name}'; choose one of {', '.join(kfe.METHODS)}.")
    return kfe.METHODS[name].scale_by


METHODS: Mapping[str, Method] = {
    "adam": Method(_with_weight_decay(optax.adam), curvature=False),
    "sgd": Method(_with_weight_decay(optax.sgd), curvature=False),
    **{name: Method(method.optimizer, curvature=True) for name, method in kfe.METHODS.items()},
    "adam_in_kfe": Method(adam_in_kfe, curvature=True),
    "soap": Method(kfe.soap, curvature=True),
    "kfac_adaptive": Method(kfe.kfac_adaptive, curvature=True, self_tuning=True),
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
    name: str, settings: ConfigDict, run_steps: int, layers: Any = None, distribute: str = "none"
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer ``name`` from its sub-config.

    Schedules become functions of the step, and every other field is handed to the constructor
    under its own name, so that a config file can set any option without a change here. ``distribute``
    goes to optimizers with curvature: which linear algebra the devices divide among themselves.

    Raises:
      ExperimentError: there is no such optimizer, a learning rate is missing, or is given to an optimizer
        that has none, a number cannot be, or the constructor refuses its options.

    Example::

        transform = make_optimizer("ekfac", config.ekfac, run_steps=980, layers=layers)
    """
    method = find_method(name)
    _check_learning_rate(name, method, settings)
    check_settings(name, settings, run_steps)
    with refusals(name, settings, constructing=True):
        return _constructed(name, method, settings, run_steps, layers, distribute)


def _constructed(
    name: str, method: Method, settings: ConfigDict, run_steps: int, layers: Any, distribute: str
) -> optax.GradientTransformationExtraArgs:
    options: dict[str, Any] = {
        field: make_schedule(value, run_steps) if isinstance(value, ConfigDict) else value
        for field, value in settings.items()
        if field not in STEP_FIELDS and field not in _BOUNDS
    }
    if method.curvature and distribute != "none":
        options["distribute"] = distribute
    for field in _BOUNDS:
        if field in settings:
            options[field] = _bound(field, settings[field], run_steps)
    # A flag of the command line cannot say None: an empty word is none, and a search every 0 steps.
    options = {
        field: None if isinstance(value, str) and not value else value for field, value in options.items()
    }
    if options.get("search_period") == 0:
        options["search_period"] = None
    # Objects, by the name of their registry.
    if options.get("factors") is not None:
        options["factors"] = _factors(options["factors"], options["decay"])
    if options.get("preconditioner") is not None:
        options["preconditioner"] = _preconditioner(options["preconditioner"])
    if method.self_tuning:
        return method.make(layers, **options)
    learning_rate = options.pop("learning_rate")
    if method.curvature:
        return method.make(learning_rate, layers, **options)
    return optax.with_extra_args_support(method.make(learning_rate, **options))


@contextlib.contextmanager
def refusals(name: str, settings: ConfigDict, *, constructing: bool = False) -> Generator[None, None, None]:
    """Where the library refuses what it is given, its sentence with the field of ``config.<name>`` that it speaks of.

    Only what the library itself raises: an error from anywhere else is a defect and keeps its traceback. While
    ``constructing`` an optimizer nothing is computed, and all that is wrong is what the config says.

    Example::

        with refusals("kfac", config.kfac):
            state = transform.init(params)
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # Subclasses are our own sentences, or JAX's about tracing.
        if not (of_library(error) or (constructing and type(error) in (TypeError, ValueError))):
            raise
        sentence = " ".join(str(error).split())
        raise ExperimentError(
            f"config.{_spoken_of(name, settings, sentence)} cannot be used: {sentence}"
        ) from error


def _spoken_of(name: str, settings: ConfigDict, sentence: str) -> str:
    """The field of the sub-config ``name`` that a sentence names first, or the sub-config where it names none."""
    # What `kfac_adaptive` calls damping_floor is the floor of the transform inside it.
    for prefix in ("", "damping_"):
        words = {field: re.search(rf"\b{field.removeprefix(prefix)}\b", sentence) for field in settings}
        places = {match.start(): field for field, match in words.items() if match}
        if places:
            return f"{name}.{places[min(places)]}"
    return name


def of_library(error: Exception) -> bool:
    """Whether it is a refusal of the library, whose sentence says all."""
    if type(error) not in (TypeError, ValueError):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    experiments = Path(__file__).parent
    return raised_in.is_relative_to(experiments.parent) and not raised_in.is_relative_to(experiments)


def _check_learning_rate(name: str, method: Method, settings: ConfigDict) -> None:
    if method.self_tuning:
        for field in ("learning_rate", "max_kl"):
            if settings.get(field) is not None:
                raise ExperimentError(
                    f"config.{name}.{field} is set, and '{name}' finds the length of its steps itself; leave it out."
                )
    elif settings.get("learning_rate") is None:
        raise ExperimentError(
            f"config.{name} has no learning rate; set config.{name}.learning_rate, as settings.{name}(...) does."
        )


_BOUNDS = ("max_kl", "max_change")


def _bound(field: str, setting: Any, run_steps: int) -> float | jax.Array | Schedule | None:
    """The bound of a clip; 0, or a schedule that starts there, stands for no clip, which is None.

    A flag of the command line cannot say None. A traced bound, of a sweep, cannot be asked; instead of
    0 it is infinite.
    """
    scheduled = isinstance(setting, ConfigDict)
    start = setting.value if scheduled else setting
    traced = isinstance(start, jax.Array)
    if not traced and not start:  # None or 0
        return None
    if not scheduled:
        return setting
    bound: Any = make_schedule(setting, run_steps)
    if not traced:
        return bound
    return lambda count: jnp.where(start > 0, bound(count) if callable(bound) else bound, jnp.inf)


# Which Fisher the taps sample is an option of the differentiation, not of the transform.
STEP_FIELDS = ("fisher", "num_samples")


def tap_options(name: str, settings: ConfigDict) -> dict[str, Any]:
    """What ``kfe.value_grad_and_taps`` is told: fields of the sub-config, and what the optimizer ``name`` needs."""
    options = {field: settings[field] for field in STEP_FIELDS if field in settings}
    return options | {"quadratic_model": True} if find_method(name).self_tuning else options
