"""The building blocks of a config file, and the schedules that they describe.

A config is plain data, so that every number can be set on the command line. A hyper-parameter that
may change during training is a small sub-config made by ``schedule``::

    config.ekfac = settings.ekfac(learning_rate=settings.schedule(0.1, "linear"), damping=0.01)

and is overridden as ``--config.ekfac.learning_rate.value=0.05``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kfe_optax.experiments.errors import ExperimentError

Schedule = Callable[[jax.Array], jax.Array]

_KINDS = ("constant", "linear", "cosine", "exponential", "steps")


def schedule(
    value: float,
    kind: str = "constant",
    *,
    end: float = 0.0,
    warmup: int = 0,
    steps: int = 0,
    boundaries: tuple[float, ...] = (),
    factor: float = 0.1,
) -> ConfigDict:
    """Describes a hyper-parameter over time.

    Args:
      value: the value that is held, or from which the schedule departs.
      kind: ``"constant"``, ``"linear"``, ``"cosine"``, ``"exponential"`` or ``"steps"``.
      end: the value at the end of a linear, cosine or exponential schedule; positive for the last.
      warmup: steps over which the value first grows linearly from zero; they count in ``steps``.
      steps: the step at which ``end`` is reached; 0 stands for the length of the run.
      boundaries: for ``"steps"``, fractions of ``steps``: from each of them on the value is
        multiplied by ``factor`` once more.
      factor: for ``"steps"``, see ``boundaries``.

    Example::

        # Of 200 epochs, 0.1 for the first 100, 0.01 to the 150th, then 0.001.
        schedule(0.1, "steps", boundaries=(0.5, 0.75), factor=0.1)

    On the command line: ``--config.sgd.learning_rate.boundaries="(0.5, 0.75)"``.
    """
    return ConfigDict(
        {
            "value": float(value),
            "kind": kind,
            "end": float(end),
            "warmup": int(warmup),
            "steps": int(steps),
            "boundaries": tuple(map(float, boundaries)),
            "factor": float(factor),
        }
    )


def _as_schedule(value: float | ConfigDict) -> ConfigDict:
    # A copy: two optimizers that share a schedule in a config file are set one by one on the command line.
    return ConfigDict(value.to_dict()) if isinstance(value, ConfigDict) else schedule(value)


def adam(learning_rate: float | ConfigDict, **options: Any) -> ConfigDict:
    """Adam's settings; ``options`` go to ``optax.adam``."""
    return ConfigDict(
        {"learning_rate": _as_schedule(learning_rate), "b1": 0.9, "b2": 0.999, "eps": 1e-8} | options
    )


def sgd(learning_rate: float | ConfigDict, **options: Any) -> ConfigDict:
    """The settings of gradient descent with momentum; ``options`` go to ``optax.sgd``."""
    return ConfigDict(
        {"learning_rate": _as_schedule(learning_rate), "momentum": 0.9, "nesterov": True} | options
    )


def kfac(learning_rate: float | ConfigDict, damping: float | ConfigDict, **options: Any) -> ConfigDict:
    """K-FAC's settings; ``options`` go to ``kfe_optax.kfac``, except ``fisher``."""
    method = {"inverse_update_period": 50, "damping_type": "factored"}
    return _curvature_settings(learning_rate, damping, method | options)


# They all keep damped inverses of Kronecker terms and have one set of options.
tkfac = kpsvd = deflation = lanczos = kfac_corrected = kfac


def ekfac(learning_rate: float | ConfigDict, damping: float | ConfigDict, **options: Any) -> ConfigDict:
    """EKFAC's settings; ``options`` go to ``kfe_optax.ekfac``, except ``fisher``."""
    method = {"basis_update_period": 50, "scale": "running", "scale_decay": 0.95}
    return _curvature_settings(learning_rate, damping, method | options)


def tekfac(learning_rate: float | ConfigDict, damping: float | ConfigDict, **options: Any) -> ConfigDict:
    """TEKFAC's settings; ``options`` go to ``kfe_optax.tekfac``, except ``fisher``."""
    method = {"basis_update_period": 50, "scale_update_period": 10, "scale_decay": 0.95}
    return _curvature_settings(learning_rate, damping, method | options)


