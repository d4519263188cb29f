"""Schedules, the optimizer table, and the models that a config describes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from kfe_optax.experiments import settings
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.models import Autoencoder, make_model
from kfe_optax.experiments.optimizers import METHODS, make_optimizer, optimizer_settings


def values(schedule, steps=range(11)):
    return np.array([float(schedule(jnp.asarray(step))) for step in steps])


def test_a_constant_is_a_plain_number():
    assert settings.make_schedule(settings.schedule(0.3), run_steps=10) == 0.3


def test_schedules_end_where_they_say():
    make, schedule = settings.make_schedule, settings.schedule
    linear = values(make(schedule(1.0, "linear"), 10))
    np.testing.assert_allclose(linear, np.linspace(1.0, 0.0, 11), atol=1e-6)
    cosine = values(make(schedule(1.0, "cosine", end=0.2), 10))
    expected = values(optax.cosine_decay_schedule(1.0, 10, alpha=0.2))
    np.testing.assert_allclose(cosine, expected, rtol=1e-6)
    exponential = values(make(schedule(8.0, "exponential", end=0.5), 4), range(6))
    np.testing.assert_allclose(exponential, [8, 4, 2, 1, 0.5, 0.5], rtol=1e-6)


def test_a_warm_up_wastes_no_step_and_own_steps_win_over_the_run():
    schedule = settings.schedule(1.0, "constant", warmup=4)
    np.testing.assert_allclose(
        values(settings.make_schedule(schedule, 10), range(6)), [0.25, 0.5, 0.75, 1, 1, 1]
    )
    schedule = settings.schedule(1.0, "linear", warmup=2, steps=6)
    np.testing.assert_allclose(
        values(settings.make_schedule(schedule, 100), range(8)),
        [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0],
        atol=1e-6,
    )


def test_schedules_that_cannot_be_are_one_sentence():
    with pytest.raises(ExperimentError, match="kind is 'step'; choose one of constant"):
        settings.make_schedule(settings.schedule(1.0, "step"), 10)
    with pytest.raises(ExperimentError, match="both must be positive"):
        settings.make_schedule(settings.schedule(1.0, "exponential"), 10)


def test_every_named_optimizer_has_a_builder_of_settings():
    assert {"adam", "sgd", "kfac", "ekfac"} <= METHODS.keys()
    for name in METHODS:
        assert callable(getattr(settings, name))


def test_plain_optimizers_are_those_of_optax():
    sub_config = settings.adam(settings.schedule(0.1, "linear"), b1=0.8)
    ours = make_optimizer("adam", sub_config, run_steps=4)
    theirs = optax.adam(optax.linear_schedule(0.1, 0.0, 4), b1=0.8)
    params = {"w": jnp.ones(3)}
    grads = {"w": jnp.array([1.0, -2.0, 0.5])}
    our_state, their_state = ours.init(params), theirs.init(params)
    for _ in range(3):
        our_updates, our_state = ours.update(grads, our_state, params)
        their_updates, their_state = theirs.update(grads, their_state, params)
        np.testing.assert_allclose(our_updates["w"], their_updates["w"], rtol=1e-5)


def test_unknown_optimizers_are_one_sentence():
    with pytest.raises(ExperimentError, match="no optimizer 'lbfgs'; choose one of adam"):
        make_optimizer("lbfgs", settings.adam(0.1), 10)
    with pytest.raises(ExperimentError, match="no settings for 'ekfac'"):
        optimizer_settings(ConfigDict({"adam": settings.adam(0.1)}), "ekfac")


def test_the_code_is_linear_and_so_are_the_outputs():
    model = Autoencoder(sizes=(6, 4, 2, 4, 6), activation="tanh")
    images = jax.random.uniform(jax.random.key(0), (3, 6))
    params = model.init(jax.random.key(1), images)["params"]
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {
        "dense_1": (6, 4),
        "dense_2": (4, 2),
        "dense_3": (2, 4),
        "dense_4": (4, 6),
    }

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    code = dense("dense_2", jnp.tanh(dense("dense_1", images)))
    expected = dense("dense_4", jnp.tanh(dense("dense_3", code)))
    np.testing.assert_allclose(model.apply({"params": params}, images), expected, rtol=1e-5)
    curved = model.clone(linear_code=False).apply({"params": params}, images)
    assert not np.allclose(curved, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sizes": (9, 4, 64)}, "let it start with 64"),
        ({"sizes": (64,)}, "an autoencoder's sizes end|let it start"),
        ({"sizes": (64, 4, 9)}, "an autoencoder's sizes end with 64"),
        ({"kind": "transformer"}, "choose 'autoencoder' or 'classifier'"),
        ({"activation": "softsign"}, "choose one of relu, tanh"),
        ({"initializer": "zeros"}, "choose one of lecun_normal"),
    ],
)
def test_models_that_cannot_be_are_one_sentence(tiny_config, changes, sentence):
    tiny_config.model.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        make_model(tiny_config.model, pixels=64)
