"""A small vision transformer: 8x8 patches of 4x4 pixels through six blocks.

Without ``--config.data_dir=...`` the embedded digits, in 32x32 pixels, stand in for CIFAR-10.
"""

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("vit_small")
    config.title = "Vision transformer, 6 blocks of width 192"
    config.data.update(name="digits32", normalize=True, augment="crop,flip")
    config.model = ConfigDict(
        {
            "kind": "vision_transformer",
            "patch": 4,
            "width": 192,
            "depth": 6,
            "heads": 6,
            "hidden": 768,
            "dropout": 0.0,
            "classes": 10,
        }
    )
    config.loss = "softmax_cross_entropy"
    config.batch_size = 128
    config.steps = 400
    config.optimizer = "kfac"
    config.evaluate_examples = 500

    schedule = settings.schedule
    config.adam = settings.adam(schedule(1e-3, "cosine", warmup=20))
    config.sgd = settings.sgd(schedule(0.03, "cosine", warmup=20))
    common: dict[str, Any] = {"max_kl": 0.01, "initial_refreshes": 5}
    config.kfac = settings.kfac(schedule(0.1, "cosine", warmup=20), 0.03, **common)
    config.ekfac = settings.ekfac(schedule(0.1, "cosine", warmup=20), 0.03, **common)
    return settings.with_relatives(config)
