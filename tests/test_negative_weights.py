"""Minus a Fisher matrix is none: negative weights in the loss are refused, or counted, and a policy gradient needs none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from .dense import assert_close

N, D, C = 6, 3, 4
losses = kfe.losses


def batch():
    generator = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape))
    # Normalized, so that they are of either sign.
    advantages = normal(N)
    advantages = (advantages - advantages.mean()) / advantages.std()
    return {"kernel": normal(D, C)}, normal(N, D), jnp.asarray(generator.integers(0, C, N)), advantages


def loss_of(function):
    """`function(logits, labels, advantages)` of one dense layer's outputs."""
    return lambda params, x, y, w: function(kfe.tag_dense(x, x @ params["kernel"], params), y, w)


def statistics(function, fisher="exact", **options):
    params, *data = batch()
    layers = kfe.find_layers(loss_of(function), params, *data)
    differentiate = kfe.value_grad_and_taps(loss_of(function), layers, fisher=fisher, **options)
    _, grads, taps = differentiate(params, *data, key=jax.random.key(0))
    return layers, grads, taps


def cross_entropy(module):
    return module.losses.softmax_cross_entropy_with_integer_labels


# Losses of which it can be known while tracing.
SUBTRACTED = {
    "minus": lambda z, y, w: -cross_entropy(kfe)(z, y).mean(),
    "a difference": lambda z, y, w: cross_entropy(kfe)(z, y).mean() - 0.1 * losses.l2_loss(z).sum(-1).mean(),
    "a factor": lambda z, y, w: (cross_entropy(kfe)(z, y).reshape(2, -1) * -2.0).sum() / 4,
    "over a number": lambda z, y, w: jax.vmap(losses.squared_error)(z).sum() / -4,
    "in a loop": lambda z, y, w: 1 - jax.lax.map(lambda v: losses.l2_loss(v).sum(), z).mean(),
}


@pytest.mark.parametrize("name", SUBTRACTED)
def test_a_subtracted_loss_is_refused(name):
    params, *data = batch()
    loss_fn = loss_of(SUBTRACTED[name])
    layers = kfe.find_layers(loss_fn, params, *data)

    def shapes(fisher):
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher)
        return jax.eval_shape(lambda p: differentiate(p, *data, key=jax.random.key(0))[:2], params)

    with pytest.raises(ValueError, match="The loss subtracts .*with optax.losses, so that it adds nothing"):
        shapes("sampled")
    shapes("empirical")


def test_what_is_known_to_be_positive_is_not_counted():
    """Means and sums, of which devices then need exchange nothing."""

    def positive(function):
        params, *data = batch()
        return [o.positive for o in kfe.find_layers(loss_of(function), params, *data).outputs]

    assert positive(lambda z, y, w: 0.1 * cross_entropy(kfe)(z, y).mean() + losses.l2_loss(z).sum() / 3) == [
        True,
        True,
    ]
    assert positive(lambda z, y, w: kfe.register_output(z, kfe.Gaussian()).sum()) == [True]
    assert positive(lambda z, y, w: losses.policy_gradient_loss(z, y, w).mean()) == [True]
    for function, _ in HAPPENS.values():
        assert positive(function) == [False]


def test_what_is_not_known_while_tracing_is_not_refused():
    """Twice minus is plus, and so may be a number that is not known."""
    for function in (
        lambda z, y, w: 1 - (2 - cross_entropy(kfe)(z, y).mean()),
        lambda z, y, w: -(-3.0 * cross_entropy(kfe)(z, y)).mean(),
        lambda z, y, w: (cross_entropy(kfe)(z, y) * w).mean(),
        lambda z, y, w: (cross_entropy(kfe)(z, y) * jnp.where(w > 0, 2.0, 1.0)).mean(),
        lambda z, y, w: cross_entropy(kfe)(z, y).mean() * w[0],
    ):
        params, *data = batch()
        assert not any(o.subtracted for o in kfe.find_layers(loss_of(function), params, *data).outputs)


