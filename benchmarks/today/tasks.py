"""The tasks, the optimizers, and the numbers that are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optax

import kfe_optax as kfe
from kfe_optax.experiments.batches import make_batches
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.task import make_task

RATES = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)


class Recipe(NamedTuple):
    """An optimizer: `make(rate, layers, **options)`, and the middle of its five rates, the one that the documentation recommends.

    `space` has the further numbers of the random search: {option: (least, largest)}, each drawn with a uniform logarithm;
    "1-" before the name of one draws its distance from 1.
    """

    make: Callable[..., optax.GradientTransformation]
    unit: float
    space: Mapping[str, tuple[float, float]]
    curvature: bool = True
    quadratic_model: bool = False


def _in_kfe_adam(rate: Any, layers: Any, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    return optax.chain(
        kfe.in_kfe(optax.scale_by_adam(b1, b2), layers, rest=optax.scale_by_adam(b1, b2)),
        optax.scale_by_learning_rate(rate),
    )


def _kfac_adaptive(
    initial_damping: Any, layers: Any, max_change: float = 0.3
) -> optax.GradientTransformation:
    return kfe.kfac_adaptive(layers, initial_damping=initial_damping, max_change=max_change)


def _kfac_natural(
    rate: Any, layers: Any, damping: float = 1e-2, **options: Any
) -> optax.GradientTransformation:
    return kfe.kfac(rate, layers, damping, **kfe.NATURAL, **options)


_MOMENTUM, _SECOND = (0.02, 0.3), (1e-3, 0.1)
_ADAM = {"1-b1": _MOMENTUM, "1-b2": _SECOND}
_METHOD = {"damping": (0.3, 30.0), "1-momentum": _MOMENTUM}
_UNIT = 0.15

OPTIMIZERS: dict[str, Recipe] = {
    "sgd": Recipe(
        lambda rate, _, momentum=0.9, **o: optax.sgd(rate, momentum, True, **o),
        0.1,
        {"1-momentum": _MOMENTUM},
        False,
    ),
    "adam": Recipe(lambda rate, _, **o: optax.adam(rate, **o), 5e-3, _ADAM, False),
    "adamw": Recipe(
        lambda rate, _, **o: optax.adamw(rate, **o), 5e-3, _ADAM | {"weight_decay": (1e-4, 0.1)}, False
    ),
    "muon": Recipe(
        lambda rate, _, **o: optax.contrib.muon(rate, **o),
        2e-2,
        {"1-beta": _MOMENTUM, "1-adam_b2": _SECOND},
        False,
    ),
    "soap": Recipe(kfe.soap, 5e-3, _ADAM, False),
    "kfac": Recipe(kfe.kfac, _UNIT, _METHOD),
    "kfac_natural": Recipe(_kfac_natural, 0.1, {"damping": (1e-3, 0.1), "1-momentum": _MOMENTUM}),
    "ekfac": Recipe(kfe.ekfac, _UNIT, _METHOD),
    "tkfac": Recipe(kfe.tkfac, _UNIT, _METHOD),
    "in_kfe_adam": Recipe(_in_kfe_adam, 5e-3, _ADAM),
    "spectral_kfac": Recipe(kfe.spectral_kfac, 0.1, {"damping": (0.1, 10.0), "1-momentum": _MOMENTUM}),
    # It has no learning rate: the grid is of its first damping.
    "kfac_adaptive": Recipe(_kfac_adaptive, 1.0, {"max_change": (0.1, 1.0)}, quadratic_model=True),
}


class Setting(NamedTuple):
    """A task: a config of this repository, changed, and how many steps of it are taken."""

    config: str
    steps: int
    changes: Mapping[str, Any] = MappingProxyType({})
    data: str = ""  # the file of `--data`


_WIDE = {"model.width": 256, "model.depth": 4, "model.hidden": 1024, "model.heads": 4}
_VIT = {"model.width": 96, "model.depth": 3, "model.heads": 3, "model.hidden": 384, "data.augment": ""}

TASKS: dict[str, Setting] = {
    "characters": Setting("transformer_characters", 400, {}, "tinyshakespeare.txt"),
    "characters_wide": Setting("transformer_characters", 60, _WIDE, "tinyshakespeare.txt"),
    "vit": Setting("vit_small", 150, _VIT, "cifar10_10k.npz"),
    "resnet20": Setting("resnet20", 100, {"data.augment": ""}, "cifar10_10k.npz"),
    "resnet20_without_norm": Setting("resnet20_without_norm", 100, {}, "cifar10_10k.npz"),
    "experts": Setting(
        "transformer_characters", 150, {"model.experts": 4, "model.hidden": 128}, "tinyshakespeare.txt"
    ),
    "lstm": Setting("lstm_characters", 200, {"data.length": 64}, "tinyshakespeare.txt"),
    "mlp": Setting("mnist_classifier", 200, {"batch_size": 128}, "mnist.npz"),
    "mnist_autoencoder": Setting("mnist_autoencoder", 490, {}, "mnist.npz"),
    "curves_autoencoder": Setting("curves_autoencoder", 300),
    "faces_autoencoder": Setting("faces_autoencoder", 60),
}


class Problem(NamedTuple):
    """A task with its data, ready to train."""

    task: Any
    dataset: Any
    batches: Any
    steps: int


def problem_of(name: str, seed: int, data: str) -> Problem:
    setting = TASKS[name]
    changes = dict(setting.changes)
    if data and setting.data:
        changes["data_dir"] = str(Path(data) / setting.data)
    return configured(setting.config, changes, seed, setting.steps)


def configured(name: str, changes: Mapping[str, Any], seed: int = 0, steps: int = 0) -> Problem:
    """A config of this repository, with changes."""
    config = load_config(f"configs/{name}.py")
    config.update_from_flattened_dict(dict(changes))
    dataset = load(config)
    return Problem(make_task(config, dataset), dataset, make_batches(config, dataset, seed), steps)


def trial_of(recipe: Recipe, trial: int) -> tuple[float, dict[str, float]]:
    """The rate and the further options of a trial: the same rate on the logarithmic scale for every optimizer."""
    rng = np.random.default_rng(trial)
    rate = recipe.unit * 10 ** rng.uniform(-1, 1)
    options = {}
    for name, (least, largest) in recipe.space.items():
        drawn = float(np.exp(rng.uniform(np.log(least), np.log(largest))))
        options[name.removeprefix("1-")] = 1 - drawn if name.startswith("1-") else drawn
    return rate, options
