"""ResNet20 with batch norm, on which TEKFAC is compared with its relatives (Gao et al. 2020).

``--config.model.batch_norm=False`` trains it without batch norm, from the kernels of George et al. (2018).
With CIFAR-10 (``--config.data_dir=...``) 200 epochs are ``--config.steps=78000``, and the schedules stretch
with them. Without it, the embedded digits in 32x32 pixels stand in.
"""

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("resnet20")
    config.title = "ResNet20 with batch norm"
    config.data.update(name="digits32", normalize=True, augment="crop,flip")
    config.model = ConfigDict(
        {
            "kind": "resnet",
            "depth": 20,
            "pre_activation": False,
            "batch_norm": True,
            "width": 1.0,
            "classes": 10,
        }
    )
    config.loss = "softmax_cross_entropy"
    config.batch_size = 128
    config.steps = 400
    config.optimizer = "tekfac"
    config.evaluate_examples = 500

    def rate(value: float, warmup: int = 0) -> ConfigDict:
        return settings.schedule(value, "steps", boundaries=(0.5, 0.75), factor=0.1, warmup=warmup)

    # The periods of Gao et al. (2020): factors and eigenvectors every 50 steps, inverses every 200.
    common: dict[str, Any] = {
        "weight_decay": 5e-4,
        "factor_update_period": 50,
        "initial_refreshes": 5,
        "max_kl": 0.01,
    }
    config.adam = settings.adam(rate(1e-3))
    config.sgd = settings.sgd(rate(0.1))
    config.kfac = settings.kfac(rate(0.1), 0.03, inverse_update_period=200, **common)
    config.ekfac = settings.ekfac(rate(0.1), 0.03, basis_update_period=50, **common)
    # A convolution is damped by the mean of its own Θ; the number is for the dense layer.
    config.tekfac = settings.tekfac(rate(0.1), 0.03, basis_update_period=50, damping_type="trace", **common)
    return settings.with_relatives(config)
