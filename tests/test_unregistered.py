"""What is not known is no curvature: terms of the loss that no registered loss stands for add nothing to the Fisher."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import several_devices
from .dense import assert_close
from .methods import quick

N, D, H, C = 8, 3, 4, 3
cross_entropy = kfe.losses.softmax_cross_entropy_with_integer_labels


def batch():
    generator = np.random.default_rng(0)
    return jnp.asarray(generator.normal(size=(N, D))), jnp.asarray(generator.integers(0, C, N))


def parameters():
    generator = np.random.default_rng(1)
    normal = lambda *shape: {"kernel": jnp.asarray(generator.normal(size=shape))}
    return {"trunk": normal(D, H), "head": normal(H, C), "side": normal(H, 2)}


def dense(params, name, x):
    return kfe.tag_dense(x, x @ params[name]["kernel"], params[name])


@jax.custom_vjp
def clipped(x):
    """Its derivative is no function of what it computes."""
    return (x > 0).astype(x.dtype)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (jnp.clip(g, -1, 1),))

# (params, hidden, logits, labels) → a term of the loss that says nothing about its distribution.
TERMS = {
    "another head": lambda p, h, z, y: optax.l2_loss(dense(p, "side", h), 3 * jnp.ones((len(y), 2))).mean(),
    "the same outputs": lambda p, h, z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    "z-loss": lambda p, h, z, y: jnp.square(jax.nn.logsumexp(z, -1)).mean(),
    "activations": lambda p, h, z, y: jnp.abs(h).sum(),
    "KL of a VAE": lambda p, h, z, y: -0.5 * (1 + h - z.sum(-1, keepdims=True) ** 2 - jnp.exp(h)).mean(),
    "load of experts": lambda p, h, z, y: (
        jnp.square(jax.nn.softmax(dense(p, "side", h)).mean(0)).sum() * (z.argmax(-1) == y).mean()
    ),
    "straight through": lambda p, h, z, y: clipped(h).mean(),
    "a loop": lambda p, h, z, y: jax.lax.scan(lambda c, v: (c * 0.5 + jnp.sum(v**2), None), 0.0 * z[0, 0], h)[
        0
    ],
    "a target": lambda p, h, z, y: kfe.losses.l2_loss(jnp.zeros((len(y), 2)), dense(p, "side", h)).mean(),
}


def everything(*given):
    return sum(term(*given) for term in TERMS.values())


def network(params, x, wrap=lambda f: f):
    hidden = jnp.tanh(dense(params, "trunk", x))
    return hidden, wrap(lambda params, hidden: dense(params, "head", hidden))(params, hidden)


def loss_with(term, registered=lambda z, y: cross_entropy(z, y).mean(), wrap=lambda f: f):
    def loss_fn(params, x, y):
        hidden, z = network(params, x, wrap)
        loss = registered(z, y)
        return loss if term is None else loss + 100 * term(params, hidden, z, y)

    return loss_fn


def statistics(loss_fn, fisher="exact", **options):
    params, (x, y) = parameters(), batch()
    layers = kfe.find_layers(loss_fn, params, x, y)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher, **options)

    @jax.jit
    def read(params, x, y):
        taps = differentiate(params, x, y, key=jax.random.key(0))[2]
        return taps["trunk"].covariances(), taps["head"].second_moment_in(None, None)

    return layers, read(params, x, y)


@functools.cache
def alone():
    return statistics(loss_with(None))[1]


# Dear, and of the kinds of others.
SLOW = ("activations", "a loop", "register_output")
NIGHTLY = ("the same outputs", "remat", "quadratic model")


def each(cases):
    named = [name for name in cases if name not in (*SLOW, *NIGHTLY)]
    return quick(*named, slow=[name for name in SLOW if name in cases], of=cases)


@pytest.mark.parametrize("name", each(TERMS))
def test_no_term_adds_to_the_exact_fisher(name, x64):
    layers, found = statistics(loss_with(TERMS[name]))
    assert_close(found, alone(), 1e-12)
    # A registered loss lets nothing through to its targets.
    assert layers.unregistered == (name != "a target")
    assert layers.rest == (("side", "kernel"),)


WAYS = {
    "sampled": ({}, {}),
    "microbatches": ({}, {"microbatches": 2}),
    "remat": ({"wrap": jax.checkpoint}, {}),
    "vmapped loss": ({"registered": lambda z, y: jax.vmap(cross_entropy)(z, y).mean()}, {}),
    "loss in a loop": (
        {"registered": lambda z, y: jax.lax.map(lambda v: cross_entropy(*v), (z, y)).mean()},
        {},
    ),
    "register_output": (
        {"registered": lambda z, y: jnp.abs(kfe.register_output(z, kfe.Gaussian())).mean()},
        {"num_samples": 2},
    ),
    "quadratic model": ({}, {"quadratic_model": True}),
}


@pytest.mark.parametrize("way", each(WAYS))
def test_all_terms_together_add_nothing_to_the_same_draws(way, x64):
    made, options = WAYS[way]
    found, expected = (
        statistics(loss_with(term, **made), "sampled", **options)[1] for term in (everything, None)
    )
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=pytest.mark.nightly)])
def test_on_several_devices(mode, x64):
    """A whole step, whose gradient has all terms in it, with the factors of the registered loss."""
    params, data = parameters(), batch()
    term = TERMS["z-loss"]
    layers = kfe.find_layers(loss_with(term), params, *data)
    tx = kfe.scale_by_kfac(layers, 0.1)

    def make(loss_fn):
        return lambda axis_name: several_devices.train_step(loss_fn, layers, tx, axis_name)

    def factors(loss_fn):
        step = several_devices.divided(mode, 2, make(loss_fn))
        return step(params, tx.init(params), data, jax.random.key(0))[1].method.factors

    assert_close(factors(loss_with(term)), factors(loss_with(None)), 1e-12)


def test_products_with_the_fisher(x64):
    """The quadratic model is that of the registered loss, whatever else the loss reads."""
    params, data = parameters(), batch()
    vector = jax.tree.map(jnp.ones_like, params)

    def product(term):
        loss_fn = loss_with(term)
        layers = kfe.find_layers(loss_fn, params, *data)
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)

        @jax.jit
        def read(params, data, vector):
            taps = differentiate(params, *data)[2]
            return taps.fisher_products(taps.tangent(vector))

        return read(params, data, vector)

    assert_close(product(everything), product(None), 1e-12)


def test_the_empirical_fisher_is_that_of_the_whole_loss(x64):
    """Its rows are the gradient, every term of it."""
    params, (x, y) = parameters(), batch()
    loss_fn = loss_with(lambda p, h, z, y: jnp.square(jax.nn.logsumexp(z, -1)).mean())
    layers = kfe.find_layers(loss_fn, params, x, y)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x, y)
    assert_close(taps["trunk"].example_gradients().mean(0), grads["trunk"]["kernel"], 1e-12)


def test_what_no_registered_loss_depends_on_is_no_layer(x64):
    """Stopped, compared, or read by an unregistered term alone; without any registered loss all stay."""

    def head(term):
        params, data = parameters(), batch()
        layers = kfe.find_layers(loss_with(term), params, *data)
        return dict(zip(layers.rest, layers.reasons, strict=True)), layers

    dead = "the loss's derivative does not reach it"
    unknown = "no registered loss depends on it"
    for reason, term in (
        (unknown, TERMS["another head"]),
        (
            dead,
            lambda p, h, z, y: kfe.losses.l2_loss(
                z[:, :2], jax.lax.stop_gradient(dense(p, "side", h))
            ).mean(),
        ),
        (dead, lambda p, h, z, y: kfe.losses.l2_loss(z[:, :2] * (dense(p, "side", h) > 0)).mean()),
        (unknown, TERMS["a target"]),
    ):
        reasons, layers = head(term)
        assert reasons == {("side", "kernel"): reason}
        assert reason in str(layers)
    assert not head(lambda p, h, z, y: kfe.losses.l2_loss(dense(p, "side", h)).mean())[0]
    assert not head(lambda p, h, z, y: kfe.losses.l2_loss(clipped(dense(p, "side", h))).mean())[0]
    nothing = lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
    params, data = parameters(), batch()
    assert not kfe.find_layers(loss_with(TERMS["another head"], nothing), params, *data).rest


def test_a_penalty_on_the_parameters_is_no_such_term():
    """It reads no layer's output; nor does a registered loss that the scalar does not depend on count as registered."""
    params, data = parameters(), batch()

    def loss_fn(params, x, y):
        _, z = network(params, x)
        metric = kfe.losses.l2_loss(dense(params, "side", z[:, :1] @ jnp.ones((1, H)))).mean()
        return cross_entropy(z, y).mean() + optax.tree.norm(params, squared=True), metric

    layers = kfe.find_layers(loss_fn, params, *data, has_aux=True)
    assert not layers.unregistered
    assert [output.spec.name for output in layers.outputs] == [cross_entropy.__name__]


def test_half_precision_is_refused():
    """float16 has no room between the loss's weights and nothing; bfloat16 has, and `register_output` needs none."""
    params, (x, y) = parameters(), batch()

    def weighted(z, y):
        return cross_entropy(z, y).mean()

    def own(z, y):
        return jnp.abs(kfe.register_output(z, kfe.Gaussian())).mean()

    def shapes(dtype, fisher="sampled", loss=weighted):
        loss_fn = loss_with(TERMS["activations"], lambda z, y: loss(z.astype(dtype), y))
        layers = kfe.find_layers(loss_fn, params, x, y)
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher)
        return jax.eval_shape(lambda p: differentiate(p, x, y, key=jax.random.key(0))[:2], params)

    with pytest.raises(ValueError, match=r"compute the loss in float32, from outputs.astype"):
        shapes(jnp.float16)
    shapes(jnp.bfloat16)
    shapes(jnp.float16, "empirical")
    shapes(jnp.float16, loss=own)
