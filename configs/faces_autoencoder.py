"""The FACES autoencoder: 25x25 gray faces, linear outputs, squared error.

Without ``--config.data_dir`` it trains on variations of the hundred faces that scikit-image ships
(``pip install scikit-image``).
"""

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("faces_autoencoder")
    config.title = "FACES autoencoder 625-2000-1000-500-30-500-1000-2000-625"
    config.data.name = "faces"
    config.data.variations = 50
    config.model.sizes = (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625)
    config.loss = "squared_error"
    config.batch_size = 450
    config.steps = 500

    schedule = settings.schedule
    config.adam = settings.adam(schedule(1e-3, "linear", warmup=50))
    config.sgd = settings.sgd(schedule(1e-3, "linear", warmup=50))
    config.kfac = settings.kfac(
        schedule(0.1, "linear"),
        schedule(3.0, "exponential", end=0.3),
        max_kl=0.3,
        inverse_update_period=100,
    )
    config.ekfac = settings.ekfac(
        schedule(0.3, "linear"),
        schedule(3.0, "exponential", end=0.3),
        max_kl=0.3,
        basis_update_period=100,
    )
    return config
