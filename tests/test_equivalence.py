"""One network, written in different ways, takes the same K-FAC and EKFAC steps; so do other orders of the same work."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfe_optax as kfe

from . import linen_models, nnx_models, problems
from .dense import assert_close
from .models import batch, linen, nnx_loss, other_state
from .zoo import CASES

DEPTH = 2


def forms():
    """{name: (loss_fn, params, args, how to read the two middle layers' W̄)} of one Linen network with equal weights."""

    class Unrolled(nn.Module):
        around: object = lambda block: block

        @nn.compact
        def __call__(self, x):
            for i in range(DEPTH):
                x, _ = self.around(linen_models.Block)(name=f"block_{i}")(x)
            return x

    def unrolled(around):
        return lambda x: Unrolled(around, name="blocks")(x)

    def lifted(block):
        return lambda x: linen_models.scanned(0, block, DEPTH)(name="blocks")(x, None)[0]

    return {
        "unrolled": unrolled(lambda block: block),
        "remat": unrolled(nn.remat),
        "jit": unrolled(nn.jit),
        "scan": lifted(linen_models.Block),
        "scan over remat": lifted(nn.remat(linen_models.Block)),
    }


def stacked(params):
    """The unrolled parameters in the tree of a scan."""
    blocks = params["blocks"]
    both = [blocks[f"block_{i}"]["dense"] for i in range(DEPTH)]
    return {**params, "blocks": {"dense": jax.tree.map(lambda *v: jnp.stack(v), *both)}}


OPTIMIZERS = {
    "kfac": lambda layers: kfe.scale_by_kfac(layers, 0.1, factor_update_period=1, inverse_update_period=1),
    "ekfac": lambda layers: kfe.scale_by_ekfac(layers, 0.1, scale="batch", basis_update_period=2),
}


def two_updates(make, loss_fn, params, args):
    """The update trees of two sampled steps."""
    layers = kfe.find_layers(loss_fn, params, *args)
    tx = make(layers)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)
    state, found = tx.init(params), []
    update = jax.jit(tx.update)
    for i in range(2):
        _, grads, taps = differentiate(params, *args, key=jax.random.key(i))
        updates, state = update(grads, state, params, taps=taps)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
        found.append(updates)
    return found


@pytest.mark.parametrize(
    ("optimizer", "every"),
    [
        pytest.param("kfac", False, marks=pytest.mark.slow),
        pytest.param("kfac", True, marks=pytest.mark.nightly),
        pytest.param("ekfac", False, marks=pytest.mark.nightly),
    ],
)
def test_the_same_layer_everywhere(optimizer, every, x64):
    """Unrolled, remat, nn.jit, nn.scan, nn.scan over remat: one update."""
    expected = None
    for name, lift in forms().items():
        if not every and name in ("remat", "scan"):
            continue  # their combination covers them
        module = linen_models.Stack(lift)
        loss_fn, params, args = linen(module, jnp.float64, *batch(jnp.float64))
        if name == "unrolled":
            start = params
        params = stacked(start) if name.startswith("scan") else start
        found = two_updates(OPTIMIZERS[optimizer], loss_fn, params, args)
        if name == "unrolled":
            expected = found
        else:
            wanted = [stacked(u) for u in expected] if name.startswith("scan") else expected
            assert_close(found, wanted, 1e-9)


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stacking_axes(optimizer, x64):
    """nn.scan with variable_axes 0, 1 and −1: one update, with the axis where it belongs."""
    start = CASES["scan_axis_0"].make(jnp.float64)
    expected = two_updates(OPTIMIZERS[optimizer], *start)
    for name, axis in (("scan_axis_1", 1), ("scan_axis_last", -1)):
        loss_fn, _, args = CASES[name].make(jnp.float64)

        def moved(tree, axis=axis):
            blocks = jax.tree.map(lambda v: jnp.moveaxis(v, 0, min(axis, v.ndim - 1)), tree["blocks"])
            return {**tree, "blocks": blocks}

        found = two_updates(OPTIMIZERS[optimizer], loss_fn, moved(start[1]), args)
        assert_close(found, [moved(u) for u in expected], 1e-9)


@pytest.mark.slow
def test_nnx_forms(x64):
    """nnx.remat, nnx.jit and nnx.scan around NNX layers: the update of the plain call."""
    loss_fn, model, args = CASES["nnx_mlp"].make(jnp.float64)
    graph, parameters = nnx.split(model)
    del graph

    def updates(model):
        layers = kfe.find_layers(loss_fn, model, *args)
        tx = OPTIMIZERS["kfac"](layers)
        _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(model, *args)
        return jax.jit(tx.update)(grads, jax.jit(tx.init)(nnx.state(model, nnx.Param)), taps=taps)[0]

    expected = updates(model)
    for around in (nnx.remat, nnx.jit):
        other = nnx_models.Mlp(jnp.float64, around)
        nnx.update(other, parameters)
        assert_close(jax.tree.leaves(updates(other)), jax.tree.leaves(expected), 1e-10)
    scans = [nnx_models.Scanned(jnp.float64, around) for around in (lambda f: f, nnx.remat)]
    nnx.update(scans[1], nnx.state(scans[0]))
    first, second = map(updates, scans)
    assert_close(jax.tree.leaves(second), jax.tree.leaves(first), 1e-10)


@pytest.mark.slow
def test_frameworks_agree_when_sampled(x64):
    """Linen, NNX and plain JAX draw the same targets from one key."""
    found = []
    for framework in problems.FRAMEWORKS:
        problem = problems.make(framework)
        layers = problem.layers()
        tx = kfe.kfac(0.1, layers)
        found.append(problems.run(problem, layers, tx, 2, fisher="sampled")[0])
    assert_close(found[1], found[0], 1e-10)
    assert_close(found[2], found[0], 1e-10)


@pytest.mark.slow
def test_inside_jit_scan_and_vmap(x64):
    """A jitted step, a scan over steps and a vmap over seeds give what separate calls give."""
    problem = problems.make("linen")
    layers = problem.layers()
    tx = kfe.kfac(0.1, layers)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers)

    def step(carry, key):
        params, opt_state = carry
        loss, grads, taps = differentiate(params, *problem.args, key=key)
        updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        return (optax.apply_updates(params, updates), opt_state), loss

    def train(key):
        start = (problem.params, tx.init(problem.params))
        return jax.lax.scan(step, start, jax.random.split(key, 3))

    losses = []
    for seed in range(2):
        carry = (problem.params, tx.init(problem.params))
        jitted = jax.jit(step)
        for key in jax.random.split(jax.random.key(seed), 3):
            carry, loss = jitted(carry, key)
            losses.append(loss)
    expected = jnp.stack(losses).reshape(2, 3)
    assert_close(jax.jit(train)(jax.random.key(1))[1], expected[1], 1e-12)
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    assert_close(jax.jit(jax.vmap(train))(keys)[1], expected, 1e-12)
    assert len(np.unique(expected[:, -1])) == 2


