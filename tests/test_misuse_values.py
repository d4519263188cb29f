"""Hyper-parameters and states that cannot be right are refused, each with its name."""

from __future__ import annotations

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import problems

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def step():
    """(problem, layers, gradients, taps)."""
    problem = problems.make("linen")
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)
    _, grads, taps = differentiate(problem.params, *problem.args)
    return problem, layers, grads, taps


PERIODIC = {
    "scale_by_kfac": {"factor_update_period", "inverse_update_period"},
    "scale_by_ekfac": {"factor_update_period", "basis_update_period", "scale_update_period"},
    "scale_by_kronecker": {"factor_update_period", "inverse_update_period"},
    "scale_by_block_tridiagonal": {"factor_update_period", "inverse_update_period"},
    "scale_by_two_level_kfac": {"factor_update_period", "inverse_update_period"},
    "in_kfe": {"factor_update_period", "basis_update_period"},
}
NO_PERIODS = (0, -1, 1.5, None, NAN, INF, "10", True, np.float32(2.5), lambda step: 10)


def make(name, layers, **options):
    if name == "in_kfe":
        return kfe.in_kfe(optax.scale_by_adam(), layers, **options)
    return getattr(kfe, name)(layers, 0.1, **options)


@pytest.mark.parametrize("name", PERIODIC)
def test_periods(name, step):
    for field in PERIODIC[name]:
        for steps in NO_PERIODS:
            with pytest.raises(ValueError, match=rf"^{field} must be a positive whole number of steps, not "):
                make(name, step[1], **{field: steps})
        for steps in (1, 10.0, np.int64(3), jnp.asarray(4)):
            assert callable(make(name, step[1], **{field: steps}).update)
    for steps in (-1, 0.5, None, NAN, "1"):
        with pytest.raises(
            ValueError, match="^initial_refreshes must be a whole number, zero or positive, of steps"
        ):
            make(name, step[1], initial_refreshes=steps)
        with pytest.raises(
            ValueError, match="^refreshes_per_doubling must be a whole number, zero or positive, of refreshes"
        ):
            make(name, step[1], refreshes_per_doubling=steps)
    assert callable(make(name, step[1], initial_refreshes=0, refreshes_per_doubling=0).update)


@pytest.mark.parametrize("name", PERIODIC)
def test_max_dim(name, step):
    problem, layers, *_ = step
    for number in (0, -1, 2.5, NAN, "8"):
        with pytest.raises(ValueError, match="^max_dim must be a positive whole number, not "):
            make(name, layers, max_dim=number).init(problem.params)


def test_other_periods(step):
    _, layers, *_ = step
    for steps in NO_PERIODS:
        with pytest.raises(ValueError, match="^period must be a positive whole number of steps"):
            kfe.adaptive_damping(kfe.kfac(0.1, layers), 0.1, period=steps)
        if steps is not None:
            with pytest.raises(ValueError, match="^search_period must be a positive whole number of steps"):
                kfe.kfac_adaptive(layers, search_period=steps)


DAMPED = {
    "damping": lambda layers, number: kfe.scale_by_kfac(layers, number),
    "damping of the alias": lambda layers, number: kfe.tekfac(0.1, layers, number),
    "damping of ekfac": lambda layers, number: kfe.scale_by_ekfac(layers, number),
    "damping of chains": lambda layers, number: kfe.scale_by_block_tridiagonal(layers, number),
    "damping of the model": lambda layers, number: kfe.scale_by_quadratic_model(
        kfe.scale_by_kfac(layers, 0.1), number
    ),
    "initial_damping": lambda layers, number: kfe.kfac_adaptive(layers, initial_damping=number),
    "coarse_damping": lambda layers, number: kfe.scale_by_two_level_kfac(layers, 0.1, coarse_damping=number),
}


