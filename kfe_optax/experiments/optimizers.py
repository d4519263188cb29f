"""The table of optimizers that a config can name, each built from its sub-config."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optax
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.errors import ExperimentError, require
from kfe_optax.experiments.ranges import check_settings
from kfe_optax.experiments.schedules import make_schedule


class Method(NamedTuple):
    """One line of the table.

    ``make`` takes a learning rate, the layers where ``curvature`` is set, and the sub-config's other fields by name.
    Without curvature the gradient is a plain one, to which ``weight_decay`` times the parameters is added. A
    ``self_tuning`` optimizer takes no learning rate: it finds the length of its steps itself, for which its taps also tell
    the loss at other parameters.
    """

    make: Callable[..., Any]
    curvature: bool
    self_tuning: bool = False


# A new optimizer is a line here.
METHODS: Mapping[str, Method] = {
    "adam": Method(optax.adam, curvature=False),
    "sgd": Method(optax.sgd, curvature=False),
    **{name: Method(method.optimizer, curvature=True) for name, method in kfe.METHODS.items()},
    "soap": Method(kfe.soap, curvature=True),
    "kfac_adaptive": Method(kfe.kfac_adaptive, curvature=True, self_tuning=True),
}
# Of a sub-config's fields, what is told to the differentiation and not to the transform: which Fisher the taps
# sample, from which part of the batch; and what an optimizer may have otherwise than the config: its batches.
STEP_FIELDS = ("fisher", "num_samples", "statistics_fraction", "products_fraction")
BATCH_FIELDS = ("batch_size", "data_seed")


def _named(kind: str, registry: Mapping[str, Any], name: str) -> Any:
    require(name in registry, f"There {kind} '{name}'; choose one of {', '.join(registry)}.")
    return registry[name]


def find_method(name: str) -> Method:
    """The table's entry for ``name``."""
    return _named("is no optimizer", METHODS, name)


def optimizer_settings(config: ConfigDict, name: str) -> ConfigDict:
    """The sub-config of one optimizer, ``config.<name>``."""
    words = (
        f"The config has no settings for '{name}'; add 'config.{name} = settings.{name}(...)' to its file."
    )
    require(name in config, words)
    return config[name]


def config_of(config: ConfigDict, name: str) -> ConfigDict:
    """The config with the batch size and the data seed that ``config.<name>`` has of its own."""
    find_method(name)
    settings = optimizer_settings(config, name)
    own = {field: settings[field] for field in BATCH_FIELDS if settings.get(field) is not None}
    return ConfigDict({**config, **own}) if own else config


def make_optimizer(
    name: str, settings: ConfigDict, run_steps: int, layers: Any = None, distribute: str = "none"
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer ``name`` from its sub-config.

    Schedules become functions of the step, and every other field is handed to the constructor
    under its own name, so that a config file can set any option without a change here. ``distribute``
    goes to optimizers with curvature: which linear algebra the devices divide among themselves.
    """
    method = find_method(name)
    words = f"config.{name} has no learning rate; set config.{name}.learning_rate"
    has_rate = settings.get("learning_rate") is not None
    require(method.self_tuning or has_rate, f"{words}, as settings.{name}(...) does.")
    check_settings(name, settings)
    with refusals(name, settings, constructing=True):
        options = {
            field: _option(field, value, run_steps)
            for field, value in settings.items()
            if field not in STEP_FIELDS + BATCH_FIELDS
        }
        # Objects, by the name of their registry.
        if options.get("factors") is not None:
            factors = _named("are no factors", kfe.factors.FACTORS, options["factors"])
            options["factors"] = factors(decay=options["decay"])
        if options.get("preconditioner") is not None:
            named = _named("is no preconditioner", kfe.METHODS, options["preconditioner"])
            options["preconditioner"] = named.scale_by
        if method.curvature and distribute != "none":
            options["distribute"] = distribute
        rate = () if method.self_tuning else (options.pop("learning_rate"),)
        if method.curvature:
            return method.make(*rate, layers, **options)
        # An L2 penalty's, added to the gradient.
        decay = options.pop("weight_decay", 0.0)
        transform = method.make(*rate, **options)
        transform = optax.chain(optax.add_decayed_weights(decay), transform) if decay else transform
        return optax.with_extra_args_support(transform)


def _option(field: str, value: Any, run_steps: int) -> Any:
    """What a constructor is told: a flag of the command line cannot say None, and says "", or 0 for no clip and no search."""
    start = value.value if isinstance(value, ConfigDict) else value
    if not start and (isinstance(value, str) or field in ("max_kl", "max_change", "search_period")):
        return None
    return make_schedule(value, run_steps) if isinstance(value, ConfigDict) else value


def tap_options(name: str, settings: ConfigDict) -> dict[str, Any]:
    """What ``kfe.value_grad_and_taps`` is told: fields of the sub-config, and what the optimizer ``name`` needs."""
    options = {field: settings[field] for field in STEP_FIELDS if field in settings}
    return options | {"quadratic_model": True} if find_method(name).self_tuning else options


@contextlib.contextmanager
def refusals(name: str, settings: ConfigDict, *, constructing: bool = False) -> Generator[None, None, None]:
    """Where the library refuses what it is given, its sentence with the field of ``config.<name>`` that it speaks of.

    Only what the library itself raises: an error from anywhere else is a defect and keeps its traceback. While
    ``constructing`` an optimizer nothing is computed, and all that is wrong is what the config says.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # Subclasses are our own sentences, or JAX's about tracing.
        if not (of_library(error) or (constructing and type(error) in (TypeError, ValueError))):
            raise
        sentence = " ".join(str(error).split())
        # The field that it names first. What `kfac_adaptive` calls damping_floor is the floor of the transform inside it.
        place = name
        for prefix in ("damping_", ""):
            words = {field: re.search(rf"\b{field.removeprefix(prefix)}\b", sentence) for field in settings}
            starts = {match.start(): field for field, match in words.items() if match}
            place = f"{name}.{starts[min(starts)]}" if starts else place
        raise ExperimentError(f"config.{place} cannot be used: {sentence}") from error


def of_library(error: Exception) -> bool:
    """Whether it is a refusal of the library, whose sentence says all."""
    if type(error) not in (TypeError, ValueError):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    experiments = Path(__file__).parent
    return raised_in.is_relative_to(experiments.parent) and not raised_in.is_relative_to(experiments)
