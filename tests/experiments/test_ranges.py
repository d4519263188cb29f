"""Numbers and names that a config cannot hold: one sentence with the field's name, and exit status 2."""

from __future__ import annotations

import math

import pytest

from kfe_optax._jax import checks
from kfe_optax.experiments import settings
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import check_optimizers
from kfe_optax.experiments.main import main
from kfe_optax.experiments.optimizers import METHODS, make_optimizer, refusals
from kfe_optax.experiments.ranges import check_config, check_settings
from kfe_optax.experiments.sweep import sweep

NAN, INF = math.nan, math.inf


def changed(config, changes):
    """The config with dotted fields set, of whatever type."""
    for name, value in changes.items():
        *outer, last = name.split(".")
        inner = config
        for part in outer:
            inner = inner[part]
        with inner.ignore_type():
            inner[last] = value
    return config


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("kfac.decay=2", "config.kfac.decay is 2.0; give a number from 0 to 1"),
        ("kfac.inverse_update_period=0", "config.kfac.inverse_update_period is 0; give a whole number"),
        ("kfac.damping_type=foo", "config.kfac.damping_type cannot be used: damping_type must be 'factored'"),
        ("kfac.fisher=foo", "config.kfac.fisher cannot be used: fisher must be 'sampled'"),
        (
            "kfac.statistics_fraction=0.3",
            "config.kfac.statistics_fraction cannot be used: statistics_fraction is a part",
        ),
        ("kfac.learning_rate.value=nan", "config.kfac.learning_rate.value is nan; give a finite number"),
        ("seed=-1", "config.seed is -1; give"),
    ],
)
def test_what_the_library_refuses_is_one_sentence(tiny_config_file, tmp_path, capsys, argument, sentence):
    arguments = ["train", f"--config={tiny_config_file}", f"--workdir={tmp_path}", "--config.optimizer=kfac"]
    assert main([*arguments, f"--config.{argument}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kfe-optax: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("optimizer", "changes", "sentence"),
    [
        ("ekfac", {"scale": "foo"}, "config.ekfac.scale cannot be used: scale must be"),
        ("kfac", {"refresh": "foo"}, "config.kfac"),
        ("soap", {"refresh": "svd"}, "config.soap.refresh cannot be used: refresh must be 'eigh' or 'qr'"),
        ("two_level_kfac", {"coarse": "foo"}, "config.two_level_kfac.coarse cannot be used: coarse must be"),
        ("kfac_tridiagonal", {"chains": "foo"}, "config.kfac_tridiagonal.chains cannot be used"),
        ("kfac_adaptive", {"damping_floor": 2.0}, "config.kfac_adaptive.initial_damping cannot be used"),
        ("kfac_adaptive", {"damping_floor": 0.0}, "config.kfac_adaptive.damping_floor cannot be used: floor"),
        ("kfac", {"speed": 3.0}, "config.kfac.speed cannot be used: .*unexpected keyword argument 'speed'"),
        ("adam", {"beta": 3.0}, "config.adam.beta cannot be used: .*unexpected keyword argument 'beta'"),
    ],
)
def test_the_field_of_a_refusal_is_named(tiny_config, optimizer, changes, sentence):
    config = settings.with_relatives(tiny_config)
    changed(config[optimizer], changes)
    with pytest.raises(ExperimentError, match=sentence):
        check_optimizers(config, {optimizer: 6}, load(config))


def test_defects_keep_their_traceback():
    for error in (TypeError("ours"), ValueError("ours"), KeyError("ours")):
        with pytest.raises(type(error), match="ours") as caught, refusals("adam", settings.adam(1e-3)):
            raise error
        assert not isinstance(caught.value, ExperimentError)
    with (
        pytest.raises(
            ExperimentError, match=r"config.adam cannot be used: x must be a positive whole number"
        ),
        refusals("adam", settings.adam(1e-3)),
    ):
        checks.period("x", 0)


@pytest.mark.parametrize("name", ["value", "end"])
@pytest.mark.parametrize("number", [NAN, INF, -1.0])
def test_rates_dampings_and_clips_are_finite_and_not_negative(name, number):
    for field in ("learning_rate", "damping", "max_kl"):
        schedule = settings.schedule(1.0, "linear", end=0.5)
        schedule[name] = number
        found = changed(settings.kfac(0.1, 1.0), {field: schedule})
        with pytest.raises(ExperimentError, match=f"config.kfac.{field}.{name} is {number}; give"):
            make_optimizer("kfac", found, run_steps=10)


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("adam", {"b1": 1.0}),
        ("adam", {"b1": -0.1}),
        ("adam", {"b2": NAN}),
        ("adam", {"eps": -1e-8}),
        ("adam", {"weight_decay": INF}),
        ("sgd", {"momentum": 1.0}),
        ("kfac", {"momentum": -0.5}),
        ("kfac", {"damping": 0.0}),
        ("kfac", {"max_kl": -1.0}),
        ("kfac", {"max_kl": NAN}),
        ("kfac", {"decay": NAN}),
        ("kfac", {"max_dim": 0}),
        ("kfac", {"factor_update_period": 2**31}),
        ("kfac", {"initial_refreshes": -1}),
        ("ekfac", {"basis_update_period": -3}),
        ("ekfac", {"scale_decay": 1.5}),
        ("two_level_kfac", {"coarse_damping": -1.0}),
        ("kfac_adaptive", {"initial_damping": NAN}),
        ("kfac_adaptive", {"averaging": 1.0}),
        ("kfac_adaptive", {"search_period": -2}),
    ],
)
def test_other_numbers_of_an_optimizer(optimizer, changes):
    arguments = {"adam": (0.1,), "sgd": (0.1,), "kfac_adaptive": ()}.get(optimizer, (0.1, 1.0))
    found = changed(getattr(settings, optimizer)(*arguments), changes)
    (field,) = changes
    with pytest.raises(ExperimentError, match=f"config.{optimizer}.{field} is .*; give a"):
        make_optimizer(optimizer, found, run_steps=10)


