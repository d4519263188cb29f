"""ResNet34 without batch norm, on which EKFAC is compared with K-FAC (George et al. 2018).

``--config.model.batch_norm=True`` adds batch norm.
With CIFAR-10 (``--config.data_dir=...``) 100 epochs are ``--config.steps=25000``, and the schedules stretch
with them. Without it, the embedded digits in 32x32 pixels stand in.
"""

from pathlib import Path

from ml_collections import ConfigDict

from kfe_optax.experiments.config_files import load_config


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = load_config(str(Path(__file__).with_name("vgg11.py")))
    config.name = "resnet34"
    config.title = "ResNet34"
    config.model = ConfigDict(
        {
            "kind": "resnet",
            "depth": 34,
            "pre_activation": False,
            "batch_norm": False,
            "width": 1.0,
            "classes": 10,
        }
    )
    config.batch_size = 200
    return config
