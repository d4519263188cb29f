"""ResNet20 without batch norm on 2,048 images: EKFAC against Adam, in steps.

The initial kernels are those of George et al. (2018, appendix B). The published figure is of the first 2,048
CIFAR-10 training images (``--config.data_dir=...``); without it, the embedded digits in 32x32 pixels stand in.
Adam's learning rate is the best of 5e-4, 1e-3, 2e-3 and 4e-3 for 200 steps. EKFAC's schedule ends at step 100.
"""

from ml_collections import ConfigDict

from kfe_optax.experiments import settings


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = settings.base_config("resnet20_without_norm")
    config.title = "ResNet20 without batch norm, 2,048 images"
    config.data.update(name="digits32", channels=3, normalize=True, train_size=2048)
    config.model = ConfigDict(
        {
            "kind": "resnet",
            "depth": 20,
            "width": 1.0,
            "batch_norm": False,
            "pre_activation": False,
            "classes": 10,
        }
    )
    config.loss = "softmax_cross_entropy"
    config.batch_size = 128
    config.steps = 200
    config.optimizer = "ekfac"
    config.compare.optimizers = "adam,ekfac"
    config.evaluate_examples = 2048

    schedule = settings.schedule
    config.adam = settings.adam(schedule(1e-3, "linear", end=1e-4))
    config.sgd = settings.sgd(schedule(0.03, "linear", warmup=10))
    # Without a norm the curvature changes fast at first: a warm-up, a narrow clip, and a scale that forgets.
    rate = schedule(0.07, "linear", end=1.4e-3, warmup=10, steps=100)
    config.kfac = settings.kfac(rate, 0.1, max_kl=1e-3, inverse_update_period=20)
    config.ekfac = settings.ekfac(rate, 0.1, max_kl=1e-3, basis_update_period=20, scale_decay=0.8)
    return settings.with_relatives(config)
