"""A recurrent language model of characters: 128 characters of text, each time the next one.

It trains on the help topics of Python's standard library, or on the text file that
``--config.data_dir=...`` names. ``--config.model.cell=gru`` takes gated recurrent units.
"""

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("lstm_characters")
    config.title = "Character LSTM of width 256"
    config.data.update(name="topics", length=128)
    config.model = ConfigDict(
        {
            "kind": "recurrent",
            "cell": "lstm",
            "embedding": 64,
            "width": 256,
            "depth": 1,
            "dropout": 0.0,
        }
    )
    config.loss = "softmax_cross_entropy"
    config.batch_size = 64
    config.steps = 1000
    config.optimizer = "kfac"
    config.evaluate_examples = 256

    schedule = settings.schedule
    config.adam = settings.adam(schedule(4e-3, "linear", warmup=50))
    config.sgd = settings.sgd(schedule(0.3, "linear", warmup=50))
    common: dict[str, Any] = {"max_kl": 0.01, "initial_refreshes": 5}
    config.kfac = settings.kfac(schedule(0.1, "linear", warmup=20), 0.01, **common)
    config.ekfac = settings.ekfac(schedule(0.1, "linear", warmup=20), 0.01, **common)
    # A cell's layers are used once a character, so that only whole texts tell how large their gradients are.
    paired: dict[str, Any] = {"pairing": "example", **common}
    config.tkfac = settings.tkfac(schedule(0.1, "linear", warmup=20), 0.01, **paired)
    config.tekfac = settings.tekfac(schedule(0.1, "linear", warmup=20), 0.01, **paired)
    return settings.with_relatives(config)
