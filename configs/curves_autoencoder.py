"""The CURVES autoencoder: images with six degrees of freedom through a code of six units."""

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("curves_autoencoder")
    config.title = "CURVES autoencoder 784-400-200-100-50-25-6-25-50-100-200-400-784"
    config.data.name = "curves"
    config.data.train_size = 20_000
    config.data.test_size = 2_000
    config.model.sizes = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
    config.batch_size = 512
    config.steps = 1000

    schedule = settings.schedule
    config.adam = settings.adam(schedule(6e-3, "linear", warmup=50))
    config.sgd = settings.sgd(schedule(3e-3, "linear", warmup=50))
    config.kfac = settings.kfac(
        schedule(0.2, "linear"),
        schedule(3.0, "exponential", end=0.2),
        nesterov=True,
        max_kl=0.3,
        initial_refreshes=5,
    )
    config.ekfac = settings.ekfac(
        schedule(0.5, "linear"),
        schedule(3.0, "exponential", end=0.1),
        momentum=0.8,
        nesterov=True,
        max_kl=1.0,
        initial_refreshes=5,
    )
    # Its scale is that of single examples, smaller than EKFAC's of whole batches: it needs a fresher basis and shorter steps.
    config.tekfac = settings.tekfac(
        schedule(0.5, "linear"),
        schedule(3.0, "exponential", end=0.1),
        momentum=0.8,
        nesterov=True,
        max_kl=0.1,
        initial_refreshes=5,
        basis_update_period=10,
        scale_update_period=1,
    )
    config.kfac_adaptive = settings.kfac_adaptive(
        initial_damping=3.0,
        damping_floor=0.1,
        damping_factor=0.95,
        factor_update_period=1,
        inverse_update_period=5,
        search_period=0,
        averaging=0.9,
    )
    return settings.with_relatives(config)
