"""VGG11 without batch norm, on which EKFAC is compared with K-FAC (George et al. 2018).

``--config.model.batch_norm=True`` adds batch norm.
With CIFAR-10 (``--config.data_dir=...``) 100 epochs are ``--config.steps=10000``, and the schedules stretch
with them. Without it, the embedded digits in 32x32 pixels stand in.
"""

from ml_collections import ConfigDict

from kfe_optax.experiments import protocols


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    return protocols.without_batch_norm(
        "vgg11",
        "VGG11",
        {"kind": "vgg", "depth": 11, "head": ()},
        batch_size=500,
        max_dim=protocols.AFFORDABLE,
    )
