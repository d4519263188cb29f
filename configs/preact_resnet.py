"""A residual network of 18 layers with norm and ReLU before its convolutions, with batch norm.

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
    config.name = "preact_resnet"
    config.title = "Pre-activation ResNet18 with batch norm"
    config.model.update(depth=18, pre_activation=True)
    config.optimizer = "kfac"
    # The sides of 2,304 and 4,608 are then diagonal: to factorize them takes minutes on a CPU.
    for name in (
        "kfac",
        "ekfac",
        "tekfac",
        "tkfac",
        "kpsvd",
        "deflation",
        "lanczos",
        "kfac_corrected",
        "two_level_kfac",
        "kfac_tridiagonal",
    ):
        config[name].max_dim = 2048
    return config
