"""The deep MNIST autoencoder on which K-FAC's papers are compared.

With the full data set (``--config.data_dir=...``) this is the published protocol: the first 50,000
training images, batches of 512 with the last partial one dropped, 980 steps, and the mean
cross-entropy over all pixels of all 50,000 images at the last iterate. Without it, the embedded
4,500 digits stand in.
"""

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("mnist_autoencoder")
    config.title = "MNIST autoencoder 784-1000-500-250-30-250-500-1000-784"
    config.data.train_size = 50_000
    config.model.sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    config.batch_size = 512
    config.steps = 980
    config.optimizer = "kfac"

    schedule = settings.schedule
    config.adam = settings.adam(schedule(4e-3, "linear", warmup=50))
    config.sgd = settings.sgd(schedule(3e-3, "linear", warmup=50))
    rate, damping = schedule(0.2, "linear"), schedule(3.0, "exponential", end=0.06)
    common = {"max_kl": 0.3, "nesterov": True, "initial_refreshes": 3}
    # One Kronecker product is cheap to invert, a sum of two or an eigenbasis costs several times as much.
    often = {"factor_update_period": 5, "inverse_update_period": 20}
    for name in ("kfac", "tkfac", "kpsvd"):
        config[name] = settings.method(name, rate, damping, **common, **often)
    for name in ("deflation", "lanczos", "kfac_corrected"):
        config[name] = settings.method(name, rate, damping, **common)
    config.ekfac = settings.ekfac(
        rate,
        schedule(10.0, "exponential", end=0.3),
        max_kl=0.3,
        nesterov=True,
        basis_update_period=100,
    )
    config.tekfac = settings.tekfac(
        rate, schedule(10.0, "exponential", end=0.3), basis_update_period=100, **common
    )
    config.kfac_adaptive = settings.kfac_adaptive(
        initial_damping=5.0,
        damping_floor=0.1,
        averaging=0.99,
        damping_factor=0.95,
        factor_update_period=10,
        inverse_update_period=50,
        search_period=50,
    )
    config.soap = settings.soap(schedule(4e-3, "linear", warmup=20), basis_update_period=50)
    return settings.with_relatives(config)
