"""The config files: every model is traced, and small ones of every family are trained."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import kfe_optax as kfe
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import planted_targets
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.job import make_layers
from kfe_optax.experiments.optimizers import METHODS, make_optimizer
from kfe_optax.experiments.task import make_task
from kfe_optax.experiments.train import train

from ..methods import quick

FOLDER = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
TEXTS = ["lstm_characters", "transformer_characters"]
IMAGES = ["preact_resnet", "resnet110", "resnet20", "resnet34", "vgg11", "vgg16", "vit_small"]
# A network of each family that takes seconds to compile.
SMALL = {
    "vgg11": {"width": 0.05},
    "resnet20": {"width": 0.25, "depth": 8},
    "preact_resnet": {"width": 0.05, "depth": 18},
    "vit_small": {"width": 8, "depth": 1, "heads": 2, "hidden": 8, "patch": 8},
    "transformer_characters": {"width": 8, "depth": 2, "heads": 2, "hidden": 8, "scan": True, "dropout": 0.1},
    "lstm_characters": {"width": 8, "embedding": 6},
}


def config_of(name):
    return load_config(str(FOLDER / f"{name}.py"))


def stand_in(config):
    """Data of the config's own shape, which take no time to load."""
    generator = np.random.default_rng(0)
    if config.model.kind == "linear":
        return planted_targets(2, 2, config.data.inputs, config.data.outputs, config.data.noise)
    if config.model.kind in ("transformer", "recurrent"):
        tokens = generator.integers(0, 90, (2, 128)).astype(np.int32)
        return Dataset(tokens, tokens, tokens, tokens, "made up", (128,), 90)
    shape = (config.model.sizes[0],) if "sizes" in config.model else (32, 32, config.data.channels)
    images = generator.uniform(size=(2, int(np.prod(shape)))).astype(np.float32)
    labels = np.arange(2, dtype=np.int32)
    return Dataset(images, labels, images, labels, "made up", shape)


# Tracing the loss of more than a hundred layers for every optimizer takes a while.
@pytest.mark.parametrize(
    "name",
    quick(
        "deep_linear",
        "vit_small",
        slow=["mnist_small", "curves_autoencoder", "resnet20", "transformer_characters", "lstm_characters"],
        of=NAMES,
    ),
)
def test_every_model_can_be_traced_and_every_optimizer_be_made(name):
    config = config_of(name)
    config.batch_size = 2
    dataset = stand_in(config)
    switches = (True, False) if "batch_norm" in config.model else (None,)
    for batch_norm in switches:
        if batch_norm is not None:
            config.model.batch_norm = batch_norm
        task = make_task(config, dataset)
        assert task.has_state == bool(batch_norm)
        params, state = jax.eval_shape(task.init, jax.random.key(0), dataset.train_images)
        assert bool(jax.tree.leaves(state)) == task.has_state
        layers = make_layers(config, dataset)
        found = {path for layer in layers.values() for _, path in layer.paths} | set(layers.rest)
        assert len(found) == len(jax.tree.leaves(params))
        assert layers.outputs
    for method in METHODS:
        # Every field is an option of the optimizer, every schedule one that can be.
        make_optimizer(method, config[method], config.steps, layers)


def test_an_override_is_of_one_optimizer():
    for name in IMAGES + TEXTS:
        config = config_of(name)
        before = config.ekfac.to_dict()
        for field in ("learning_rate", "damping", "max_kl"):
            if field != "max_kl" or not isinstance(config.kfac.max_kl, float):
                config.kfac[field].value = 7.0
        assert config.ekfac.to_dict() == before


def small(name, optimizer):
    config = config_of(name)
    config.model.update(SMALL[name])
    config.optimizer = optimizer
    config.update(batch_size=8, steps=2, log_every=1, checkpoint_every=2)
    config.data.update(train_size=24, test_size=8)
    if name in TEXTS:
        config.data.length = 12
    return config


QUICK = [("resnet20", "adam"), ("transformer_characters", "kfac")]
# Every network with EKFAC, and the other methods with one that has images and one that has text.
TRAINED = {*[(name, "ekfac") for name in SMALL], ("resnet20", "tekfac"), ("transformer_characters", "tekfac")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [QUICK[1], *[pytest.param(*each, marks=pytest.mark.nightly) for each in (QUICK[0], *sorted(TRAINED))]],
)
def test_a_small_network_takes_steps(name, optimizer, tmp_path):
    outcome = train(small(name, optimizer), tmp_path, console=Console(quiet=True))
    assert outcome.step == 2
    for part in ("train", "test"):
        assert np.isfinite(outcome.measures[f"{part}_loss"])
        assert 0.0 <= outcome.measures[f"{part}_accuracy"] <= 1.0
    info = kfe.info(outcome.state.opt_state)
    assert (info.damping is not None) == (optimizer != "adam")
