"""VGG16 with batch norm, on which TEKFAC is compared with its relatives (Gao et al. 2020).

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
    config.name = "vgg16"
    config.title = "VGG16 with batch norm"
    config.model = ConfigDict({"kind": "vgg", "depth": 16, "batch_norm": True, "width": 1.0, "classes": 10})
    # The sides of 2,304 and 4,608 are then diagonal: to factorize them takes minutes on a CPU.
    for own in config.values():
        if isinstance(own, ConfigDict) and "max_dim" in own:
            own.max_dim = 2048
    return config
