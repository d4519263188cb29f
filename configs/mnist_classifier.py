"""A digit classifier with two hidden layers."""

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("mnist_classifier")
    config.title = "MNIST classifier 784-500-300-10"
    config.model.kind = "classifier"
    config.model.sizes = (784, 500, 300, 10)
    config.loss = "softmax_cross_entropy"
    config.batch_size = 500
    config.steps = 200
    config.log_every = 5

    schedule = settings.schedule
    config.adam = settings.adam(schedule(2e-3, "linear"))
    config.sgd = settings.sgd(schedule(0.3, "linear"))
    config.kfac = settings.kfac(
        schedule(0.1, "linear"), 0.3, max_kl=0.1, weight_decay=0.03, initial_refreshes=5
    )
    config.ekfac = settings.ekfac(
        schedule(0.1, "linear"), 0.3, max_kl=0.1, weight_decay=0.1, initial_refreshes=5
    )
    return settings.with_relatives(config)
