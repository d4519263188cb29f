"""A linear network of 64 layers with batch norm, on which two-level K-FAC was introduced (Tselepidis et al. 2020).

From the paper: width 10, 25,000 examples with planted targets, batches of 512, learning rate 1e-3, momentum 0.9, weight
decay 1e-3, damping 1e-2, statistics every 10 steps, inverses every 100, and a KL clip of 1e-3.

Chosen here: inputs of N(0, I) and targets y = Wx + 0.01 noise with W of N(0, 1/10) have variance one, and kernels of
N(0, 1/n), n the fan-in, keep it; with ``--config.model.initializer=orthogonal`` they keep every direction as well. Batch
norm stands behind all layers but the last. What is differentiated is the squared error summed over the ten outputs, a
negative log-likelihood; what is reported is its mean over them.

The figure over five seeds is ``python benchmarks/two_level.py``'s.
"""

from typing import Any

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("deep_linear")
    config.title = "Linear network of 64 layers with batch norm, planted targets"
    config.data.update(name="planted", inputs=10, outputs=10, noise=0.01)
    config.model = ConfigDict(
        {"kind": "linear", "width": 10, "depth": 64, "batch_norm": True, "initializer": "normal"}
    )
    config.loss = "squared_error"
    config.batch_size = 512
    config.steps = 2000
    config.optimizer = "kfac"
    config.compare.optimizers = "sgd,adam,kfac,two_level_kfac"
    config.evaluate_examples = 2048

    rate, decay = 1e-3, 1e-3
    config.adam = settings.adam(rate, weight_decay=decay)
    config.sgd = settings.sgd(rate, nesterov=False, weight_decay=decay)
    common: dict[str, Any] = {"max_kl": 1e-3, "weight_decay": decay, "factor_update_period": 10}
    config.kfac = settings.kfac(rate, 1e-2, inverse_update_period=100, **common)
    config.ekfac = settings.ekfac(rate, 1e-2, basis_update_period=100, **common)
    return settings.with_relatives(config)
