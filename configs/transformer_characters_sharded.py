"""``transformer_characters.py`` on all devices: ``jax.jit`` over a mesh, each batch divided among its devices.

``--config.devices.mode=shard_map`` is the same with ``jax.shard_map``.
"""

from pathlib import Path

from ml_collections import ConfigDict

from kfe_optax.experiments.config_files import load_config


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = load_config(str(Path(__file__).with_name("transformer_characters.py")))
    config.name = "transformer_characters_sharded"
    config.devices.mode = "sharded"
    return config
