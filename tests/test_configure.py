"""`Layers.configure`, `Layers.without` and `row_mask` as a user meets them: what they change, and what they say to mis-use."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from .models import cross_entropy, parameter_shapes, randomized


class Model(nn.Module):
    """A convolution, a norm, a depthwise convolution, an attention and a pooled head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.tanh(nn.GroupNorm(2, name="norm")(x))
        x = nn.Conv(4, (2, 2), feature_group_count=4, name="depthwise")(x)
        x = x.reshape(len(x), -1, 4)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(3, name="head")(x.mean(1))


@pytest.fixture(scope="module")
def problem():
    model = Model()
    x, labels = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 2)), jnp.float32),
        jnp.array([0, 2]),
    )
    params = randomized(parameter_shapes(model, x), jnp.float32)

    def loss_fn(params, x, labels):
        return cross_entropy(model.apply({"params": params}, x), labels)

    return loss_fn, params, (x, labels), kfe.find_layers(loss_fn, params, x, labels)


def test_configured_layers_are_other_layers(problem):
    """The approximation is part of the layer's identity and shows in the table; the batch's taps are those of the new layers."""
    loss_fn, params, args, layers = problem
    new = layers.configure("conv", approximation="groups", num_groups=2).configure(
        "attention/*", approximation="heads"
    )
    assert new != layers
    assert hash(new) != hash(layers)
    assert layers["conv"].shape == (19, 4)
    assert new["conv"].shape == (2, 2, 10, 2)
    assert new["attention/query"].shape == (1, 2, 5, 2)
    assert new["attention/out"].shape == (2, 1, 3, 4)
    assert "conv (groups)" in str(new)
    _, _, taps = kfe.value_grad_and_taps(loss_fn, new)(params, *args, key=jax.random.key(0))
    assert taps.layers == new
    assert taps["conv"].covariances()[0].shape == (2, 1, 10, 10)
    assert new.configure("*", approximation="joint").configure("conv", approximation="kfc") == layers


def test_an_approximation_for_all_is_for_those_that_have_it(problem):
    layers = problem[-1]
    new = layers.configure(approximation="diagonal", sharing="reduce")
    assert new["norm"].kind.approximation == "diagonal"
    assert new["conv"].kind == layers["conv"].kind
    assert {layer.sharing for name, layer in new.items() if name != "norm"} == {"reduce"}
    assert new["norm"].sharing == "expand"  # a norm has one row an example


def test_taps_of_unconfigured_layers_are_refused(problem):
    loss_fn, params, args, layers = problem
    tx = kfe.scale_by_kfac(layers.configure("conv", approximation="sua_uncentered"), damping=0.1)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, *args, key=jax.random.key(0))
    with pytest.raises(ValueError, match="sua_uncentered"):
        tx.update(grads, tx.init(params), params, taps=taps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "cnov", "approximation": "sua"}, "No layer's name matches 'cnov'"),
        ({"approximation": "kfra"}, "None of the layers"),
        ({"pattern": "head", "approximation": "sua"}, "None of the layers"),
        ({"pattern": "head", "approximation": "heads"}, "axis of heads"),
        ({"pattern": "depthwise", "approximation": "sua"}, "feature groups"),
        ({"pattern": "conv", "approximation": "groups"}, "num_groups"),
        ({"pattern": "conv", "approximation": "groups", "num_groups": 3}, "does not divide"),
        ({"pattern": "conv", "approximation": "sua", "num_groups": 2}, "belong together"),
        ({"pattern": "norm", "approximation": "full", "num_groups": 2}, "without num_groups"),
        ({"sharing": "mean"}, "'expand' or 'reduce'"),
        ({"sharing": "reduce", "num_groups": 2}, "belong to an approximation"),
        ({"pattern": "conv", "approximation": "sua", "sharing": "reduce"}, "single positions"),
    ],
)
def test_misuse_of_configure(problem, options, message):
    with pytest.raises(ValueError, match=message):
        problem[-1].configure(**options)


@pytest.mark.parametrize("method", ["tkfac", "kpsvd", "lanczos"])
def test_only_kfac_shares_factors(problem, method):
    layers = problem[-1].configure("conv", approximation="sua_uncentered")
    with pytest.raises(ValueError, match="use kfe.factors.kfac"):
        getattr(kfe, method)(0.1, layers).init(problem[1])


def test_without(problem):
    """Layers left out go through `rest`, with a reason, and the taps are those of the others."""
    loss_fn, params, args, layers = problem
    fewer = layers.without("attention/*").without("norm")
    assert list(fewer) == ["conv", "depthwise", "head"]
    assert set(fewer.rest) == {path for name in layers if name not in fewer for _, path in layers[name].paths}
    assert "left out by Layers.without" in str(fewer)
    assert f"{layers['norm'].size // 2:,}" in str(fewer)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, fewer)(params, *args, key=jax.random.key(0))
    assert taps.layers == fewer
    tx = kfe.scale_by_kfac(fewer, damping=0.1)
    updates = jax.jit(lambda v, taps: tx.update(v, tx.init(params), params, taps=taps)[0])(grads, taps)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates["norm"]))
    with pytest.raises(ValueError, match="No layer's name matches"):
        fewer.without("norm")


def test_a_mask_of_another_shape_is_refused(problem):
    loss_fn, params, args, layers = problem
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)
    with pytest.raises(ValueError, match="row_mask has shape"):
        differentiate(params, *args, key=jax.random.key(0), row_mask=jnp.ones((2, 5), bool))


@pytest.mark.slow
def test_a_mask_of_examples_counts_for_all_layers(problem):
    """The statistics under the mask of one example are those of that example, times its share of the batch."""
    loss_fn, params, args, layers = problem
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")
    _, _, masked = differentiate(params, *args, row_mask=jnp.array([True, False]))
    _, _, alone = differentiate(params, *(v[:1] for v in args))
    names = [name for name, layer in layers.items() if not layer.kind.per_example]
    assert names
    factors = jax.jit(
        lambda taps: taps.pulled().reduce(
            lambda s: {name: (s[name].input_factor(), s[name].output_factor()) for name in names}
        )
    )
    masked, alone = factors(masked), factors(alone)
    for name in names:
        (a, g), (b, h) = masked[name], alone[name]
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        # A mean over two examples: half the loss, and half the Fisher matrix.
        np.testing.assert_allclose(g, h / 2, rtol=1e-3, atol=1e-6)
