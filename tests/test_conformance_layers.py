"""What every layer of every model must satisfy, whatever stands around it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfe_optax as kfe
from kfe_optax._layers.kinds import Dense
from kfe_optax._layers.paths import leaves_by_path

from .dense import assert_close, relative_error
from .methods import quick
from .models import BATCH, batch, linen, other_state
from .zoo import CASES

pytestmark = pytest.mark.release

# The scope keeps the tests of one model together, so that `empirical` computes it once.
ALL = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[getattr(pytest.mark, case.tier)] if case.tier else [])
        for name, case in CASES.items()
    ],
    scope="module",
)


def reference(case, loss_fn, params, args):
    """((loss, aux) or loss, gradients) of JAX or NNX itself."""
    lib = nnx if isinstance(params, nnx.Module) else jax
    return lib.jit(lib.value_and_grad(loss_fn, has_aux=case.has_aux))(params, *args)


@functools.lru_cache(maxsize=2)
def empirical(name):
    """The case in float64 with its layers, gradients and empirical taps."""
    case = CASES[name]
    loss_fn, params, args = case.make(jnp.float64)
    layers = kfe.find_layers(loss_fn, params, *args, has_aux=case.has_aux)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical", has_aux=case.has_aux)
    before = nnx.clone(params) if isinstance(params, nnx.Module) else params
    value, grads, taps = differentiate(params, *args)
    return case, loss_fn, before, params, args, layers, value, grads, readings(layers, taps, case)


def readings(layers, taps, case):
    """Everything that the taps answer, compiled at once."""

    @jax.jit
    def read(taps):
        drawn, found = taps.draw(0), {}
        for name, layer in layers.items():
            own = {}
            if case.example_gradients:
                own["examples"] = drawn[name].example_gradients()
                own["moment"] = drawn[name].second_moment_in(None, None)
            if not layer.shared:
                own["rows"] = drawn[name].rows()
            found[name] = own
        return found

    return read(taps)


@ALL
def test_discovery(name):
    """Names are unique, shapes, stacked axes and sharing are found, and nothing else is a layer."""
    case = CASES[name]
    loss_fn, params, args = case.make(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, *args, has_aux=case.has_aux)
    assert tuple((layer.shape, layer.shared) for layer in layers.values()) == case.sizes
    assert [layer.order for layer in layers.values()] == list(range(len(layers)))
    taken = [path for layer in layers.values() for _, path in layer.paths]
    tree = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    assert sorted([*taken, *layers.rest], key=str) == sorted(leaves_by_path(tree), key=str)
    assert all(reason for reason in layers.reasons)
    assert hash(layers) == hash(kfe.find_layers(loss_fn, params, *args, has_aux=case.has_aux))


@ALL
def test_value_and_gradient_float64(name, x64):
    """The loss, gradient, auxiliary value and mutable state are those of JAX (NNX) to 1e-12."""
    case, loss_fn, before, after, args, _, value, grads, _ = empirical(name)
    expected, expected_grads = reference(case, loss_fn, before, args)
    assert_close(value, expected, 1e-12)
    assert_close(grads, expected_grads, 1e-12)
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    if isinstance(before, nnx.Module):
        assert_close(other_state(after), other_state(before), 1e-12)


@pytest.mark.parametrize("name", quick("mlp", "nnx_mlp", "conv_norm_pool", "tied_embedding", of=CASES))
def test_value_and_gradient_float32(name):
    case = CASES[name]
    loss_fn, params, args = case.make(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, *args, has_aux=case.has_aux)
    before = nnx.clone(params) if isinstance(params, nnx.Module) else params
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, has_aux=case.has_aux)
    value, grads, _ = differentiate(params, *args, key=jax.random.key(0))
    expected, expected_grads = reference(case, loss_fn, before, args)
    assert_close(value, expected, 1e-6)
    assert_close(grads, expected_grads, 1e-6)
    jax.tree.map(lambda a, e: np.testing.assert_equal(a.dtype, e.dtype), grads, expected_grads)


@ALL
def test_law_of_rows(name, x64):
    """Σ_t ā gᵀ of an empirical tap is the gradient of that example's loss, example by example.

    Where batch statistics or dropout tie the examples together, the mean over the examples is the gradient.
    """
    case, loss_fn, before, _, args, layers, _, grads, read = empirical(name)
    examples = example_gradients(case, loss_fn, before, args) if case.independent else None
    for layer in layers.values():
        own = read[layer.name]
        assert ("examples" in own) == case.example_gradients
        if not case.example_gradients:
            continue
        assert_close(np.mean(own["examples"], -3), layer.to_matrix(grads), 1e-12)
        if not layer.shared:
            a, g = map(np.asarray, own["rows"])
            assert a.shape[-3] == g.shape[-3] == BATCH
            assert_close(np.einsum("...nta,...ntb->...nab", a, g), own["examples"], 1e-12)
        # The best diagonal in the standard basis is the mean of the squares.
        assert_close(own["moment"], np.mean(np.square(own["examples"]), -3), 1e-12)
        if case.independent:
            each = [layer.to_matrix(jax.tree.map(lambda v, n=n: v[n], examples)) for n in range(BATCH)]
            assert_close(own["examples"], np.moveaxis(np.stack(each), 0, len(layer.stack_shape)), 1e-12)


def example_gradients(case, loss_fn, params, args):
    """vmap(grad) over batches of one."""
    if isinstance(params, nnx.Module):
        graph, parameters, other = nnx.split(params, nnx.Param, ...)
        rebuild = lambda parameters: nnx.merge(graph, parameters, other, copy=True)
    else:
        parameters, rebuild = params, lambda parameters: parameters

    def loss(parameters, *example):
        value = loss_fn(rebuild(parameters), *(value[None] for value in example))
        return value[0] if case.has_aux else value

    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, *(0,) * len(args))))(parameters, *args)
    return jax.tree.map(np.asarray, gradients)


@ALL
def test_matrix_and_back(name, x64):
    """W̄ holds every element of the parameters once, stacked axes first; `from_matrix` is the inverse."""
    _, _, before, _, _, layers, *_ = empirical(name)
    tree = nnx.state(before, nnx.Param) if isinstance(before, nnx.Module) else before
    leaves = leaves_by_path(tree)
    for layer in layers.values():
        matrix = np.asarray(layer.to_matrix(tree))
        assert matrix.shape == layer.shape
        for index in np.ndindex(*layer.stacked):
            slices = {}
            for role, path in layer.paths:
                leaf = np.asarray(leaves[path])
                for axis, i in sorted(zip(layer.stack_axes, index, strict=True), reverse=True):
                    leaf = np.take(leaf, i, min(axis, leaf.ndim - 1))
                slices[role] = leaf
            elements = np.concatenate([leaf.ravel() for leaf in slices.values()])
            np.testing.assert_array_equal(np.sort(matrix[index].ravel()), np.sort(elements))
            if layer.kind == Dense():  # the kernel above the bias
                rows = [slices["kernel"], *([slices["bias"][None]] if "bias" in slices else [])]
                np.testing.assert_array_equal(matrix[index], np.concatenate(rows))
        back = layer.from_matrix(jnp.asarray(matrix))
        assert back.keys() == {path for _, path in layer.paths}
        for path, leaf in back.items():
            np.testing.assert_array_equal(leaf, leaves[path])


def test_half_precision_activations():
    """bfloat16 compute over float32 parameters: same gradients, float32 statistics that are sums in float32."""
    layers = [nn.Dense(4, dtype=jnp.bfloat16), nn.tanh, nn.Dense(3, dtype=jnp.bfloat16)]
    loss_fn, params, args = linen(nn.Sequential(layers), jnp.float32, *batch(jnp.float32))
    found = kfe.find_layers(loss_fn, params, *args)
    value, grads, taps = kfe.value_grad_and_taps(loss_fn, found, fisher="empirical")(params, *args)
    expected, expected_grads = jax.jit(jax.value_and_grad(loss_fn))(params, *args)
    # The same bfloat16 program fused in another way: a rounding unit, not the float32 tolerance.
    assert_close(value, expected, 2**-8)
    assert_close(grads, expected_grads, 2**-8)
    for layer in found.values():
        a, g = layer.rows(taps[layer.name])
        assert a.dtype == g.dtype == jnp.float32
        rows = np.asarray(a, np.float64)[:, 0]
        covariance = taps[layer.name].covariances()[0]
        assert covariance.dtype == jnp.float32
        assert relative_error(covariance, rows.T @ rows / BATCH) < 1e-6