# Losses of which it happens, each with what remains of it.
HAPPENS = {
    "advantages": (
        lambda z, y, w: (cross_entropy(kfe)(z, y) * w).mean(),
        lambda z, y, w: (cross_entropy(kfe)(z, y) * jnp.maximum(w, 0)).mean(),
    ),
    "labels": (
        lambda z, y, w: losses.softmax_cross_entropy(z, jax.nn.one_hot(y, C) * w[:, None]).mean(),
        lambda z, y, w: losses.softmax_cross_entropy(
            z, jax.nn.one_hot(y, C) * jnp.maximum(w, 0)[:, None]
        ).mean(),
    ),
    "register_output": (
        lambda z, y, w: kfe.register_output(z, kfe.Gaussian(), weights=w).sum(),
        lambda z, y, w: kfe.register_output(z, kfe.Gaussian(), weights=jnp.maximum(w, 0)).sum(),
    ),
}


@pytest.mark.parametrize("name", HAPPENS)
def test_negative_weights_count_as_zero(name, x64):
    function, positive = HAPPENS[name]
    taps, expected = statistics(function)[2], statistics(positive)[2]
    assert_close(taps["kernel"].covariances(), expected["kernel"].covariances(), 1e-12)
    assert (bool(taps.negative_weights), bool(expected.negative_weights)) == (True, False)
    assert taps.gradient_weight >= 0


def test_negative_weights_are_counted():
    """On the steps on which they occur, through any nesting."""
    params, x, y, w = batch()
    loss_fn = loss_of(HAPPENS["advantages"][0])
    layers = kfe.find_layers(loss_fn, params, x, y, w)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)
    tx = optax.chain(kfe.scale_by_kfac(layers, 0.1), optax.scale(-1.0))

    @jax.jit
    def step(state, w):
        _, grads, taps = differentiate(params, x, y, w, key=jax.random.key(0))
        return tx.update(grads, state, taps=taps)[1]

    state = tx.init(params)
    for weights, count in ((w, 1), (jnp.abs(w), 1), (w, 2)):
        state = step(state, weights)
        assert int(kfe.info(state).negative_weights) == count


def test_microbatches_and_the_empirical_fisher(x64):
    """A weight is negative in any microbatch; the gradient's own targets have no weights."""
    function = HAPPENS["advantages"][0]
    assert bool(statistics(function, "sampled", microbatches=3)[2].negative_weights)
    assert not bool(statistics(function, "empirical")[2].negative_weights)


def test_policy_gradient(x64):
    """The gradient is that of the weighted loss, F that of the policy, whatever the advantages."""
    params, *data = batch()
    _, grads, taps = statistics(lambda z, y, w: losses.policy_gradient_loss(z, y, w).mean())
    reference = lambda z, y, w: (cross_entropy(optax)(z, y) * w).mean()
    assert_close(grads, jax.jit(jax.grad(loss_of(reference)))(params, *data), 1e-12)
    _, _, policy = statistics(lambda z, y, w: cross_entropy(kfe)(z, y).mean())
    assert_close(taps["kernel"].covariances(), policy["kernel"].covariances(), 1e-12)
    assert_close(taps.gradient_weight, jnp.asarray(N, jnp.float64), 1e-12)
    assert not bool(taps.negative_weights)


def test_policy_gradient_is_a_loss_like_any_other():
    """Outside a tagged pass it is plain; the advantages are constants; shapes that do not fit are refused."""
    params, x, y, w = batch()
    logits = x @ params["kernel"]
    outside = jax.jit(losses.policy_gradient_loss)(logits, y, w)
    assert_close(outside, jax.jit(lambda z: cross_entropy(optax)(z, y) * w)(logits), 1e-6)
    of_advantages = jax.jit(jax.grad(lambda w: losses.policy_gradient_loss(logits, y, w).sum()))(w)
    assert not np.any(of_advantages)
    with pytest.raises(ValueError, match="an action and an advantage for each event"):
        losses.policy_gradient_loss(logits, y, w[:, None])
