"""Products with the whole Fisher by transposing the pull, against JAX's forward mode and a dense Hessian at the outputs."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import problems
from .dense import assert_close
from .methods import kinds_of_frameworks


class _Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(nn.Dense(4, param_dtype=jnp.float64)(h)), None


class _Mixed(nn.Module):
    """A repeated layer, remat under a scan over layers, a recurrent cell, a convolution and a norm."""

    @nn.compact
    def __call__(self, x):
        wide = {"param_dtype": jnp.float64}
        again = nn.Dense(4, **wide)
        h = again(jnp.tanh(again(nn.Conv(4, (2,), **wide)(x[..., None]).sum(1))))
        layers = nn.scan(nn.remat(_Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        h, _ = layers()(h, None)
        steps = nn.RNN(nn.SimpleCell(4, **wide))(jnp.stack([h, 2 * h], 1))
        return nn.Dense(3, **wide)(nn.LayerNorm(**wide)(steps[:, -1]))


def _losses(module, z, x, labels):
    """Three heads of different weights on the same outputs."""
    return (
        module.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()
        + 2 * module.losses.l2_loss(z, x[:, :3]).sum()
        + module.losses.sigmoid_binary_cross_entropy(z, x[:, :3] > 0).mean()
    )


@pytest.fixture(scope="module")
def mixed():
    with jax.enable_x64(True):
        model, x, labels = _Mixed(), jax.random.normal(jax.random.key(0), (5, 4)), jnp.arange(5) % 3
        params = jax.jit(model.init)(jax.random.key(1), x)["params"]

        def loss_fn(params, x, labels):
            return _losses(kfe, model.apply({"params": params}, x), x, labels)

        return loss_fn, params, (x, labels), lambda p: model.apply({"params": p}, x)


def _vectors(params, count):
    generator = np.random.default_rng(7)
    one = lambda p: jnp.asarray(generator.normal(size=p.shape), p.dtype)
    return [jax.tree.map(one, params) for _ in range(count)]


@pytest.mark.release
@pytest.mark.parametrize("fisher", ["sampled", pytest.param("exact", marks=pytest.mark.nightly)])
def test_products_of_the_fisher(mixed, fisher, x64):
    """vᵀFu = (Jv)ᵀH(Ju) with H the Hessian at the outputs, whatever the layers, the loops and the weights of the losses."""
    loss_fn, params, args, outputs = mixed
    layers = kfe.find_layers(loss_fn, params, *args)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher, quadratic_model=True)
    vectors = _vectors(params, 2)

    @jax.jit
    def measured(params):
        loss, _, taps = differentiate(params, *args, key=jax.random.key(3))
        return taps.fisher_products(*map(taps.tangent, vectors)), taps.loss_at(vectors[0]), taps.loss - loss

    products, elsewhere, difference = measured(params)

    @jax.jit
    def expected(params):
        hessian = jax.hessian(lambda z: _losses(optax, z, *args))(outputs(params))
        tangents = [jax.jvp(outputs, (params,), (v,))[1] for v in vectors]
        return [[jnp.einsum("ab,abcd,cd", v, hessian, u) for u in tangents] for v in tangents]

    assert_close(products, np.array(expected(params)), 1e-12)
    assert_close(elsewhere, jax.jit(loss_fn)(vectors[0], *args), 1e-12)
    assert difference == 0


@pytest.mark.parametrize(("kind", "framework"), kinds_of_frameworks("plain", "nnx"))
def test_equal_to_the_sum_over_exact_columns(framework, kind, x64):
    """The same F as fisher="exact" estimates curvature from: vᵀFv of one layer's v is that of its per-example gradients."""
    problem = problems.make(framework, kind)
    layers = problem.layers()
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact", quadratic_model=True)
    _, grads, taps = differentiate(problem.params, *problem.args)
    name = problem.names[0]
    only = jax.tree.map(jnp.zeros_like, grads)
    wanted = {path for _, path in layers[name].paths}
    leaves = jax.tree.leaves(grads)
    from kfe_optax._layers.paths import leaves_by_path

    new = [
        leaf if path in wanted else jnp.zeros_like(leaf)
        for path, leaf in zip(leaves_by_path(grads), leaves, strict=True)
    ]
    vector = jax.tree.unflatten(jax.tree.structure(only), new)
    a, g = map(np.asarray, layers[name].rows(taps[name]))
    v = np.asarray(layers[name].to_matrix(grads))
    # (columns, n): the product of each column's per-example gradient with V.
    columns = np.einsum("nta,ab,cntb->cn", a, v, g) if g.ndim == 4 else np.einsum("nta,ab,ntb->n", a, v, g)
    product = jax.jit(lambda taps, vector: taps.fisher_products(taps.tangent(vector))[0, 0])(taps, vector)
    assert_close(product, np.sum(columns**2) / layers[name].examples, 1e-12)


@pytest.mark.release
def test_mutable_state_and_auxiliary_values(x64):
    """The trial loss leaves batch statistics alone and drops auxiliary values."""
    model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False), nn.Dense(2)])
    x, labels = jax.random.normal(jax.random.key(0), (6, 4)), jnp.arange(6) % 2
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params, state = variables["params"], variables["batch_stats"]

    def loss_fn(params, state, x):
        z, new = model.apply({"params": params, "batch_stats": state}, x, mutable="batch_stats")
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean(), new

    layers = kfe.find_layers(loss_fn, params, state, x, has_aux=True)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, has_aux=True, quadratic_model=True)
    (loss, _), grads, taps = differentiate(params, state, x, key=jax.random.key(2))
    loss_at = jax.jit(lambda taps, params: taps.loss_at(params))
    assert_close(loss_at(taps, params), loss, 1e-12)
    assert loss_at(taps, jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g), params, grads)) < loss


@pytest.mark.release
def test_misuse():
    """Taps that were not asked, a loss that registers nothing, a loss inside a vmap."""
    problem = problems.make("plain", "gaussian")
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    for read in (lambda: taps.loss, lambda: taps.loss_at(problem.params), lambda: taps.tangent(grads)):
        with pytest.raises(ValueError, match="quadratic_model=True"):
            read()

    def silent(params, x, y):
        return jnp.mean((problems.plain_forward(params, x) - y) ** 2)

    layers = kfe.find_layers(silent, problem.params, *problem.args)
    with pytest.raises(ValueError, match="registers nothing"):
        kfe.value_grad_and_taps(silent, layers, fisher="empirical", quadratic_model=True)(
            problem.params, *problem.args
        )

    def mapped(params, x, y):
        z = problems.plain_forward(params, x)
        return jnp.mean(jax.vmap(lambda z, y: kfe.losses.l2_loss(z, y).sum())(z, y))

    layers = kfe.find_layers(mapped, problem.params, *problem.args)
    with pytest.raises(ValueError, match="inside a vmap or a loop"):
        kfe.value_grad_and_taps(mapped, layers, quadratic_model=True)(
            problem.params, *problem.args, key=jax.random.key(0)
        )


@pytest.mark.release
def test_what_nobody_asks_for_costs_nothing():
    """Without the flag the taps hold no outputs, and with it the gradient is the same to the last bit."""
    problem = problems.make("plain", "softmax")
    layers = problem.layers()
    key = jax.random.key(0)
    results = [
        kfe.value_grad_and_taps(problem.loss_fn, layers, quadratic_model=flag)(
            problem.params, *problem.args, key=key
        )
        for flag in (False, True)
    ]
    jax.tree.map(np.testing.assert_array_equal, results[0][1], results[1][1])
    assert len(jax.tree.leaves(results[0][2])) < len(jax.tree.leaves(results[1][2]))