@pytest.mark.parametrize("name", DAMPED)
def test_damping(name, step):
    layers, field = step[1], name.split()[0]
    for number in (np.float32(-1), np.float64(0), np.asarray(-2.0), np.int32(0), -INF, NAN, np.float32(NAN)):
        with pytest.raises(ValueError, match=f"^{field} must be positive, not "):
            DAMPED[name](layers, number)
    for number in (INF, np.float32(INF)):
        with pytest.raises(ValueError, match=f"^{field} must be finite, not "):
            DAMPED[name](layers, number)
    for number in ("0.1", [0.1]):
        with pytest.raises(TypeError, match=rf"^{field} must be a number or a schedule"):
            DAMPED[name](layers, number)
    for array in (np.ones(2), jnp.ones((1,))):
        with pytest.raises(
            ValueError, match=rf"^{field} must be one number at each step, but has shape \({len(array)},\)"
        ):
            DAMPED[name](layers, array)
    DAMPED[name](layers, np.float32(0.1))


def test_max_kl(step):
    layers = step[1]
    for number in (0, -1e-3, NAN, np.float32(-1), np.float64(NAN)):
        for create in (
            lambda n: kfe.kfac(0.1, layers, size=None, max_kl=n),
            lambda n: kfe.clip_by_kl(optax.identity(), n),
        ):
            with pytest.raises(ValueError, match="^max_kl must be positive, not "):
                create(number)
    # Infinity is no bound, and None is no clip.
    kfe.clip_by_kl(optax.identity(), INF)
    kfe.kfac(0.1, layers, size=None, max_kl=None)
    with pytest.raises(ValueError, match="^learning_rate must be zero or positive"):
        kfe.clip_by_kl(optax.identity(), 1.0, -0.1)
    with pytest.raises(TypeError, match="^max_kl must be a number or a schedule"):
        kfe.clip_by_kl(optax.identity(), "1e-3")


def vector(step):
    return jnp.full(2, 0.1)


SCHEDULES = {
    "damping": lambda layers: kfe.scale_by_kfac(layers, vector),
    "damping of ekfac": lambda layers: kfe.scale_by_ekfac(layers, vector),
    "damping of the model": lambda layers: kfe.scale_by_quadratic_model(
        kfe.scale_by_kfac(layers, 0.1), vector
    ),
    "decay": lambda layers: kfe.scale_by_kfac(layers, 0.1, decay=vector),
    "decay of averages": lambda layers: optax.chain(
        kfe.scale_by_kfac(layers, 0.1), kfe.average_iterates(vector)
    ),
    "scale_decay": lambda layers: kfe.scale_by_ekfac(layers, 0.1, scale_decay=vector),
    "max_kl": lambda layers: kfe.clip_by_kl(kfe.scale_by_kfac(layers, 0.1), vector),
    "learning_rate": lambda layers: kfe.clip_by_kl(kfe.scale_by_kfac(layers, 0.1), 0.1, vector),
}


def update(tx, step, state=None, **extra):
    problem, _, grads, taps = step
    state = tx.init(problem.params) if state is None else state
    return jax.eval_shape(lambda g, t: tx.update(g, state, problem.params, taps=t, **extra), grads, taps)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_a_wrong_shape(name, step):
    with pytest.raises(
        ValueError, match=rf"^{name.split()[0]} must be one number at each step, but has shape \(2,\)"
    ):
        update(SCHEDULES[name](step[1]), step)


def test_damping_of_a_step(step):
    with pytest.raises(ValueError, match=r"^damping must be one number at each step, but has shape \(2,\)"):
        update(kfe.scale_by_kfac(step[1], 0.1), step, request=kfe.Request(jnp.ones(2)))
    with pytest.raises(TypeError, match=r"give request=kfe.Request\(damping=...\)"):
        update(kfe.scale_by_kfac(step[1], 0.1), step, damping=0.2)


