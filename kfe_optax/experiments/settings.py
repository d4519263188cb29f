"""The building blocks of a config file.

A config is plain data, so that every number can be set on the command line. A hyper-parameter that
may change during training is a small sub-config made by ``schedule``::

    config.ekfac = settings.ekfac(learning_rate=settings.schedule(0.1, "linear"), damping=0.01)

and is overridden as ``--config.ekfac.learning_rate.value=0.05``.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments.schedules import as_schedule
from kfe_optax.experiments.schedules import make_schedule as make_schedule
from kfe_optax.experiments.schedules import schedule as schedule


def adam(learning_rate: float | ConfigDict, **options: Any) -> ConfigDict:
    """Adam's settings; ``options`` go to ``optax.adam``, but for ``weight_decay``, an L2 penalty's."""
    return ConfigDict(
        {"learning_rate": as_schedule(learning_rate), "b1": 0.9, "b2": 0.999, "eps": 1e-8} | options
    )


def sgd(learning_rate: float | ConfigDict, **options: Any) -> ConfigDict:
    """The settings of gradient descent with momentum; ``options`` go to ``optax.sgd``, but for
    ``weight_decay``, an L2 penalty's."""
    return ConfigDict(
        {"learning_rate": as_schedule(learning_rate), "momentum": 0.9, "nesterov": True} | options
    )


def kfac(learning_rate: float | ConfigDict, damping: float | ConfigDict, **options: Any) -> ConfigDict:
    """K-FAC's settings; ``options`` go to ``kfe_optax.kfac``, except ``fisher``."""
    method = {"inverse_update_period": 50, "damping_type": "factored"}
    return _curvature_settings(learning_rate, damping, method | options)


# They all keep damped inverses of Kronecker terms and have one set of options.
tkfac = kpsvd = deflation = lanczos = kfac_corrected = kfac


def two_level_kfac(
    learning_rate: float | ConfigDict, damping: float | ConfigDict, **options: Any
) -> ConfigDict:
    """The settings of two-level K-FAC; ``options`` go to ``kfe_optax.two_level_kfac``, except ``fisher``.

    ``coarse_damping`` is ``damping`` unless it is given.
    """
    coarse = {"coarse": "constant", "coarse_damping": as_schedule(damping)}
    return kfac(learning_rate, damping, **(coarse | options))


def kfac_tridiagonal(
    learning_rate: float | ConfigDict, damping: float | ConfigDict, **options: Any
) -> ConfigDict:
    """The settings of K-FAC with a block-tridiagonal inverse; ``options`` go to
    ``kfe_optax.kfac_tridiagonal``, except ``fisher``.

    With ``chains="split"``, the default here, a network that is no chain is several.
    """
    method = {"inverse_update_period": 50, "chains": "split"}
    return _curvature_settings(learning_rate, damping, method | options)


def kfac_adaptive(**options: Any) -> ConfigDict:
    """The settings of K-FAC that needs no learning rate; ``options`` go to ``kfe_optax.kfac_adaptive``,
    except ``fisher``. A ``search_period`` of 0 is no search, a ``max_change`` of 0 no bound.
    """
    method = {"fisher": "sampled", "initial_damping": 1.0, "damping_floor": 1e-8, "max_change": 0.0}
    return ConfigDict(method | options)


def spectral_kfac(
    learning_rate: float | ConfigDict, damping: float | ConfigDict = 1.0, **options: Any
) -> ConfigDict:
    """The settings of spectral K-FAC, whose damping is relative; ``options`` go to ``kfe_optax.spectral_kfac``,
    except ``fisher``.
    """
    method = {
        "learning_rate": as_schedule(learning_rate),
        "damping": as_schedule(damping),
        "fisher": "sampled",
        "size": "operator",
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.0,
        "decay": 0.95,
        "factor_update_period": 25,
        "inverse_update_period": 50,
        "initial_refreshes": 1,
    }
    return ConfigDict(method | options)


def ekfac(learning_rate: float | ConfigDict, damping: float | ConfigDict, **options: Any) -> ConfigDict:
    """EKFAC's settings; ``options`` go to ``kfe_optax.ekfac``, except ``fisher``."""
    method = {
        "basis_update_period": 50,
        "scale": "running",
        "scale_decay": 0.95,
        "damping_type": "plain",
    }
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
        "learning_rate": as_schedule(learning_rate),
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
    "two_level_kfac": "kfac",
    "kfac_tridiagonal": "kfac",
    "tekfac": "ekfac",
    "adam_in_kfe": "adam",
    "soap": "adam",
}
_MAKERS = {
    "two_level_kfac": two_level_kfac,
    "kfac_tridiagonal": kfac_tridiagonal,
    "tekfac": tekfac,
    "adam_in_kfe": adam_in_kfe,
    "soap": soap,
}
_OF_KFAC_ALONE = {"kfac_tridiagonal": ("damping_type",)}


def with_relatives(config: ConfigDict) -> ConfigDict:
    """Gives every method that ``config`` leaves out the settings of its nearest relative in it.

    A relative of K-FAC takes all of K-FAC's settings that it has, TEKFAC what it shares with EKFAC, and Adam in
    an eigenbasis Adam's learning rate and the number of its weight decay, which is decoupled there and an L2 penalty
    in Adam: another strength. They are a start for ``sweep``, not a tuned setting.
    """
    if "kfac_adaptive" not in config:
        config.kfac_adaptive = kfac_adaptive()
    if "spectral_kfac" not in config:
        # One rate for all networks.
        config.spectral_kfac = spectral_kfac(schedule(0.1, "linear", warmup=20))
    for name, relative in _RELATIVES.items():
        if name in config or relative not in config:
            continue
        if relative == "kfac":
            shared = {
                key: value for key, value in config.kfac.items() if key not in _OF_KFAC_ALONE.get(name, ())
            }
            config[name] = _MAKERS.get(name, kfac)(**shared)
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
    "relative_damping",
    "size",
    "rest_kinds",
    "max_kl",
    "max_change",
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

    It is the natural gradient's own step, as ``kfe_optax.NATURAL`` is, of all layers; a ``size`` of "" is none.
    ``max_kl`` is the bound of the KL clip, a number or a schedule, 0 for none, and ``max_change`` that of each
    layer's step, which the configs do without: their numbers are tuned.
    """
    common = {
        "learning_rate": as_schedule(learning_rate),
        "damping": as_schedule(damping),
        "fisher": "sampled",
        "momentum": 0.9,
        "nesterov": False,
        "relative_damping": False,
        "size": "",
        "rest_kinds": (),
        "max_kl": 0.01,
        "max_change": 0.0,
        "weight_decay": 0.0,
        "decay": 0.95,
        "factor_update_period": 10,
        "initial_refreshes": 1,
    }
    own: dict[str, Any] = common | method
    for field in ("max_kl", "max_change"):
        if isinstance(own[field], ConfigDict):
            own[field] = as_schedule(own[field])
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
            # Over so many steps the batch grows to 'largest' examples (0: the whole training set); each of
            # 'sizes' sizes is a compilation. 0 steps: it does not grow.
            "batch_growth": {"steps": 0, "largest": 0, "sizes": 6},
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
