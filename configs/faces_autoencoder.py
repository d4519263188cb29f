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
    config.optimizer = "kfac"

    schedule = settings.schedule
    config.adam = settings.adam(schedule(1e-3, "linear", warmup=50))
    config.sgd = settings.sgd(schedule(1e-3, "linear", warmup=50))
    # A squared error's curvature is some ten times that of a cross-entropy, and so is the damping.
    config.kfac = settings.kfac(
        schedule(0.2, "linear"),
        schedule(10.0, "exponential", end=1.0),
        nesterov=True,
        max_kl=0.3,
        inverse_update_period=100,
        initial_refreshes=2,
    )
    config.ekfac = settings.ekfac(
        schedule(0.3, "linear"),
        schedule(30.0, "exponential", end=3.0),
        momentum=0.8,
        nesterov=True,
        max_kl=0.3,
        basis_update_period=100,
        initial_refreshes=2,
    )
    # Its scale is that of single examples, smaller than EKFAC's of whole batches: it needs a fresher basis and shorter steps.
    config.tekfac = settings.tekfac(
        schedule(0.3, "linear"),
        schedule(30.0, "exponential", end=3.0),
        momentum=0.8,
        nesterov=True,
        max_kl=0.1,
        initial_refreshes=2,
        basis_update_period=20,
        scale_update_period=1,
    )
    config.soap = settings.soap(schedule(3e-3, "linear", warmup=10))
    # In so few steps the parameters go far, and the factors had better be those of the day.
    config.kfac_adaptive = settings.kfac_adaptive(
        initial_damping=10.0,
        damping_floor=0.1,
        damping_factor=0.9,
        averaging=0.9,
        factor_update_period=1,
        inverse_update_period=5,
        search_period=0,
    )
    return settings.with_relatives(config)
