"""``mnist_small.py`` on all devices with ``jax.pmap``: each has a copy of the state and its part of the batch.

On a machine without accelerators, ``XLA_FLAGS=--xla_force_host_platform_device_count=8`` makes eight devices of a CPU;
``--config.devices.distribute=inverses`` divides the eigendecompositions and inverses among them.
"""

from pathlib import Path

from ml_collections import ConfigDict

from kfe_optax.experiments.config_files import load_config


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = load_config(str(Path(__file__).with_name("mnist_small.py")))
    config.name = "mnist_small_pmap"
    config.devices.mode = "pmap"
    config.batch_size = 512  # which any power of two divides
    return config
