"""A small classifier whose state moves: batch norm and dropout."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from kfe_optax.experiments import models


class Normed(nn.Module):
    """A dense classifier with batch norm and dropout, which compiles in no time."""

    image_shape: tuple[int, int, int]
    classes: int = 3
    batch_norm: bool = True
    dropout: float = 0.0
    momentum: float = 0.9

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(6, name="first")(images)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.classes, name="last")(x)


def use(config: ConfigDict, monkeypatch: Any, **options: Any) -> ConfigDict:
    """The config with this model."""
    monkeypatch.setitem(models.KINDS, "normed", Normed)
    config.model = ConfigDict({"kind": "normed", "batch_norm": True, "dropout": 0.0, **options})
    config.loss = "softmax_cross_entropy"
    return config
