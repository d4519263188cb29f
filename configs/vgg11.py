"""VGG11 without batch norm, on which EKFAC is compared with K-FAC (George et al. 2018).

``--config.model.batch_norm=True`` adds batch norm.
With CIFAR-10 (``--config.data_dir=...``) 100 epochs are ``--config.steps=10000``, and the schedules stretch
with them. Without it, the embedded digits in 32x32 pixels stand in.
"""

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("vgg11")
    config.title = "VGG11"
    config.data.update(name="digits32", normalize=True, augment="crop,flip")
    config.model = ConfigDict({"kind": "vgg", "depth": 11, "batch_norm": False, "width": 1.0, "classes": 10})
    config.loss = "softmax_cross_entropy"
    config.batch_size = 500
    config.steps = 400
    config.optimizer = "ekfac"
    config.evaluate_examples = 500

    def rate(value: float, warmup: int = 0) -> ConfigDict:
        return settings.schedule(value, "steps", boundaries=(0.5, 0.75), factor=0.1, warmup=warmup)

    # As in George et al. (2018), the bound of a step's length falls with the run.
    # The periods of Gao et al. (2020): factors and eigenvectors every 50 steps, inverses every 200.
    common: dict[str, Any] = {
        "weight_decay": 5e-4,
        "factor_update_period": 50,
        "initial_refreshes": 5,
        "max_kl": settings.schedule(0.01, "exponential", end=1e-4),
    }
    # The sides of 2,304 and 4,608 are then diagonal: to factorize them takes minutes on a CPU.
    common["max_dim"] = 2048
    config.adam = settings.adam(rate(3e-4, warmup=20))
    config.sgd = settings.sgd(rate(0.01, warmup=20))
    config.kfac = settings.kfac(rate(0.1), 0.03, inverse_update_period=200, **common)
    config.ekfac = settings.ekfac(rate(0.1), 0.03, basis_update_period=50, **common)
    # A convolution is damped by the mean of its own Θ; the number is for the dense layer.
    config.tekfac = settings.tekfac(rate(0.1), 0.03, basis_update_period=50, damping_type="trace", **common)
    return settings.with_relatives(config)
