"""`loss_scale=` undoes the factor by which a loss is multiplied against underflow: the curvature is that of the loss itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from .dense import assert_close
from .methods import quick
from .problems import plain_forward

N, D, C = 6, 3, 2
SCALE = 4096.0


def problem(dtype=jnp.float64):
    generator = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape), dtype)
    params = [{"kernel": normal(D, 4), "bias": normal(4)}, {"kernel": normal(4, C), "bias": normal(C)}]
    return params, normal(N, D), jnp.asarray(generator.integers(0, C, N))


def loss_fn(params, x, y, scale):
    """Two registered losses, of which one says its weights itself."""
    z = plain_forward(params, x)
    own = kfe.register_output(z, kfe.Gaussian())
    loss = kfe.losses.softmax_cross_entropy_with_integer_labels(z, y).mean() + (0.5 * own**2).sum(-1).mean()
    return loss * scale


def of_twice(params, x, y, scale):
    """A layer whose statistics are sums."""
    hidden = jnp.tanh(plain_forward(params[:1], plain_forward(params[:1], x)[:, :D]))
    return kfe.losses.l2_loss(plain_forward(params[1:], hidden)).sum() * scale


def statistics(taps):
    return {
        name: (taps[name].covariances(), taps[name].second_moment_in(None, None)) for name in taps.layers
    }, taps.gradient_weight


@functools.partial(jax.jit, static_argnums=(0, 1))
def collected(loss_fn, options, params, x, y, scale, loss_scale):
    options = dict(options)
    layers = kfe.find_layers(loss_fn, params, x, y, scale)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, batch_arguments=(1, 2), **options)
    _, _, taps = differentiate(params, x, y, scale, key=jax.random.key(0), loss_scale=loss_scale)
    found = statistics(taps)
    if options.get("quadratic_model"):
        moved = jax.tree.map(lambda p: 1.1 * p, params)
        found += (taps.loss, taps.loss_at(moved), taps.tangent(params))
    return found


CASES = {
    "sampled": (loss_fn, {"fisher": "sampled"}),
    "empirical": (loss_fn, {"fisher": "empirical"}),
    "quadratic model": (loss_fn, {"fisher": "exact", "quadratic_model": True}),
    "microbatches": (loss_fn, {"fisher": "sampled", "microbatches": 2, "quadratic_model": True}),
    "sums": (of_twice, {"fisher": "exact"}),
    "sums, empirical": (of_twice, {"fisher": "empirical"}),
}


@pytest.mark.parametrize(
    "name",
    quick("sampled", "empirical", "microbatches", "sums, empirical", of=CASES),
)
def test_statistics_are_those_of_the_loss_itself(name, x64):
    function, options = CASES[name]
    options = tuple(options.items())
    data = problem()
    one = jnp.asarray(1.0)
    expected = collected(function, options, *data, one, None)
    found = collected(function, options, *data, SCALE * one, SCALE * one)
    # The scale itself is float32.
    assert_close(found, expected, 1e-6)


def test_a_step_in_half_precision():
    """A float16 model whose unscaled gradients would vanish; the update is that of float32."""

    def tiny(params, x, y, scale):
        losses = kfe.losses.softmax_cross_entropy_with_integer_labels(plain_forward(params, x), y)
        return losses.astype(jnp.float32).mean() * 1e-6 * scale

    def step(dtype, scale, loss_scale):
        params, x, y = problem(dtype)
        layers = kfe.find_layers(tiny, params, x, y, scale)
        tx = kfe.scale_by_kfac(layers, 1e-9)

        @jax.jit
        def run(params, scale):
            differentiate = kfe.value_grad_and_taps(tiny, layers, fisher="exact")
            _, grads, taps = differentiate(params, x, y, scale, loss_scale=scale if loss_scale else None)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
            return tx.update(grads, tx.init(grads), taps=taps)[0]

        return run(params, jnp.float32(scale))

    expected = step(jnp.float32, 1, False)
    assert_close(step(jnp.float16, 2.0**20, True), expected, 0.05)
    norm = lambda tree: np.linalg.norm(np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)]))
    assert norm(step(jnp.float32, SCALE, False)) < 0.01 * norm(expected)


def test_a_scale_that_is_none():
    params, x, y = problem(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, x, y, 1.0)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")
    for bad in (0, -1.0, float("nan"), jnp.ones(2), np.float32(0)):
        with pytest.raises(ValueError, match="loss_scale must be a positive number"):
            differentiate(params, x, y, jnp.ones(()), loss_scale=bad)
