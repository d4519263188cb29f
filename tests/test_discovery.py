"""What discovery must not mistake for a layer, and whose batch a vmapped loss has."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from .dense import assert_close

pytestmark = pytest.mark.release

cross_entropy = kfe.losses.softmax_cross_entropy_with_integer_labels


def batch():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(4, 3)), jnp.float32)
    return x, jnp.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (jnp.sin, "changed before the layer uses it (sin)"),
        (jnp.ones_like, "the loss does not use it"),
    ],
)
def test_a_kernel_that_was_replaced_is_no_layer(change, reason):
    def loss_fn(params, x, labels):
        changed = {**params["layer"], "kernel": change(params["layer"]["kernel"])}
        z = kfe.tag_dense(x, x @ changed["kernel"], changed)
        last = kfe.tag_dense(z, z @ params["last"]["kernel"], params["last"])
        return cross_entropy(last, labels).mean()

    params = {"layer": {"kernel": jnp.ones((3, 2))}, "last": {"kernel": jnp.ones((2, 2))}}
    layers = kfe.find_layers(loss_fn, params, *batch())
    assert list(layers) == ["last"]
    assert layers.rest == (("layer", "kernel"),)
    assert layers.reasons == (reason,)


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, pytest.param(nn.SpectralNorm, marks=pytest.mark.slow)])
def test_weight_normalization_sends_a_layer_to_rest(wrapper):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
            return nn.Dense(2)(wrapper(nn.Dense(4))(x, **options))

    model, (x, labels) = Model(), batch()
    variables = dict(jax.jit(model.init)(jax.random.key(0), x))
    params = variables.pop("params")

    def loss_fn(params, x, labels):
        return cross_entropy(model.apply({"params": params, **variables}, x), labels).mean()

    layers = kfe.find_layers(loss_fn, params, x, labels)
    kernel = next(layer for layer in layers.values() if layer.kind.name == "dense")
    assert kernel.kernel_shape == (4, 2)
    reasons = {path[-1]: reason for path, reason in zip(layers.rest, layers.reasons, strict=True)}
    assert "dot_general at test_discovery.py" in reasons["kernel"]
    loss, grads, _ = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(1))
    expected = jax.jit(jax.value_and_grad(loss_fn))(params, x, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (loss, grads), expected)


def ensemble(params, x, labels):
    def member(params):
        return cross_entropy(kfe.tag_dense(x, x @ params["kernel"], params), labels).mean()

    return jax.vmap(member)(params).sum()


def test_an_ensemble_under_vmap_keeps_its_batch(x64):
    """Two members, four examples: the batch is four, for rows and for the exact Fisher of each member."""
    x, labels = batch()
    x = x.astype(jnp.float64)
    kernels = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2)))
    layers = kfe.find_layers(ensemble, {"kernel": kernels}, x, labels)
    differentiate = kfe.value_grad_and_taps(ensemble, layers, fisher="empirical")
    _, _, taps = differentiate({"kernel": kernels}, x, labels)
    a, g = layers["kernel"].rows(taps["kernel"])
    assert (a.shape, g.shape) == ((2, 4, 1, 3), (2, 4, 1, 2))
    examples = jax.jit(jax.vmap(jax.grad(ensemble), (None, 0, 0)))(
        {"kernel": kernels}, x[:, None], labels[:, None]
    )
    assert_close(np.einsum("mnta,mntb->nmab", a, g), examples["kernel"], 1e-12)

    _, _, taps = kfe.value_grad_and_taps(ensemble, layers, fisher="exact")({"kernel": kernels}, x, labels)
    p = np.exp(np.einsum("nd,mdc->mnc", x, kernels))
    p /= p.sum(-1, keepdims=True)
    hessian = np.einsum("mnc,cd->mncd", p, np.eye(2)) - np.einsum("mnc,mnd->mncd", p, p)
    assert_close(taps["kernel"].covariances()[1], hessian.mean(1), 1e-12)
    moment = np.einsum("na,mncc->mac", np.asarray(x) ** 2, hessian) / 4
    assert_close(taps["kernel"].second_moment_in(None, None), moment, 1e-12)


def test_exact_refuses_heads_under_vmap():
    """One column would pull both heads of an example at once."""
    x, labels = batch()

    def loss_fn(params, x, labels):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return jax.vmap(cross_entropy, in_axes=(1, None))(jnp.stack([z, 2 * z], 1), labels).mean()

    params = {"kernel": jnp.ones((3, 2))}
    layers = kfe.find_layers(loss_fn, params, x, labels)
    with pytest.raises(ValueError, match="neither the batch nor an ensemble's members"):
        kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, labels)


@pytest.mark.parametrize("change", ["frozen", "scaled", "replaced"])
def test_a_bias_that_is_not_the_parameter_itself(change):
    """The layer is its kernel alone: preconditioning mixes rows, and would move a bias that the gradient leaves alone."""
    model, (x, labels) = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)]), batch()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    changes = {"frozen": jax.lax.stop_gradient, "scaled": lambda b: 2 * b, "replaced": jnp.zeros_like}

    def loss_fn(params, x, labels):
        first = {**params["layers_0"], "bias": changes[change](params["layers_0"]["bias"])}
        return cross_entropy(model.apply({"params": {**params, "layers_0": first}}, x), labels).mean()

    layers = kfe.find_layers(loss_fn, params, x, labels)
    assert [layer.shape for layer in layers.values()] == [(3, 4), (5, 3)]
    expected = {
        "frozen": "frozen by stop_gradient",
        "scaled": "changed before the layer uses it (times 2)",
        "replaced": "the loss does not use it",
    }
    assert dict(zip(layers.rest, layers.reasons, strict=True)) == {("layers_0", "bias"): expected[change]}
