"""A character Transformer: 128 characters of text, each time the next one.

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
    config.title = "Character Transformer, 4 blocks of width 128"
    config.data.update(name="topics", length=128)
    config.model = ConfigDict(
        {
            "kind": "transformer",
            "width": 128,
            "depth": 4,
            "heads": 4,
            "hidden": 512,
            "dropout": 0.0,
            "tied": False,
            "scan": False,
        }
    )
    config.loss = "softmax_cross_entropy"
    config.batch_size = 64
    config.steps = 1000
    config.optimizer = "kfac"
    config.compare.examples = 256

    schedule = settings.schedule
    config.adam = settings.adam(schedule(2e-3, "linear", warmup=50))
    config.sgd = settings.sgd(schedule(0.1, "linear", warmup=50))
    common: dict[str, Any] = {"max_kl": 0.01, "initial_refreshes": 5}
    config.kfac = settings.kfac(schedule(0.1, "linear", warmup=20), 0.01, **common)
    config.ekfac = settings.ekfac(schedule(0.1, "linear", warmup=20), 0.01, **common)
    return settings.with_relatives(config)