def adam_in_kfe(learning_rate: float | ConfigDict, **options: Any) -> ConfigDict:
    """The settings of Adam in a Kronecker-factored eigenbasis.

    ``basis`` names the factors, a key of ``kfe_optax.factors.FACTORS``, and ``decay`` is theirs;
    other ``options`` go to ``kfe_optax.in_kfe``, except ``fisher``.
    """
    method = {
        "learning_rate": _as_schedule(learning_rate),
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "basis": "kfac",
        "decay": 0.95,
        "factor_update_period": 10,
        "basis_update_period": 50,
        "initial_refreshes": 1,
        "refresh": "eigh",
    }
    return ConfigDict(method | options)


def soap(learning_rate: float | ConfigDict, **options: Any) -> ConfigDict:
    """SOAP's settings: those of ``adam_in_kfe`` with factors of the mean gradient at every step."""
    method = {"basis": "gradient", "factor_update_period": 1, "basis_update_period": 10, "refresh": "qr"}
    return adam_in_kfe(learning_rate, **(method | options))


# From whom a method has its settings where a config file gives it none of its own.
_RELATIVES = {
    "tkfac": "kfac",
    "kpsvd": "kfac",
    "deflation": "kfac",
    "lanczos": "kfac",
    "kfac_corrected": "kfac",
    "tekfac": "ekfac",
    "adam_in_kfe": "adam",
    "soap": "adam",
}
_MAKERS = {"tekfac": tekfac, "adam_in_kfe": adam_in_kfe, "soap": soap}


def with_relatives(config: ConfigDict) -> ConfigDict:
    """Gives every method that ``config`` leaves out the settings of its nearest relative in it.

    A relative of K-FAC takes all of K-FAC's settings, TEKFAC what it shares with EKFAC, and Adam in
    an eigenbasis Adam's learning rate. They are a start for ``sweep``, not a tuned setting.
    """
    for name, relative in _RELATIVES.items():
        if name in config or relative not in config:
            continue
        block = config[relative].to_dict()
        if name in _MAKERS:
            known = _MAKERS[name](**{key: 0.0 for key in ("learning_rate", "damping") if key in block})
            block = known.to_dict() | {
                key: value for key, value in block.items() if key in _SHARED & set(known)
            }
        config[name] = ConfigDict(block)
    return config


_SHARED = {
    "learning_rate",
    "damping",
    "momentum",
    "nesterov",
    "max_kl",
    "weight_decay",
    "decay",
    "basis_update_period",
    "factor_update_period",
    "initial_refreshes",
}


def _curvature_settings(
    learning_rate: float | ConfigDict, damping: float | ConfigDict, method: dict[str, Any]
) -> ConfigDict:
    """What the optimizers with curvature have in common, written out so that it can be overridden.

    ``max_kl`` is the bound of the KL clip, a number or a schedule, 0 for none.
    """
    common = {
        "learning_rate": _as_schedule(learning_rate),
        "damping": _as_schedule(damping),
        "fisher": "sampled",
        "momentum": 0.9,
        "nesterov": False,
        "max_kl": 0.01,
        "weight_decay": 0.0,
        "decay": 0.95,
        "factor_update_period": 10,
        "initial_refreshes": 1,
    }
    own = common | method
    if isinstance(own["max_kl"], ConfigDict):
        own["max_kl"] = _as_schedule(own["max_kl"])
    return ConfigDict(own)


