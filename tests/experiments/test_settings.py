"""Schedules, the optimizer table, and the models that a config describes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments import settings
from kfe_optax.experiments.command_line import _parse
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.models import Autoencoder, make_model
from kfe_optax.experiments.optimizers import METHODS, make_optimizer, optimizer_settings, tap_options
from kfe_optax.experiments.sweep_space import read_space, with_values


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


def test_a_momentum_may_rise():
    """μ of Sutskever et al. (2013): a half for 250 steps, then 3/4, 5/6, ..., at most the value."""
    rising = settings.make_schedule(settings.schedule(0.9, "rising"), 2000)
    np.testing.assert_allclose(
        values(rising, (0, 249, 250, 500, 1000, 1999)), [0.5, 0.5, 0.75, 5 / 6, 0.9, 0.9], rtol=1e-6
    )


def test_a_decay_may_count_steps():
    decay = settings.make_schedule(settings.schedule(0.9, "by_steps"), 10)
    assert decay == kfe.factors.DecayBySteps(0.9)


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


def test_steps_multiply_at_fractions_of_the_run():
    schedule = settings.schedule(0.8, "steps", boundaries=(0.5, 0.75), factor=0.1)
    expected = [0.8] * 4 + [0.08] * 2 + [0.008] * 4
    np.testing.assert_allclose(values(settings.make_schedule(schedule, 8), range(10)), expected, rtol=1e-6)
    # Of 50 steps, 0.14 is step 7, although in floating point 0.14 * 50 > 7; 12.5 is step 13.
    schedule = settings.schedule(1.0, "steps", boundaries=(0.14, 0.25), factor=0.5)
    expected = [1.0] * 7 + [0.5] * 6 + [0.25] * 3
    np.testing.assert_allclose(values(settings.make_schedule(schedule, 50), range(16)), expected)
    # With the schedule's own length and a warm-up.
    schedule = settings.schedule(1.0, "steps", warmup=2, steps=4, boundaries=(0.75,))
    expected = [0.5, 1, 1, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(values(settings.make_schedule(schedule, 100), range(6)), expected, rtol=1e-6)


def test_steps_are_those_of_optax():
    schedule = settings.schedule(0.3, "steps", boundaries=(0.2, 0.4, 0.9), factor=0.3)
    theirs = optax.piecewise_constant_schedule(0.3, {4: 0.3, 8: 0.3, 18: 0.3})
    ours = values(settings.make_schedule(schedule, 20), range(25))
    np.testing.assert_allclose(ours, values(theirs, range(25)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"are \(\); give rising fractions"),
        ({"boundaries": (0.75, 0.5)}, "give rising fractions"),
        ({"boundaries": (0.0, 0.5)}, "give rising fractions"),
        ({"boundaries": (100, 150)}, "fractions of the run between 0 and 1"),
        ({"boundaries": (0.5,), "factor": 0.0}, "factor .* is 0.0; it must be positive"),
    ],
)
def test_steps_that_cannot_be_are_one_sentence(options, sentence):
    with pytest.raises(ExperimentError, match=sentence):
        settings.make_schedule(settings.schedule(1.0, "steps", **options), 10)


def test_steps_are_set_on_the_command_line_and_kept_by_relatives(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from kfe_optax.experiments import settings\n"
        "def get_config():\n"
        "    config = settings.base_config('steps')\n"
        "    config.kfac = settings.kfac(settings.schedule(0.1, 'linear'), 1.0)\n"
        "    return settings.with_relatives(config)\n"
    )
    field = "--config.kfac.learning_rate"
    arguments = ["train", f"--config={path}", f"{field}.kind=steps", f"{field}.boundaries=(0.5, 0.75)"]
    config = _parse([*arguments, f"{field}.factor=0.2"])[1]
    assert config.tkfac.learning_rate.boundaries == ()
    config.optimizer = "kfac"
    at = settings.make_schedule(config.kfac.learning_rate, 4)
    np.testing.assert_allclose(values(at, range(4)), [0.1, 0.1, 0.02, 0.004], rtol=1e-6)
    relative = settings.with_relatives(ConfigDict({"kfac": config.kfac.to_dict()})).tkfac
    assert relative.learning_rate.to_dict() == config.kfac.learning_rate.to_dict()
    trial = {"kfac.learning_rate.value": 1.0, "kfac.learning_rate.factor": 0.5}
    at = settings.make_schedule(with_values(config, trial).kfac.learning_rate, 4)
    np.testing.assert_allclose(values(at, range(4)), [1, 1, 0.5, 0.25], rtol=1e-6)
    config.sweep.space = "kfac.learning_rate=0.1,1; kfac.learning_rate.factor=0.5"
    assert list(read_space(config)) == ["kfac.learning_rate.value", "kfac.learning_rate.factor"]


@pytest.fixture
def told(monkeypatch):
    """What K-FAC is told of its settings."""
    original = METHODS["kfac"]

    @functools.wraps(original.make)
    def spy(rate, layers, **options):
        return options["max_kl"]

    monkeypatch.setitem(METHODS, "kfac", original._replace(make=spy))
    return lambda own, steps=5: make_optimizer("kfac", own, steps)


def test_the_bound_of_a_clip_may_be_a_schedule_and_zero_is_none(told):
    bound = told(settings.kfac(1.0, 1.0, max_kl=settings.schedule(1e-4, "exponential", end=1e-8)))
    np.testing.assert_allclose(values(bound, range(6)), 1e-4 * 10 ** (-0.8 * np.arange(6)), rtol=1e-5)
    assert told(settings.kfac(1.0, 1.0, max_kl=0.3)) == 0.3
    for none in (0.0, None, settings.schedule(0.0), settings.schedule(0.0, "exponential", end=0.1)):
        assert told(settings.kfac(1.0, 1.0, max_kl=none)) is None


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


@pytest.mark.parametrize("field", ["learning_rate", "max_kl"])
def test_an_optimizer_that_finds_its_steps_takes_no_learning_rate(field):
    own = settings.kfac_adaptive()
    own[field] = 0.1
    with pytest.raises(
        ExperimentError, match=f"config.kfac_adaptive.{field} cannot be used: .* keyword argument '{field}'"
    ):
        make_optimizer("kfac_adaptive", own, 10)
    own = settings.kfac(0.1, 0.1)
    del own.learning_rate
    with pytest.raises(ExperimentError, match="config.kfac has no learning rate"):
        make_optimizer("kfac", own, 10)


def test_no_search_is_a_period_of_zero(monkeypatch):
    method = METHODS["kfac_adaptive"]._replace(make=lambda layers, **options: options)
    monkeypatch.setitem(METHODS, "kfac_adaptive", method)
    for period, expected in ((0, None), (3, 3), (None, None)):
        options = make_optimizer("kfac_adaptive", settings.kfac_adaptive(search_period=period), 10)
        assert options["search_period"] == expected
    # The library's own default.
    assert "search_period" not in make_optimizer("kfac_adaptive", settings.kfac_adaptive(), 10)


def test_taps_know_the_quadratic_model_where_the_optimizer_needs_it():
    assert tap_options("kfac_adaptive", settings.kfac_adaptive()) == {
        "fisher": "sampled",
        "num_samples": 1,
        "statistics_fraction": 1.0,
        "products_fraction": 1.0,
        "quadratic_model": True,
    }
    assert tap_options("kfac", settings.kfac(0.1, 0.1, num_samples=2)) == {
        "fisher": "sampled",
        "num_samples": 2,
        "statistics_fraction": 1.0,
    }


def test_relatives_of_kfac_have_what_they_share_with_it():
    config = ConfigDict({"kfac": settings.kfac(0.1, settings.schedule(3.0, "linear"), max_dim=7)})
    config = settings.with_relatives(config)
    two_level, tridiagonal = config.two_level_kfac, config.kfac_tridiagonal
    assert two_level.max_dim == tridiagonal.max_dim == 7
    assert two_level.damping_type == "factored"
    assert "damping_type" not in tridiagonal
    assert tridiagonal.chains == "split"
    assert two_level.coarse == "constant"
    assert two_level.coarse_damping.to_dict() == two_level.damping.to_dict() == config.kfac.damping.to_dict()
    two_level.coarse_damping.value = 9.0
    assert two_level.damping.value == config.kfac.damping.value == 3.0
    assert "learning_rate" not in config.kfac_adaptive


def test_the_code_is_linear_and_so_are_the_outputs():
    model = Autoencoder(sizes=(6, 4, 2, 4, 6), activation="tanh")
    images = jax.random.uniform(jax.random.key(0), (3, 6))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
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


def test_kernels_may_start_sparse(tiny_config):
    tiny_config.model.update(sizes=(64, 30, 64), initializer="sparse")
    params = make_model(tiny_config.model, load(tiny_config)).init(jax.random.key(0), jnp.ones((1, 64)))[
        "params"
    ]
    for layer in params.values():
        np.testing.assert_array_equal((layer["kernel"] != 0).sum(axis=0), 15)
        assert not np.any(layer["bias"])


def test_a_shared_schedule_is_set_for_one_optimizer_alone():
    """A config file may give one schedule to several optimizers; each has a copy."""
    rate = settings.schedule(0.1, "linear")
    first, second = (settings.kfac(rate, rate, max_kl=rate) for _ in range(2))
    for field in ("learning_rate", "damping", "max_kl"):
        first[field].value = 0.5
        assert second[field].value == rate.value == 0.1
    assert len({first[field].value for field in ("learning_rate", "damping", "max_kl")}) == 1
