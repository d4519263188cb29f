"""ResNet110 with batch norm: 109 convolutions and a dense layer.

``--config.model.batch_norm=False`` trains it without batch norm, from the kernels of George et al. (2018).
With CIFAR-10 (``--config.data_dir=...``) 200 epochs are ``--config.steps=78000``, and the schedules stretch
with them. Without it, the embedded digits in 32x32 pixels stand in.
"""

from pathlib import Path

from ml_collections import ConfigDict

from kfe_optax.experiments.config_files import load_config


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = load_config(str(Path(__file__).with_name("resnet20.py")))
    config.name = "resnet110"
    config.title = "ResNet110 with batch norm"
    config.model.depth = 110
    config.optimizer = "kfac"
    return config
