"""ResNet20 with batch norm, on which TEKFAC is compared with its relatives (Gao et al. 2020).

``--config.model.batch_norm=False`` trains it without batch norm, from the kernels of George et al. (2018).
With CIFAR-10 (``--config.data_dir=...``) 200 epochs are ``--config.steps=78000``, and the schedules stretch
with them. Without it, the embedded digits in 32x32 pixels stand in.
"""

from ml_collections import ConfigDict

from kfe_optax.experiments import protocols


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    return protocols.with_batch_norm(
        "resnet20",
        "ResNet20 with batch norm",
        {"kind": "resnet", "depth": 20, "pre_activation": False},
        optimizer="tekfac",
    )
