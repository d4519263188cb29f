"""What JAX and Optax ask of `optax.adam` too: abstract parameters, `tree_map_params`, no implicit rank promotion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfe_optax as kfe

from . import problems, zoo
from .methods import CASES, make_problem, quick


def mesh():
    return jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))


# Optimizers and wrappers beside the preconditioners of `CASES`.
WRAPPED = {
    "kfac": lambda layers: kfe.kfac(0.1, layers, weight_decay=0.1),
    "kfac_adaptive": kfe.kfac_adaptive,
    "averaged": lambda layers: optax.chain(kfe.scale_by_kfac(layers, 0.1), kfe.average_iterates()),
    "adaptive_damping": lambda layers: kfe.adaptive_damping(kfe.kfac(0.1, layers), 0.1),
    "clipped": lambda layers: kfe.clip_by_kl(kfe.scale_by_ekfac(layers, 0.1), 0.1),
    "two_level": lambda layers: kfe.two_level(kfe.scale_by_kfac(layers, 0.1), layers),
    "sharded": lambda layers: kfe.shard_state(kfe.kfac(0.1, layers), mesh()),
    "injected": lambda layers: optax.inject_hyperparams(kfe.kfac)(0.1, layers, damping=0.1),
}
ALL = {**{name: case.make for name, case in CASES.items()}, **WRAPPED}


@pytest.fixture(scope="module")
def problem():
    return make_problem()


def described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("name", ALL)
def test_abstract_parameters(name, problem):
    """The state of parameters of which the shapes alone are known, as a restore asks for it: by eval_shape, and made."""
    tx = ALL[name](problem.layers)
    state, shapes = tx.init(problem.params), abstract(problem.params)
    assert described(jax.eval_shape(tx.init, shapes)) == described(state)
    if name != "injected":  # Optax's wrapper asks the parameters themselves for their dtype.
        assert described(tx.init(shapes)) == described(state)


def test_abstract_module():
    """Of an NNX model that was never made."""
    small = problems.make("nnx")
    layers = small.layers()
    model = nnx.eval_shape(lambda: small.params)
    tx = kfe.kfac(0.1, layers)
    state = tx.init(nnx.state(small.params, nnx.Param))
    assert described(tx.init(nnx.state(model, nnx.Param))) == described(state)


@pytest.mark.parametrize("name", ALL)
def test_tree_map_params(name, problem):
    """What has the structure of the parameters is mapped with other trees of that structure; all else is not."""
    tx = ALL[name](problem.layers)
    state = tx.init(problem.params)
    specs = jax.tree.map(lambda leaf: leaf.shape, problem.params)
    found = optax.tree_map_params(
        tx,
        lambda leaf, spec: spec,
        state,
        specs,
        transform_non_params=lambda leaf: None,
        # The aliases keep no momentum of the rest.
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    mapped = [leaf for leaf in jax.tree.leaves(found, is_leaf=lambda v: isinstance(v, dict)) if leaf == specs]
    expected = {
        "kfac": 1,
        "kfac_adaptive": 2,
        "averaged": 1,
        "adaptive_damping": 2,
        "sharded": 1,
        "injected": 1,
    }
    assert len(mapped) == expected.get(name, 0)
    same = optax.tree_map_params(tx, lambda leaf: leaf, state)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_tree_map_params_of_a_part_in_rest(problem):
    """The moments of the rest stand under the parameters' names, and are none of the parameters' structure."""
    tx = kfe.scale_by_kfac(problem.layers.without("head"), 0.1)
    state = tx.init(problem.params)
    found = optax.tree_map_params(tx, lambda leaf: None, state, transform_non_params=lambda leaf: leaf)
    jax.tree.map(np.testing.assert_array_equal, found, state)


@pytest.mark.parametrize(
    "name",
    quick("kfac", "ekfac", "kpsvd", "two_level_kfac", "kfac_tridiagonal", "soap", "kfac_adaptive", of=ALL),
)
def test_no_implicit_rank_promotion(name, problem):
    """Nothing of ours relies on it; the user's own program may."""

    def loss_fn(params, x, y, weight):
        with jax.numpy_rank_promotion("allow"):
            return problem.loss_fn(params, x, y, weight)

    tx, batch = ALL[name](problem.layers), problem.batch()

    def step(params, state):
        with jax.numpy_rank_promotion("raise"):
            differentiate = kfe.value_grad_and_taps(loss_fn, problem.layers, quadratic_model=True)
            _, grads, taps = differentiate(params, batch.x, batch.y, batch.weight, key=batch.key)
            return tx.update(grads, state, params, taps=taps)[0]

    with jax.numpy_rank_promotion("raise"):
        assert described(jax.eval_shape(step, problem.params, tx.init(problem.params))) == described(
            problem.params
        )


@pytest.mark.parametrize(
    "name",
    quick("tied_embedding", "positions", of=("tied_embedding", "positions", "norms", "linear_maps")),
)
def test_no_implicit_rank_promotion_in_kinds(name):
    loss_fn, params, args = zoo.CASES[name].make(jnp.float32)

    def allowed(*args):
        with jax.numpy_rank_promotion("allow"):
            return loss_fn(*args)

    layers = kfe.find_layers(allowed, params, *args)
    tx = kfe.scale_by_tkfac(layers, 0.1, pairing="example")

    def step(params, state):
        mask = jnp.ones(args[0].shape[:2], bool) if name == "positions" else None
        _, grads, taps = kfe.value_grad_and_taps(allowed, layers)(
            params, *args, key=jax.random.key(0), row_mask=mask
        )
        return tx.update(grads, state, params, taps=taps)[0]

    with jax.numpy_rank_promotion("raise"):
        assert described(jax.eval_shape(step, params, tx.init(params))) == described(params)


def test_no_implicit_rank_promotion_in_diagnostics():
    """Of a stack of two layers, one side of which is a diagonal."""
    loss_fn, params, args = zoo.CASES["scan_axis_0"].make(jnp.float32)

    def allowed(*args):
        with jax.numpy_rank_promotion("allow"):
            return loss_fn(*args)

    layers = kfe.find_layers(allowed, params, *args)
    (name,) = (name for name, layer in layers.items() if layer.stacked)

    def measure(params):
        _, _, taps = kfe.value_grad_and_taps(allowed, layers, fisher="exact")(params, *args)
        terms = kfe.factors.estimate(kfe.factors.lanczos(), taps, max_dim=4)[name]
        matrix = kfe.diagnostics.kronecker_matrix(terms, stacked=1)
        spectrum = jnp.diagonal(matrix, axis1=-2, axis2=-1)
        number = kfe.diagnostics.condition_number(spectrum, damping=0.1)
        return number, kfe.diagnostics.mean_absolute_correlation(matrix)

    with jax.numpy_rank_promotion("raise"):
        assert [leaf.shape for leaf in jax.eval_shape(measure, params)] == [(2,), (2,)]
