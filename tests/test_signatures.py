"""What `help()`, an editor and a config see: every option of an optimizer by name, with its default and its documentation."""

from __future__ import annotations

import inspect
import re

import jax
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._aliases import assembly

from . import problems

OPTIMIZERS = {name: method.optimizer for name, method in kfe.METHODS.items()}
MAKERS = {
    **OPTIMIZERS,
    **{method.scale_by.__name__: method.scale_by for method in kfe.METHODS.values()},
    **{f"factors.{name}": make for name, make in kfe.factors.FACTORS.items()},
    **{
        name: getattr(kfe, name)
        for name in ("soap", "kfac_adaptive", "in_kfe", "scale_by_kronecker", "two_level")
    },
}
# What an optimizer takes otherwise than its preconditioner: the benchmark's choice, see the docstrings.
EARLY = {"initial_refreshes", "refreshes_per_doubling"}
CHOSEN = {"damping", "relative_damping"} | EARLY
CHOSEN_BY = {
    "ekfac": {"scale", "damping_type", "scale_update_period"},
    "spectral_kfac": {"refreshes_per_doubling"},
}


def options(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("name", MAKERS)
def test_every_option_has_a_name_and_a_line(name):
    parameters = options(MAKERS[name])
    assert not {p.kind for p in parameters.values()} & {
        inspect.Parameter.VAR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    }
    documented = MAKERS[name].__doc__.partition("Args:")[2].partition("Returns:")[0]
    # An entry is one name or several, over more than one line where they are many.
    entries = re.findall(r"^\s{2,}((?:\w+,\s+)*\w+):", documented, flags=re.MULTILINE)
    assert {option for entry in entries for option in re.split(r",\s+", entry)} >= set(parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_all_options_of_its_preconditioner(name):
    own, inner = options(OPTIMIZERS[name]), options(kfe.METHODS[name].scale_by)
    assert set(inner) <= set(own)
    if name != "spectral_kfac":
        common = {option: p for option, p in options(assembly.around).items() if p.default is not p.empty}
        assert {option: own[option].default for option in common} == {o: p.default for o, p in common.items()}
    assert list(own)[:3] == ["learning_rate", "layers", "damping"]
    differing = {option for option in inner if own[option].default != inner[option].default}
    assert differing == CHOSEN_BY.get(name, set()) | (CHOSEN if name != "spectral_kfac" else set())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "soap"])
def test_every_number_may_stand_in_the_state(name):
    """`optax.inject_hyperparams` makes arrays of all numbers, periods too, also where `init` is traced."""
    problem = problems.make("plain")
    tx = optax.inject_hyperparams(MAKERS[name])(1e-2, problem.layers())
    state = jax.eval_shape(tx.init, problem.params)
    assert "learning_rate" in state.hyperparams and "decay" in state.hyperparams
    assert not {"max_dim", "subspace"} & set(state.hyperparams)
