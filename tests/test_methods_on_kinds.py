"""K-FAC, EKFAC and Adam in the eigenbasis on every approximation, against dense float64 computations on explicit blocks."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import dense
from . import dense_factors as df
from .dense import assert_close
from .kind_blocks import DAMPING, Blocks, blocks, one_step
from .kind_cases import CONVOLUTIONS, EMBEDDINGS, LINEAR_MAPS
from .kind_cases_more import case, norm
from .kind_networks import Network
from .methods import quick

_CONVOLUTIONS = (
    "conv1",
    "feature_groups",
    "groups",
    "sua",
    "sua_uncentered",
    "reduce",
    "reduce_feature_groups",
)
APPROXIMATIONS = {
    **{name: CONVOLUTIONS[name] for name in _CONVOLUTIONS},
    **{name: LINEAR_MAPS[name] for name in ("queries", "projection", "heads_of_both")},
    "rows reduced": LINEAR_MAPS["reduce"],
    "tokens reduced": EMBEDDINGS["reduce"],
    "diagonal norm": case(norm, nn.LayerNorm, (3, 4), -1, configure={"approximation": "diagonal"}),
}
# Blocks that have an A or a G in common.
SHARING_BLOCKS = ("groups", "sua_uncentered", "queries", "projection", "heads_of_both")


# Other forms of what is in the first network.
MORE = ("conv1", "sua", "sua_uncentered", "reduce", "queries", "heads_of_both", "tokens reduced")
EVERY = pytest.mark.parametrize(
    "name", quick(slow=[n for n in APPROXIMATIONS if n not in MORE], of=APPROXIMATIONS)
)


@functools.cache
def approximations(more=False):
    return Network({name: made for name, made in APPROXIMATIONS.items() if (name in MORE) == more})


def newton(layers):
    """Division by the eigenvalues that `in_kfe` hands on."""

    def update(updates, state, params=None, *, kfe, **extra):
        del params, extra
        for name, values in kfe.eigenvalues.items():
            assert values.shape == layers[name].shape
        return jax.tree.map(lambda v, s: v / (s + DAMPING), updates, kfe.eigenvalues), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def methods(layers):
    first = {"null_threshold": 0.0, "scale": "batch"}
    return {
        "factored": kfe.scale_by_kfac(layers, DAMPING),
        "exact": kfe.scale_by_kfac(layers, DAMPING, damping_type="exact"),
        "ekfac": kfe.scale_by_ekfac(layers, DAMPING, **first),
        "ekfac factored": kfe.scale_by_ekfac(layers, DAMPING, damping_type="factored", **first),
        "restart": kfe.scale_by_ekfac(
            layers, DAMPING, on_refresh="restart", scale_decay=1.0, null_threshold=0.0
        ),
        "adam": kfe.in_kfe(optax.scale_by_adam(), layers),
        "newton": kfe.in_kfe(newton(layers), layers),
    }


@functools.cache
def approximated(more):
    network = approximations(more)
    return one_step(network, methods(network.layers))


def answers(name):
    """(the layer by its definition, {method: (updates, state)} of its network)."""
    more = name in MORE
    return Blocks(approximations(more), name), approximated(more)


@EVERY
def test_kfac(name, x64):
    """Both dampings, block by block with explicit inverses; a π of all blocks where they share a factor.

    EKFAC's restarted scale, and the eigenvalues that an inner transformation sees, are those of the exact form.
    """
    own, steps = answers(name)
    root = np.sqrt(DAMPING)
    names = ("factored", "exact", "restart", "newton")
    factored, exact, *same = (own.matrix(steps[method][0]) for method in names)
    for index, v in own.v.items():
        a, g, pi = own.a[index], own.g[index], own.pi[index]
        left, right = a + pi * root * np.eye(len(a)), g + root / pi * np.eye(len(g))
        assert_close(factored[index], np.linalg.inv(left) @ v @ np.linalg.inv(right), 1e-10)
        expected = dense.kfac_exact(a, g, v, DAMPING)
        for found in (exact, *same):
            assert_close(found[index], expected, 1e-10)


@EVERY
def test_ekfac(name, x64):
    """The best diagonal of each block in its basis: it keeps the trace of F and is closer to F than A⊗G."""
    own, steps = answers(name)
    updates, state = steps["ekfac"]
    damped_updates, damped = steps["ekfac factored"]
    basis, scale = own.basis(state.method.basis[name]), blocks(own.layer, state.method.scale[name])
    found, other = own.matrix(updates), own.matrix(damped_updates)
    assert_close(damped.method.scale[name], state.method.scale[name], 1e-12)
    for index, v in own.v.items():
        a, g, f, u_a, u_g = own.a[index], own.g[index], own.f[index], basis[0][index], basis[1][index]
        for factor, u in ((a, u_a), (g, u_g)):
            assert_close(u.T @ u, np.eye(len(u)), 1e-12)
            assert_close(u * np.diag(u.T @ factor @ u) @ u.T, factor, 1e-10)
        s = scale[index]
        assert_close(s, df.best_diagonal(f, u_a, u_g), 1e-10)
        assert_close(s.sum(), np.trace(f), 1e-10)
        assert np.linalg.norm(f - df.in_basis(s, u_a, u_g)) <= np.linalg.norm(f - np.kron(a, g)) * (1 + 1e-12)
        rotated = u_a.T @ v @ u_g
        assert_close(found[index], u_a @ (rotated / (s + DAMPING)) @ u_g.T, 1e-10)
        s_a, s_g = np.diag(u_a.T @ a @ u_a), np.diag(u_g.T @ g @ u_g)
        root, pi = np.sqrt(DAMPING), own.pi[index]
        added = np.outer(s_a + pi * root, s_g + root / pi) - np.outer(s_a, s_g)
        assert_close(other[index], u_a @ (rotated / (s + added)) @ u_g.T, 1e-10)


@EVERY
def test_adam_in_the_eigenbasis(name, x64):
    own, steps = answers(name)
    updates, state = steps["adam"]
    basis, found = own.basis(state.method.basis[name]), own.matrix(updates)
    for index, v in own.v.items():
        u_a, u_g = basis[0][index], basis[1][index]
        rotated = u_a.T @ v @ u_g
        assert_close(found[index], u_a @ (rotated / (np.abs(rotated) + 1e-8)) @ u_g.T, 1e-6)


OTHERS = [name for name in kfe.factors.FACTORS if name != "kfac"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_factors_refuse(name, x64):
    """What is about A and G is no option of other factors; K-FAC's correction has an A and a G of its own."""
    layers = {**approximations().layers, **approximations(True).layers}
    refused = [*SHARING_BLOCKS]
    if name != "kfac_corrected":
        refused += ["sua", "reduce", "reduce_feature_groups", "rows reduced", "tokens reduced"]
    factors = kfe.factors.FACTORS[name]()
    assert layers.keys() == APPROXIMATIONS.keys()
    for name, layer in layers.items():
        if name in refused:
            with pytest.raises(ValueError, match=f"of layer '{name}' is about K-FAC's A and G"):
                factors.init([layer], 100)
        else:
            factors.init([layer], 100)
