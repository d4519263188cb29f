"""The demonstration: a digit autoencoder of moderate size on 4,500 embedded MNIST digits.

``kfe-optax compare --config=configs/mnist_small.py`` takes about a minute on two cores.
"""

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("mnist_small")
    config.title = "Autoencoder 784-250-100-30-100-250-784 on 4,500 MNIST digits"
    config.model.sizes = (784, 250, 100, 30, 100, 250, 784)
    config.batch_size = 500
    config.steps = 300
    config.log_every = 5
    config.evaluate_every = "5 steps"

    schedule = settings.schedule
    config.adam = settings.adam(schedule(7e-3, "linear", warmup=30))
    config.sgd = settings.sgd(schedule(5e-3, "linear", warmup=30))
    config.kfac = settings.kfac(
        schedule(0.3, "linear"),
        schedule(1.0, "exponential", end=0.1),
        momentum=0.8,
        nesterov=True,
        max_kl=1.0,
        initial_refreshes=5,
    )
    config.ekfac = settings.ekfac(
        schedule(0.7, "linear"),
        schedule(3.0, "exponential", end=0.1),
        momentum=0.8,
        nesterov=True,
        max_kl=3.0,
        initial_refreshes=5,
    )
    # The last at the rate that the documentation recommends, untuned.
    config.compare.optimizers = "adam,kfac,ekfac,spectral_kfac"
    return settings.with_relatives(config)
