"""`kfe.losses` are their Optax namesakes, or densities: values, gradients and errors, with and without taps."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from .dense import assert_close

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(4, 2, 3))
SOFT = GENERATOR.uniform(0.1, 1, (4, 2, 3))
WHERE = GENERATOR.uniform(size=(4, 2, 3)) > 0.3
WHERE[..., 0] = True
LABELS = np.zeros((4, 2), int)

CALLS = {
    "softmax_cross_entropy": (SOFT, {}),
    "softmax_cross_entropy axis": (SOFT, {"axis": 1}),
    "softmax_cross_entropy axes": (SOFT, {"axis": (1, 2)}),
    "softmax_cross_entropy where": (SOFT, {"where": WHERE}),
    "softmax_cross_entropy_with_integer_labels": (LABELS, {}),
    "softmax_cross_entropy_with_integer_labels axis": (np.ones((4, 3), int), {"axis": 1}),
    "softmax_cross_entropy_with_integer_labels where": (LABELS, {"where": WHERE}),
    "sigmoid_binary_cross_entropy": (SOFT, {}),
    "sigmoid_binary_cross_entropy scalar": (np.float64(1.0), {}),
    "squared_error": (SOFT, {}),
    "squared_error none": (None, {}),
    "l2_loss": (SOFT, {}),
    "l2_loss none": (None, {}),
    "poisson_nll_loss": (SOFT, {}),
    "poisson_nll_loss whole": (np.arange(24).reshape(4, 2, 3), {}),
    "gaussian_nll_loss": (SOFT, {"log_variances": LOGITS[::-1]}),
    "gaussian_nll_loss shared": (SOFT, {"log_variances": LOGITS[0, 0]}),
}


class Plain:
    """The losses that Optax has not, as formulas."""

    @staticmethod
    def poisson_nll_loss(z, y):
        return jnp.exp(z) - y * z + jax.scipy.special.gammaln(y + 1.0)

    @staticmethod
    def gaussian_nll_loss(z, y, *, log_variances):
        return -jax.scipy.stats.norm.logpdf(y, z, jnp.exp(jnp.asarray(log_variances) / 2))


@pytest.mark.parametrize("name", kfe.losses.__all__)
def test_signatures(name):
    if hasattr(optax.losses, name):
        ours = inspect.signature(getattr(kfe.losses, name)).parameters
        theirs = inspect.signature(getattr(optax.losses, name)).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("call", CALLS)
def test_equal_outside_and_inside(call, x64):
    """Value and gradients with respect to logits and floating labels, without taps and in the tagged pass."""
    name = call.split()[0]
    labels, options = CALLS[call]
    labels = None if labels is None else jnp.asarray(labels)
    differentiable = labels is not None and jnp.issubdtype(labels.dtype, jnp.floating)
    # Every element has its own weight in the loss, so that no two cotangents are alike.
    probe = np.random.default_rng(1).normal(size=64)

    def loss_through(module):
        def loss_fn(params, labels):
            z = kfe.tag_dense(params["x"], params["x"] @ params["kernel"], params)
            if differentiable:
                labels = params["labels"]
            values = getattr(module, name)(z, labels, **options)
            return (values.ravel() * probe[: values.size]).sum(), values

        return loss_fn

    params = {"x": jnp.asarray(LOGITS), "kernel": jnp.eye(3) + 0.1}
    if differentiable:
        params["labels"] = labels
    plain = optax.losses if hasattr(optax.losses, name) else Plain
    expected = jax.jit(jax.value_and_grad(loss_through(plain), has_aux=True))(params, labels)
    outside = jax.jit(jax.value_and_grad(loss_through(kfe.losses), has_aux=True))(params, labels)
    layers = kfe.find_layers(loss_through(kfe.losses), params, labels, has_aux=True)
    tagged = kfe.value_grad_and_taps(loss_through(kfe.losses), layers, has_aux=True, fisher="empirical")
    value, grads, _ = tagged(params, labels)
    # Optax's own gradient with respect to an excluded label is NaN; ours is NaN in the same places.
    undefined = jax.tree.map(np.isnan, expected)
    for actual, tolerance in ((outside, 1e-14), ((value, grads), 1e-12)):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.isnan, actual), undefined)
        assert_close(jax.tree.map(np.nan_to_num, actual), jax.tree.map(np.nan_to_num, expected), tolerance)


@pytest.mark.parametrize("distribution", [kfe.Categorical(), kfe.Bernoulli(), kfe.Gaussian(2.0)])
def test_registered_output_is_the_identity(distribution, x64):
    z = jnp.asarray(LOGITS)
    np.testing.assert_array_equal(kfe.register_output(z, distribution), z)

    def loss_fn(params, x):
        out = kfe.register_output(kfe.tag_dense(x, x @ params["kernel"], params), distribution)
        return jnp.sin(out).mean()

    params = {"kernel": jnp.eye(3) + 0.1}
    layers = kfe.find_layers(loss_fn, params, z)
    value, grads, _ = kfe.value_grad_and_taps(loss_fn, layers)(params, z, key=jax.random.key(0))
    assert_close((value, grads), jax.jit(jax.value_and_grad(loss_fn))(params, z), 1e-12)


def test_optax_errors_come_through():
    """Optax's own checks of shapes and dtypes hold inside the tagged pass too."""
    params = {"kernel": jnp.eye(3)}

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.squared_error(z, jnp.zeros((4, 2))).mean()

    with pytest.raises(ValueError, match=r"(?i)shape"):
        kfe.find_layers(loss_fn, params, jnp.ones((4, 3)))


def test_shapes_that_would_broadcast_to_pairs():
    """Targets (n,) beside outputs (n, 1), whether or not anybody listens."""
    z, y = jnp.zeros((4, 1)), jnp.zeros(4)
    nll = kfe.losses.gaussian_nll_loss
    refused = {
        r"poisson_nll_loss takes a target for each output: targets of shape \(4,\)": (
            lambda z: kfe.losses.poisson_nll_loss(z, y)
        ),
        r"gaussian_nll_loss takes a target for each output": lambda z: nll(z, y, log_variances=z),
        r"a log variance for each mean: those of shape \(4, 3\) do not broadcast to \(4, 1\)": (
            lambda z: nll(z, z, log_variances=jnp.zeros((4, 3)))
        ),
    }
    for sentence, loss in refused.items():
        with pytest.raises(ValueError, match=sentence):
            loss(z)
        with pytest.raises(ValueError, match=sentence):
            kfe.find_layers(lambda w, loss=loss: loss(z @ w).mean(), jnp.ones((1, 1)))