@pytest.mark.slow
def test_batch_size_may_change():
    """Layers found on one batch serve another; only the compilation is new."""
    loss_fn, params, (x, labels) = CASES["mlp"].make(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, x, labels)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    for n in (1, 4):
        _, grads, taps = differentiate(params, x[:n], labels[:n])
        for name, layer in layers.items():
            assert taps[name].example_gradients().shape == (n, *layer.shape)
        total = taps["last"].example_gradients().mean(0)
        assert_close(total, layers["last"].to_matrix(grads), 1e-6)


def test_nnx_state_moves_alike_through_steps():
    """Batch statistics and rng counts after three jitted steps are those of nnx.value_and_grad."""
    case = CASES["batch_norm_dropout"]
    _, model, args = case.make(jnp.float32)
    other = nnx.clone(model)
    layers = kfe.find_layers(nnx_loss, model, *args)
    differentiate = kfe.value_grad_and_taps(nnx_loss, layers, fisher="sampled")
    plain = nnx.jit(nnx.value_and_grad(nnx_loss))
    for i in range(3):
        loss, _, _ = differentiate(model, *args, key=jax.random.key(i))
        assert_close(loss, plain(other, *args)[0], 1e-6)
    assert_close(other_state(model), other_state(other), 1e-6)
    assert int(model.dropout.rngs.count[...]) == 3
