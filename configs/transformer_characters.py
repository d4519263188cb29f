"""A character Transformer: 64 characters of text, each time the next one.

It trains on the help topics of Python's standard library, or on the text file that
``--config.data_dir=...`` names. ``--config.model.scan=True`` makes a loop of the blocks,
``--config.model.tied=True`` shares the embedding with the last layer.
"""

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("transformer_characters")
    config.title = "Character Transformer, 2 blocks of width 64"
    config.data.update(name="topics", length=64)
    config.model = ConfigDict(
        {
            "kind": "transformer",
            "width": 64,
            "depth": 2,
            "heads": 4,
            "hidden": 256,
            "dropout": 0.0,
            "tied": False,
            "scan": False,
            "experts": 1,
        }
    )
    config.loss = "softmax_cross_entropy"
    config.batch_size = 64
    config.steps = 400
    config.optimizer = "soap"
    config.compare.optimizers = "adam,kfac,ekfac,soap"
    config.evaluate_examples = 512

    schedule = settings.schedule
    # The best of 2e-3 to 3e-2 in factors of two for 400 steps on tiny Shakespeare.
    config.adam = settings.adam(schedule(1.6e-2, "linear", warmup=50))
    config.sgd = settings.sgd(schedule(0.1, "linear", warmup=50))
    # A gradient's mean over 4,096 characters is no small part of its square: the batch's own scale.
    common: dict[str, Any] = {"max_kl": 2e-3, "initial_refreshes": 5}
    rate = schedule(0.1, "linear", warmup=20)
    config.kfac = settings.kfac(rate, 1e-3, inverse_update_period=20, **common)
    config.ekfac = settings.ekfac(
        rate, 1e-3, scale="batch", scale_update_period=5, basis_update_period=20, **common
    )
    config.soap = settings.soap(schedule(8e-3, "linear", warmup=50), basis_update_period=20)
    return settings.with_relatives(config)
