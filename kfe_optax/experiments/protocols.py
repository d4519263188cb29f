"""The settings of a paper's experiments with convolutional networks, which several config files share."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments import settings

# The sides of 2,304 and 4,608 are then diagonal: to factorize them takes minutes on a CPU.
AFFORDABLE = 2048


def without_batch_norm(
    name: str, title: str, model: dict[str, Any], *, batch_size: int, max_dim: int | None = None
) -> ConfigDict:
    """As George et al. (2018): the bound of a step's length falls with the run."""

    def clip() -> ConfigDict:
        return settings.schedule(0.01, "exponential", end=1e-4)

    config = _images(name, title, model | {"batch_norm": False}, batch_size, "ekfac")
    config.adam = settings.adam(_rate(3e-4, warmup=20))
    config.sgd = settings.sgd(_rate(0.01, warmup=20))
    return _curvature(config, max_dim, clip)


def with_batch_norm(
    name: str, title: str, model: dict[str, Any], *, optimizer: str = "kfac", max_dim: int | None = None
) -> ConfigDict:
    """As Gao et al. (2020)."""
    config = _images(name, title, model | {"batch_norm": True}, 128, optimizer)
    config.adam = settings.adam(_rate(1e-3))
    config.sgd = settings.sgd(_rate(0.1))
    return _curvature(config, max_dim, lambda: 0.01)


def _images(name: str, title: str, model: dict[str, Any], batch_size: int, optimizer: str) -> ConfigDict:
    config = settings.base_config(name)
    config.title = title
    config.data.update(name="digits32", normalize=True, augment="crop,flip")
    config.model = ConfigDict(model | {"width": 1.0, "classes": 10})
    config.loss = "softmax_cross_entropy"
    config.batch_size = batch_size
    config.steps = 400
    config.optimizer = optimizer
    config.compare.examples = 500
    return config


def _rate(value: float, warmup: int = 0) -> ConfigDict:
    return settings.schedule(value, "steps", boundaries=(0.5, 0.75), factor=0.1, warmup=warmup)


def _curvature(config: ConfigDict, max_dim: int | None, clip: Any) -> ConfigDict:
    common: dict[str, Any] = {
        "weight_decay": 5e-4,
        # The periods of Gao et al. (2020): factors and eigenvectors every 50 steps, inverses every 200.
        "factor_update_period": 50,
        "initial_refreshes": 5,
    }
    if max_dim is not None:
        common["max_dim"] = max_dim
    config.kfac = settings.kfac(_rate(0.1), 0.03, max_kl=clip(), inverse_update_period=200, **common)
    config.ekfac = settings.ekfac(_rate(0.1), 0.03, max_kl=clip(), basis_update_period=50, **common)
    # A convolution is damped by the mean of its own Θ; the number is for the dense layer.
    config.tekfac = settings.tekfac(
        _rate(0.1), 0.03, max_kl=clip(), basis_update_period=50, damping_type="trace", **common
    )
    return settings.with_relatives(config)