def test_the_settings_of_every_method_pass():
    config = settings.base_config("all")
    config.adam, config.sgd = settings.adam(0.1), settings.sgd(0.1)
    config.kfac, config.ekfac = settings.kfac(0.1, 1.0, max_kl=0.0), settings.ekfac(0.1, 1.0)
    check_config(settings.with_relatives(config))
    for name in METHODS:
        check_settings(name, config[name])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": -1}, "config.seed is -1"),
        ({"seed": 2**32 + 3}, "config.seed is 4294967299; give a whole number of at most 2147483647"),
        ({"steps": 10**11}, "config.steps is 100000000000; give"),
        ({"data.train_size": -5}, "config.data.train_size is -5; give"),
        ({"data.test_size": -1}, "config.data.test_size is -1; give"),
        ({"data.name": "planted", "data.inputs": 0}, "config.data.inputs is 0; give"),
        ({"data.noise": NAN}, "config.data.noise is nan; give"),
        ({"data.variations": 0}, "config.data.variations is 0; give"),
        ({"data_seed": -2}, "config.data_seed is -2; give"),
        ({"averaging": 1.0}, "config.averaging is 1.0; give"),
        ({"model.sizes": (64, 0, 64)}, "A number of config.model.sizes is 0; give a whole number"),
        ({"model.sizes": [64, -3, 64]}, "A number of config.model.sizes is -3; give a whole number"),
        ({"model.dropout": 1.0}, "config.model.dropout is 1.0; give a number from 0 up to"),
        ({"model.dropout": NAN}, "config.model.dropout is nan; give"),
        ({"model.heads": 0}, "config.model.heads is 0; give"),
        ({"model.width": -0.5}, "config.model.width is -0.5; give"),
    ],
)
def test_numbers_outside_the_optimizers(tiny_config, changes, sentence):
    with pytest.raises(ExperimentError, match=sentence):
        load(changed(tiny_config, changes))


def test_every_optimizer_is_checked_before_the_first_one_runs(tiny_config, tmp_path):
    tiny_config.compare.optimizers = "adam,kfac"
    tiny_config.kfac.damping_type = "foo"
    with pytest.raises(ExperimentError, match=r"config.kfac.damping_type cannot be used"):
        compare(tiny_config, tmp_path / "compare")
    assert not (tmp_path / "compare").exists()


def test_a_sweep_refuses_what_its_trials_share(tiny_config, tmp_path):
    tiny_config.optimizer, tiny_config.seed = "kfac", -1
    with pytest.raises(ExperimentError, match=r"config.seed is -1"):
        sweep(tiny_config, tmp_path / "sweep")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("def get_config():\n    return 1 / 0\n", "raises ZeroDivisionError in line 2: division by zero"),
        ("import absent_module\n", "raises ModuleNotFoundError in line 1"),
        (
            "from kfe_optax.experiments import settings\nsettings.kfac('fast', 1.0)\n",
            "raises ValueError in line 2: could not convert string to float: 'fast'",
        ),
        ("x = 'a\0b'\n", "null bytes"),
    ],
)
def test_a_config_file_that_raises_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(ExperimentError, match=sentence):
        load_config(str(path))


@pytest.mark.parametrize("name", ["x" * 5000, "~no_such_user/config.py", "a\0b.py"])
def test_absurd_names_of_configs_are_one_sentence(name):
    with pytest.raises(ExperimentError, match="config"):
        load_config(name)
