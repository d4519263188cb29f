"""The building blocks of a config file.

A config is plain data, so that every number can be set on the command line. A hyper-parameter that
may change during training is a small sub-config made by ``schedule``::

    config.ekfac = settings.ekfac(learning_rate=settings.schedule(0.1, "linear"), damping=0.01)

and is overridden as ``--config.ekfac.learning_rate.value=0.05``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict, config_dict

import kfe_optax as kfe
from kfe_optax.experiments.optimizers import BATCH_FIELDS, METHODS, STEP_FIELDS, find_method
from kfe_optax.experiments.options import fields_of
from kfe_optax.experiments.schedules import make_schedule as make_schedule
from kfe_optax.experiments.schedules import schedule as schedule

# Otherwise than the library's own defaults, the configs take the natural gradient's own step on all layers: their numbers are
# tuned to it.
_NATURAL = {
    **kfe.NATURAL,
    "max_change": None,
    "rest_kinds": (),
    "initial_refreshes": 1,
    "refreshes_per_doubling": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "ekfac": {"scale": "running", "scale_decay": 0.95, "damping_type": "plain"},
    "tekfac": {"scale_decay": 0.95},
    "kfac_tridiagonal": {"chains": "split"},
    "soap": {"b1": 0.9, "b2": 0.99},
    "kfac_adaptive": {"max_change": None},
}


def method(name: str, learning_rate: Any = None, damping: Any = None, **options: Any) -> ConfigDict:
    """The settings of an optimizer: a field for each of its options (see ``options.fields_of``) and for its taps.

    Numbers that may change in time may be schedules. In a config file ``settings.kfac(...)`` is ``settings.method("kfac", ...)``,
    and so for every name of ``optimizers.METHODS``. ``coarse_damping`` is ``damping``, now and when that is set later, unless
    it is given.

    Example::

        config.ekfac = settings.ekfac(settings.schedule(0.1, "linear"), 0.01, max_kl=0.3)
    """
    chosen = find_method(name)
    known = inspect.signature(chosen.make).parameters
    given = {"learning_rate": learning_rate, "damping": damping}
    fields: dict[str, Any] = {} if chosen.curvature else {"weight_decay": 0.0}
    if chosen.curvature:
        fields |= {"fisher": "sampled", "num_samples": 1, "statistics_fraction": 1.0}
    if chosen.self_tuning:
        fields["products_fraction"] = 1.0
    # Where they are given, for this optimizer in the place of the config's.
    fields |= {field: config_dict.placeholder(int) for field in BATCH_FIELDS}
    fields |= (_NATURAL if "max_kl" in known else {}) | _OWN.get(name, {})
    fields |= {option: value for option, value in given.items() if value is not None} | options
    found = fields_of(chosen.make, **fields)
    if "coarse_damping" in known and "coarse_damping" not in options:
        for part in found.damping:
            found.coarse_damping[part] = found.damping.get_oneway_ref(part)
    return found


def __getattr__(name: str) -> Callable[..., ConfigDict]:
    if name in METHODS:
        return functools.partial(method, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# From whom a method has its settings where a config file gives it none of its own, others than K-FAC; and fields of the
# same name that mean something else there, or are tuned to the other.
_RELATIVES = {
    "tekfac": ("ekfac", ("damping_type", "trace_floor", "scale_update_period", "scale_decay")),
    "soap": ("adam", ("b1", "b2", "eps")),
}


def with_relatives(config: ConfigDict) -> ConfigDict:
    """Gives every method that ``config`` leaves out the settings of its nearest relative in it, as far as it has them.

    Soap has Adam's learning rate and the number of its weight decay, which is decoupled there and an L2 penalty
    in Adam: another strength. They are a start for ``sweep``, not a tuned setting.
    """
    for name, chosen in METHODS.items():
        relative, others = _RELATIVES.get(name, ("kfac", ()))
        if name in config or not chosen.curvature:
            continue
        if chosen.self_tuning:
            config[name] = method(name)
        elif name == "spectral_kfac":
            config[name] = method(name, schedule(0.1, "linear", warmup=20))  # one rate for all networks
        elif name != "ekfac" and relative in config:
            known = {*inspect.signature(chosen.make).parameters, *STEP_FIELDS}
            shared = {field: value for field, value in config[relative].items() if field in known - {*others}}
            batches = {field: config[relative].get(field) for field in BATCH_FIELDS}
            config[name] = method(name, **shared)
            config[name].update({field: value for field, value in batches.items() if value is not None})
    return config


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
            # Of the order of the batches and of the split; none: the seed.
            "data_seed": config_dict.placeholder(int),
            "data_dir": "",
            "data": {
                "name": "mnist",
                "train_size": 0,
                "test_size": 0,
                "validation": 0,  # training examples that are set apart, by the data seed
                "normalize": False,  # mean 0 and standard deviation 1 in every channel
                "augment": "",  # of the training batches: "crop,flip"
                "channels": 1,  # of "digits32"
                "length": 128,  # characters of a sequence of text
                "variations": 50,  # of each of the "faces"
                "inputs": 10,  # of "planted"
                "outputs": 10,
                "noise": 0.0,
            },
            "model": {
                "kind": "autoencoder",
                "sizes": (784, 250, 30, 250, 784),
                "activation": "relu",
                "linear_code": True,
                "initializer": "lecun_normal",
            },
            "loss": "sigmoid_binary_cross_entropy",
            # Of the layers that the library finds: "PATTERN:OPTION=VALUE,...; PATTERN:without", as in "Conv_*:approximation=sua".
            "layers": "",
            "optimizer": "ekfac",
            "batch_size": 512,
            # Where a step runs; see 'experiments/parallel.py'.
            "devices": {
                "mode": "one",  # or several that share each batch: "sharded", "pmap", "shard_map"
                "count": 0,  # 0: all
                # Which linear algebra they divide: "inverses" or "inverses_and_apply".
                "distribute": "none",
            },
            # Several processes, each started with the same flags but for its own number. What 'cluster' leaves out
            # comes from the cluster's environment.
            "distributed": False,
            "cluster": {"coordinator": "", "process_id": -1, "num_processes": 0},
            # The decay of a running average of the parameters, which is evaluated in their place; 0: none.
            "averaging": 0.0,
            "steps": 980,
            "log_every": 10,
            "checkpoint_every": 500,
            # How often the loss on so many training images and on the whole other sets is recorded: "1 epoch",
            # "50 steps", or "end".
            "evaluate_every": "1 epoch",
            "evaluate_examples": 2000,
            "compare": {
                "optimizers": "adam,sgd,kfac,ekfac",
                # Of each: "300 steps", "20 epochs" or "30 seconds"; "" stands for config.steps.
                "budget": "",
                "seeds": 1,  # how many, from config.seed on
            },
            # 'kfe-optax sweep --help' explains the values.
            "sweep": {
                "search": "grid",
                "space": "",
                "objective": "train_loss",
                "trials": 25,
                "seeds": 1,
            },
            # 'kfe-optax diagnose --help' explains the values.
            "diagnose": {
                "layer": "",
                "optimizer": "adam",
                "steps": 150,
                "every": 5,
            },
        }
    )