def base_config(name: str) -> ConfigDict:
    """The fields that every experiment has, with values that a config file then changes.

    Example::

        def get_config():
            config = settings.base_config("mnist_autoencoder")
            config.model.sizes = (784, 250, 30, 250, 784)
            config.adam = settings.adam(1e-3)
            return config
    """
    return ConfigDict(
        {
            "name": name,
            "title": name,
            "seed": 0,
            "data_dir": "",
            "data": {
                "name": "mnist",
                "train_size": 0,
                "test_size": 0,
                "normalize": False,  # mean 0 and standard deviation 1 in every channel
                "augment": "",  # of the training batches: "crop,flip"
                "channels": 1,  # of "digits32"
                "length": 128,  # characters of a sequence of text
            },
            "model": {
                "kind": "autoencoder",
                "sizes": (784, 250, 30, 250, 784),
                "activation": "relu",
                "linear_code": True,
                "initializer": "lecun_normal",
            },
            "loss": "sigmoid_binary_cross_entropy",
            "optimizer": "ekfac",
            "batch_size": 512,
            "steps": 980,
            "log_every": 10,
            "checkpoint_every": 500,
            "compare": {
                "optimizers": "adam,sgd,kfac,ekfac",
                "steps": 0,
                "seconds": 0.0,
                "examples": 2000,
            },
            # 'kfe-optax sweep --help' explains the values.
            "sweep": {
                "search": "grid",
                "learning_rate": "x0.1:x10:5",
                "damping": "x0.1:x10:5",
                "max_kl": "",
                "others": "",
                "trials": 25,
                "seeds": "",
                "steps": 0,
                "examples": 0,
                "chunk": 5,
            },
            # 'kfe-optax diagnose --help' explains the values.
            "diagnose": {
                "layer": "",
                "optimizer": "adam",
                "steps": 150,
                "every": 5,
                "basis_update_period": 50,
                "examples": 0,
                "decay": 0.95,
                "running_examples": 128,
                "window": 60,
                "spectrum_limit": 1500,
                "coordinates": 36,
                "tolerance": 1e-5,
                "max_iterations": 500,
            },
        }
    )


def make_schedule(settings: ConfigDict, run_steps: int) -> float | Schedule:
    """The Optax schedule, or the plain number, that a sub-config made by ``schedule`` describes.

    ``run_steps`` is the length of the run, where the sub-config does not name its own.
    """
    value, kind, end = settings.value, settings.kind, settings.end
    warmup, steps = settings.warmup, settings.steps or run_steps
    if kind not in _KINDS:
        raise ExperimentError(f"A schedule's kind is '{kind}'; choose one of {', '.join(_KINDS)}.")
    # Traced values, of a sweep, cannot be asked; the sweep has checked them.
    known = not any(isinstance(number, jax.Array) for number in (value, end))
    if kind == "exponential" and known and not (value > 0.0 and end > 0.0):
        raise ExperimentError(
            f"An exponential schedule goes from {value:g} to {end:g}; both must be positive: set "
            "its 'value' and 'end'."
        )
    if kind == "constant" and warmup == 0:
        return value
    if kind == "steps":
        _check_steps(settings)
    # Of a run of 50 steps, 0.14 is step 7 although 0.14 * 50 is a little more.
    places = [math.ceil(fraction * steps - 1e-6) for fraction in settings.boundaries]

    def at(count: jax.Array) -> jax.Array:
        # The step about to be taken counts, so that the first step of a warm-up is not lost.
        rise = jnp.minimum(1.0, (count + 1) / max(warmup, 1)) if warmup else 1.0
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if kind == "linear":
            level = value + (end - value) * progress
        elif kind == "cosine":
            level = end + (value - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif kind == "exponential":
            level = value * (end / value) ** progress
        elif kind == "steps":
            passed = sum(jnp.where(count >= place, 1, 0) for place in places)
            level = value * settings.factor**passed
        else:
            level = jnp.asarray(value)
        return rise * level

    return at


def _check_steps(settings: ConfigDict) -> None:
    """Refuses boundaries that are not fractions of the run in order, and factors that end it."""
    boundaries, factor = settings.boundaries, settings.factor
    rising = all(low < high for low, high in zip((0.0, *boundaries), (*boundaries, 1.0), strict=True))
    if not boundaries or not rising:
        raise ExperimentError(
            f"The boundaries of a schedule in steps are {boundaries}; give rising fractions of the run between 0 "
            "and 1, as in (0.5, 0.75)."
        )
    if not isinstance(factor, jax.Array) and not factor > 0.0:
        raise ExperimentError(f"The factor of a schedule in steps is {factor:g}; it must be positive.")