WRAPPERS = {
    "LayerwiseState": lambda layers: kfe.scale_by_kfac(layers, 0.1),
    "TwoLevelState": lambda layers: kfe.scale_by_two_level_kfac(layers, 0.1),
    "KlClipState": lambda layers: kfe.clip_by_kl(kfe.scale_by_kfac(layers, 0.1), 0.1),
    "QuadraticModelState": lambda layers: kfe.scale_by_quadratic_model(kfe.scale_by_kfac(layers, 0.1), 0.1),
    "AdaptiveDampingState": lambda layers: kfe.adaptive_damping(kfe.scale_by_kfac(layers, 0.1), 0.1),
    "AveragingState": lambda layers: kfe.average_iterates(),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_states_of_other_optimizers(kind, step):
    """Adam's, that of a preconditioner in a chain, and one that a restore made into plain containers."""
    problem, layers, *_ = step
    tx = WRAPPERS[kind](layers)
    own = tx.init(problem.params)
    chained = optax.chain(tx).init(problem.params)
    for state in (optax.adam(0.1).init(problem.params), chained, own._asdict(), list(own), {}):
        with pytest.raises(
            TypeError, match=f"^The optimizer state is a .* where this transformation's own is a {kind}"
        ):
            update(tx, step, state)


# What the state was made for → (how, the place that differs).
OTHERS = {
    "model": (lambda layers: kfe.scale_by_kfac(layers, 0.1), "wider", "an array of shape"),
    "model of ekfac": (lambda layers: kfe.scale_by_ekfac(layers, 0.1), "wider", "an array of shape"),
    "layers": (lambda layers: kfe.scale_by_kfac(layers.without("dense_1"), 0.1), "same", "nothing where"),
    "max_dim": (
        lambda layers: kfe.scale_by_kfac(layers, 0.1, max_dim=1),
        "same",
        r"shape \(4,\) where.*\(4, 4\)",
    ),
    "method": (lambda layers: kfe.scale_by_tkfac(layers, 0.1), "same", "where this optimizer has"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_states_of_other_models(name, step):
    create, which, sentence = OTHERS[name]
    problem, layers, *_ = step
    found = problems.make("linen", sizes=(3, 5, 2)) if which == "wider" else problem
    state = create(found.layers()).init(found.params)
    tx = kfe.scale_by_ekfac(layers, 0.1) if "ekfac" in name else kfe.scale_by_kfac(layers, 0.1)
    if name == "layers":
        state = state._replace(rest=tx.init(problem.params).rest)
    with pytest.raises(
        ValueError,
        match=f"^The optimizer state is that of another model, or of other options: at .*{sentence}",
    ):
        update(tx, step, state)


def test_chains_in_reversed_order(step):
    layers = step[1]
    with pytest.raises(
        ValueError, match="^chains names 'dense_1' before 'dense_0', which the forward pass runs first"
    ):
        kfe.scale_by_block_tridiagonal(layers, 0.1, chains=[["dense_1", "dense_0"]])
    kfe.scale_by_block_tridiagonal(layers, 0.1, chains=[["dense_0", "dense_1"]])
    # The order of the chains themselves is free.
    kfe.scale_by_block_tridiagonal(layers, 0.1, chains=[["dense_1"], ["dense_0"]])


MAKERS = {name: method.optimizer for name, method in kfe.METHODS.items()}
MAKERS |= {f"scale_by_{name}": method.scale_by for name, method in kfe.METHODS.items()}
MAKERS |= {f"factors.{name}": make for name, make in kfe.factors.FACTORS.items()}
MAKERS |= {
    name: getattr(kfe, name)
    for name in (
        "scale_by_kronecker",
        "kfac_adaptive",
        "adaptive_damping",
        "scale_by_quadratic_model",
        "average_iterates",
        "clip_by_kl",
        "in_kfe",
    )
}


@pytest.mark.parametrize("name", MAKERS)
def test_no_number(name, step):
    """Whatever takes a number refuses a string (out of a config), a list and a dictionary by the option's name."""
    layers, inner = step[1], optax.scale(-0.1)
    needed = {
        "layers": layers,
        "inner": inner,
        "factors": kfe.factors.kfac(),
        "max_kl": 0.1,
        "preconditioner": inner,
    }
    needed |= {"learning_rate": 0.1, "damping": 0.1, "initial_damping": 0.1}
    parameters = inspect.signature(MAKERS[name]).parameters
    given = {key: needed[key] for key, p in parameters.items() if p.default is p.empty and key in needed}
    numeric = [
        key
        for key, p in parameters.items()
        if re.search(r"\b(float|int|ScalarOrSchedule)\b", str(p.annotation))
    ]
    assert numeric or name == "factors.kfac"
    for option in numeric:
        for value in ("slow", [0.1], {"a": 1}):
            with pytest.raises((TypeError, ValueError), match=f"^{option} "):
                # What fixes the shapes of the state is looked at where that is made.
                MAKERS[name](**(given | {option: value})).init(step[0].params)
