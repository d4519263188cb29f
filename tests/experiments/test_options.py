"""Every option of every method is a field of its config, set from the command line, described by its docstring."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax.experiments import settings
from kfe_optax.experiments.command_line import _parse, run_command
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.optimizers import BATCH_FIELDS, METHODS, STEP_FIELDS, config_of, make_optimizer
from kfe_optax.experiments.options import configured, descriptions
from kfe_optax.experiments.schedules import make_schedule

# Functions, trees and objects, which a config cannot say.
UNSAID = {"layers", "mask", "rest", "coefficients"}

FILE = """
from kfe_optax.experiments import settings
def get_config():
    config = settings.base_config("options")
    config.adam, config.sgd = settings.adam(0.1), settings.sgd(0.1)
    config.kfac, config.ekfac = settings.kfac(0.1, 1.0), settings.ekfac(0.1, 1.0)
    return settings.with_relatives(config)
"""


@pytest.fixture
def parse(tmp_path):
    path = tmp_path / "options.py"
    path.write_text(FILE)
    return lambda *flags: _parse(["train", f"--config={path}", *(f"--config.{flag}" for flag in flags)])[1]


@functools.cache
def layers():
    params = {"first": {"kernel": jnp.ones((3, 4))}, "last": {"kernel": jnp.ones((4, 2))}}

    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params["first"]["kernel"])
        return kfe.losses.l2_loss(hidden @ params["last"]["kernel"]).sum(-1).mean()

    return kfe.find_layers(loss_fn, params, jnp.ones((5, 3)))


def params():
    return {"first": {"kernel": jnp.ones((3, 4))}, "last": {"kernel": jnp.ones((4, 2))}}


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_a_field(name, parse):
    make, fields = METHODS[name].make, parse()[name]
    known = inspect.signature(make).parameters
    assert set(known) - UNSAID <= set(fields)
    own = () if METHODS[name].curvature else ("weight_decay",)
    assert set(fields) - set(known) <= {*STEP_FIELDS, *BATCH_FIELDS, *own}
    told = descriptions(make)
    assert name in ("adam", "sgd") or all(told[field] for field in known)


# The options of the papers' methods (EQUATIONS, corrections), and one of each kind of field.
SET = {
    "kfac": [
        "damping_type=exact",
        "relative_damping=True",
        "damping.value=2.0",
        "momentum.kind=linear",
        "max_kl.value=0.1",
        "decay.kind=by_steps",
        "statistics_fraction=0.125",
    ],
    "ekfac": [
        "damping_type=appendix_c",
        "scale=batch",
        "scale_update_period=3",
        "factors=tkfac",
        "on_refresh=restart",
        "refresh=qr",
        "refresh_tolerance=0.1",
        "null_threshold=0.0",
    ],
    "tkfac": ["pairing=example", "averages=normalized"],
    "tekfac": ["trace_floor=0.1", "pairing=example", "averages=normalized", "damping_type=trace"],
    "kpsvd": ["tolerance=0.01", "max_iterations=3", "damping_type=sqrt"],
    "deflation": ["denominators=absolute", "damping_type=linear"],
    "lanczos": ["subspace=6", "max_restarts=2", "floor=0.2"],
    "kfac_corrected": ["tolerance=0.01"],
    "kfac_tridiagonal": ["chains=whole", "floor=0.01"],
    "two_level_kfac": [
        "coarse=outputs",
        "groups=2",
        "form=exact",
        "grid=coarsest",
        "coarse_damping.value=0.5",
    ],
    "spectral_kfac": ["exponents=(0.25, 0.5)", "momentum_of=whitened", "size=fan_in", "damping.value=0.3"],
    "kfac_adaptive": [
        "preconditioner=ekfac",
        "search_period=0",
        "l2=1e-5",
        "damping_period=7",
        "averaging=0.9",
        "products_fraction=0.25",
    ],
    "soap": ["rotate_second_moment=True", "max_dim=64"],
}


@pytest.mark.parametrize("name", SET)
def test_options_are_set_on_the_command_line(name, parse):
    config = parse(*(f"{name}.{flag}" for flag in SET[name]))
    tx = make_optimizer(name, config[name], 10, layers())
    assert jax.tree.leaves(jax.eval_shape(tx.init, params()))


def test_what_is_set_reaches_the_optimizer(parse, monkeypatch):
    seen, config = {}, parse("kfac.damping_type=exact", "kfac.max_dim=7", "kfac.size=rms")
    spy = METHODS["kfac"]._replace(make=lambda rate, layers, **options: seen.update(options))
    monkeypatch.setitem(METHODS, "kfac", spy)
    make_optimizer("kfac", config.kfac, 10, layers())
    assert (seen["damping_type"], seen["max_dim"], seen["size"], seen["max_change"]) == (
        "exact",
        7,
        "rms",
        None,
    )


def test_a_number_becomes_a_schedule(parse):
    config = parse("kfac.momentum.kind=linear", "kfac.momentum.end=0.5", "kfac.decay.value=0.8")
    momentum = make_schedule(config.kfac.momentum, 10)
    assert [float(momentum(jnp.asarray(k))) for k in (0, 5, 10)] == pytest.approx([0.9, 0.7, 0.5])
    assert make_schedule(config.kfac.decay, 10) == 0.8
    with pytest.raises(ExperimentError, match="names a field that the config does not have"):
        parse("kfac.nothing.kind=linear")


def test_coarse_damping_follows_damping(parse):
    assert parse("two_level_kfac.damping.value=7.0").two_level_kfac.coarse_damping.value == 7.0
    found = parse(
        "two_level_kfac.damping.value=7.0", "two_level_kfac.coarse_damping.value=2.0"
    ).two_level_kfac
    assert (found.damping.value, found.coarse_damping.value) == (7.0, 2.0)


def test_layers_are_configured():
    found = configured(layers(), "first:sharing=reduce; last:without")
    assert list(found) == ["first"] and found["first"].sharing == "reduce"
    assert configured(layers(), "") == layers()
    for text, sentence in (
        ("none:without", "No layer's name matches 'none'"),
        ("first", "'first' is no option"),
        ("first:approximation=sua", "has approximation='sua'"),
    ):
        with pytest.raises(
            ExperimentError, match=rf"config.layers holds '{text}', which cannot be used: .*{sentence}"
        ):
            configured(layers(), text)


def test_names_that_stand_for_nothing(parse):
    for flag, sentence in (
        ("ekfac.factors=none", "There are no factors 'none'"),
        ("kfac_adaptive.preconditioner=adam", "There is no preconditioner 'adam'"),
    ):
        name = flag.partition(".")[0]
        with pytest.raises(ExperimentError, match=sentence):
            make_optimizer(name, parse(flag)[name], 10, layers())


def test_the_help_of_a_config_describes_its_options(tmp_path, capsys):
    path = tmp_path / "options.py"
    path.write_text(FILE)
    assert run_command(["--help", f"--config={path}"]) == 0
    printed = capsys.readouterr().out
    assert "--config.two_level_kfac." in printed
    assert "'constant', 'outputs', 'eigenvectors', 'residual'" in printed
    assert "ρ of the factors' running averages" in printed


def test_optax_optimizers_are_whole():
    """Their own options, and the L2 penalty's strength."""
    assert {"eps_root", "mu_dtype", "weight_decay"} <= set(settings.adam(0.1))
    own = make_optimizer("sgd", settings.sgd(0.1, nesterov=False), 10)
    state = own.init({"w": jnp.ones(2)})
    updates, _ = own.update({"w": jnp.ones(2)}, state, {"w": jnp.ones(2)})
    np.testing.assert_allclose(updates["w"], -0.1)


def test_an_optimizer_may_have_batches_of_its_own(parse):
    config = parse("kfac.batch_size=8", "kfac.data_seed=3", "batch_size=16")
    assert (config_of(config, "kfac").batch_size, config_of(config, "kfac").data_seed) == (8, 3)
    assert (config_of(config, "adam").batch_size, config_of(config, "adam").data_seed) == (16, None)
    make_optimizer("kfac", config.kfac, 10, layers())
