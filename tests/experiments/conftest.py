"""A tiny task for the training job: 8x8 images in an ``.npz``, and a config file that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as compilation_cache_lib
from ml_collections import ConfigDict

from kfe_optax.experiments import settings

TINY_CONFIG = """
from kfe_optax.experiments import settings

def get_config():
    config = settings.base_config("tiny")
    config.data_dir = {data_dir!r}
    config.model.sizes = (64, 6, 64)
    config.batch_size = 16
    config.steps = 6
    config.log_every = 1
    config.evaluate_examples = 72
    config.adam = settings.adam(settings.schedule(1e-2, warmup=2))
    config.sgd = settings.sgd(1e-3)
    config.kfac = settings.kfac(0.1, 1.0, factor_update_period=2, inverse_update_period=4)
    config.ekfac = settings.ekfac(0.1, 1.0, factor_update_period=2, basis_update_period=4)
    config.kfac_adaptive = settings.kfac_adaptive(factor_update_period=2, inverse_update_period=4)
    return config
"""


def blob_images(count: int, seed: int) -> np.ndarray:
    """Bytes (count, 8, 8): one bright spot an image, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    row, column = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    center = generator.uniform(1, 6, (2, count, 1, 1))
    distance = (row - center[0]) ** 2 + (column - center[1]) ** 2
    return (255 * np.exp(-distance / 3.0)).astype(np.uint8)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles each training step once, although every test builds its own.

    For that the tiny config has no schedule that depends on the length of the run.
    """
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache_lib.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache_lib.reset_cache()


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive in Keras' form: 72 training and 25 test images with 3 classes."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(
        path,
        x_train=blob_images(72, seed=0),
        y_train=np.arange(72) % 3,
        x_test=blob_images(25, seed=1),
        y_test=np.arange(25) % 3,
    )
    return path


@pytest.fixture
def tiny_config_file(tiny_npz: Path, tmp_path: Path) -> Path:
    """A config file as a user writes it."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY_CONFIG.format(data_dir=str(tiny_npz)))
    return path


def config_of(npz: Path) -> ConfigDict:
    """The config of ``tiny_config_file``."""
    namespace: dict = {}
    exec(TINY_CONFIG.format(data_dir=str(npz)), namespace)
    return namespace["get_config"]()


@pytest.fixture
def tiny_config(tiny_npz: Path) -> ConfigDict:
    """The config of ``tiny_config_file``."""
    return config_of(tiny_npz)


@pytest.fixture
def tiny_classifier(tiny_config: ConfigDict) -> ConfigDict:
    """The tiny images with their three classes."""
    tiny_config.model.kind = "classifier"
    tiny_config.model.sizes = (64, 10, 3)
    tiny_config.loss = "softmax_cross_entropy"
    tiny_config.adam = settings.adam(1e-2)
    return tiny_config
