"""A kernel that is used with its input and output exchanged as well: reverse mode inside the loss, tied weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.experimental import jet

import kfe_optax as kfe

from .dense import assert_close
from .methods import quick

N, D, H = 6, 3, 4


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2)


def problem():
    """Float64, as the caller has turned on: parameters and a batch."""
    params = {
        "in": {"w": matrix(1, D, H), "b": matrix(2, H)},
        "mid": matrix(3, H, H),
        "out": {"w": matrix(4, H, 1), "b": matrix(5, 1)},
    }
    return params, matrix(6, N, D)


def network(params, x):
    h = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    return jnp.tanh(h @ params["mid"]) @ params["out"]["w"] + params["out"]["b"]


def kernels_first(params, x):
    """The same, features in front of the examples."""
    h = jnp.tanh(params["in"]["w"].T @ x.T + params["in"]["b"][:, None])
    return (params["out"]["w"].T @ jnp.tanh(params["mid"].T @ h) + params["out"]["b"][:, None]).T


def on_one(apply, params):
    return lambda x: apply(params, x[None])[0, 0]


def penalty(params, x):
    slope = jax.grad(lambda x: network(params, x).sum())(x)
    return (slope**2).sum(-1, keepdims=True)


def along(params, x):
    """A Hessian–vector product."""
    return jax.jvp(jax.grad(lambda x: network(params, x).sum()), (x,), (jnp.cos(x),))[1].sum(
        -1, keepdims=True
    )


def both_layouts(params, x):
    slope = jax.grad(lambda x: kernels_first(params, x).sum())(x)
    return network(params, x) + slope.sum(-1, keepdims=True)


def in_a_series(params, x):
    _, (_, second) = jet.jet(lambda x: network(params, x), (x,), ((jnp.ones_like(x), jnp.zeros_like(x)),))
    return second


def tied(params, x):
    """An autoencoder whose decoder has the encoder's kernels."""
    h = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    h = jnp.tanh(jnp.tanh(h @ params["mid"]) @ params["mid"].T)
    return (h @ params["in"]["w"].T).sum(-1, keepdims=True) + (h @ params["out"]["w"] + params["out"]["b"])


CASES = {
    "a gradient penalty": penalty,
    "a Hessian-vector product": along,
    "kernels in two layouts": both_layouts,
    "a Laplacian by jax.hessian, one example at a time": lambda p, x: jax.vmap(
        lambda x: jnp.trace(jax.hessian(on_one(network, p))(x))
    )(x)[:, None],
    "a Laplacian by jvp of grad": lambda p, x: sum(
        jax.jvp(jax.grad(lambda x: network(p, x).sum()), (x,), (jnp.broadcast_to(e, x.shape),))[1][
            :, i : i + 1
        ]
        for i, e in enumerate(jnp.eye(D, dtype=x.dtype))
    ),
    "a Laplacian by jet": in_a_series,
    "tied weights": tied,
}


@pytest.mark.release
@pytest.mark.parametrize("case", quick(*(CASES.keys() - {"a Laplacian by jvp of grad"}), of=CASES))
def test_gradients_and_the_law_of_rows(case, x64):
    """All kernels are layers; Σ_t ā gᵀ over both kinds of uses is the gradient of each example."""
    apply, (params, x) = CASES[case], problem()

    def loss_fn(params, x):
        fitted = kfe.losses.squared_error(network(params, x)).mean()
        return kfe.losses.squared_error(apply(params, x)).mean() + fitted

    layers = kfe.find_layers(loss_fn, params, x)
    assert {name: layer.shape for name, layer in layers.items()} == {
        "in": (D + 1, H),
        "mid": (H, H),
        "out": (H + 1, 1),
    }
    collect = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    loss, grads, taps = jax.jit(collect)(params, x)
    assert_close((loss, grads), jax.jit(jax.value_and_grad(loss_fn))(params, x), 1e-10)
    known = {name for name, layer in layers.items() if layer.per_example}
    # A derivative that is the same for all examples is a row of its own.
    assert known == ({"mid"} if "one example at a time" in case else set(layers))

    @jax.jit
    def expected(params, x):
        single = jax.vmap(lambda x: jax.grad(loss_fn)(params, x[None]))(x)
        return {name: jax.vmap(layers[name].to_matrix)(single) for name in known}

    found = jax.jit(lambda taps: {name: taps[name].example_gradients() for name in known})(taps)
    assert_close(found, expected(params, x), 1e-10)


def by_hand(params, x, added):
    """(the slope's square, rows) of `penalty` for one hidden layer: `added` is on each product of a kernel."""
    w, b, v = params["w"], params["b"], params["v"]
    z = x @ w + b + added["z"]
    h, slope = jnp.tanh(z), 1 - jnp.tanh(z) ** 2
    back = slope * (jnp.ones((N, 1)) @ v.T + added["back"])
    value = h @ v + added["value"]
    return (back @ w.T + added["slope"], value), (back, x, h)


def test_factors_of_both_kinds_of_uses(x64):
    """A and G of y = x W, and of u = v Wᵀ with ∂L/∂u in the place of ā, in one product that keeps the trace."""
    params = {"w": matrix(1, D, H), "b": matrix(2, H), "v": matrix(3, H, 1)}
    x = matrix(6, N, D)

    def loss_fn(params, x):
        apply = lambda x: jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]
        slope = jax.grad(lambda x: apply(x).sum())(x)
        return kfe.losses.squared_error(slope).sum(-1).mean() + kfe.losses.squared_error(apply(x)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert list(layers) == ["0", "v"] or len(layers) == 2
    (own,) = (name for name, layer in layers.items() if layer.shape == (D + 1, H))

    @jax.jit
    def found(params, x):
        taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)[2]
        return kfe.factors.estimate(kfe.factors.kfac(), taps)[own]

    @jax.jit
    def expected(params, x):
        added = {"z": jnp.zeros((N, H)), "back": jnp.zeros((N, H)), "value": jnp.zeros((N, 1))}
        added["slope"] = jnp.zeros((N, D))
        jacobians = jax.jacobian(lambda added: by_hand(params, x, added)[0])(added)
        _, (back, _, _) = by_hand(params, x, added)

        def columns(name):
            """√2 ∂(each output)/∂(the product), (outputs of an example, N, d).

            −log p of each output has the second derivative 2.
            """
            first, second = (jnp.einsum("n...nd->...nd", part[name]) for part in jacobians)
            return jnp.sqrt(2) * jnp.concatenate([first, second])

        inputs = jnp.concatenate([x, jnp.ones((N, 1))], 1)
        plain = inputs.T @ inputs / N, jnp.einsum("cnd,cne->de", columns("z"), columns("z")) / N
        turned = jnp.pad(columns("slope"), ((0, 0), (0, 0), (0, 1)))
        turned = jnp.einsum("cnd,cne->de", turned, turned) / N, back.T @ back / N
        pairs = [plain, turned]
        sigma = sum(jnp.trace(a) * jnp.trace(g) for a, g in pairs)
        return sum(jnp.trace(g) * a for a, g in pairs) / sigma, sum(jnp.trace(a) * g for a, g in pairs)

    ((a, g),) = found(params, x)
    assert_close((a, g), expected(params, x), 1e-10)


@pytest.mark.release
def test_what_other_uses_know_nothing_of(x64):
    params, x = {"w": matrix(1, D, 2, 2), "v": matrix(2, 2, 2, 1)}, matrix(6, N, D)

    def loss_fn(params, x):
        h = jnp.tanh(jnp.einsum("nd,dij->nij", x, params["w"]))
        back = jnp.einsum("nij,dij->nd", h, params["w"])
        return kfe.losses.squared_error(back).mean() + kfe.losses.squared_error(h.sum((1, 2))).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert layers["w"].shape == (D, 4)
    with pytest.raises(ValueError, match="exchanged, of which approximation='heads'"):
        layers.configure("w", approximation="heads")
    with pytest.raises(ValueError, match="exchanged have no common mean"):
        layers.configure("w", sharing="reduce")


class Potential(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))[..., 0]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "spectral_kfac"])
def test_a_force_is_fitted(method):
    """A network whose gradient is fitted, as those of interatomic potentials are: Flax modules, reverse mode in the loss."""
    model, x = Potential(), jnp.asarray(matrix(0, 16, D), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    forces = -2 * x

    def loss_fn(params, x, forces):
        energy = lambda x: model.apply({"params": params}, x).sum()
        return kfe.losses.squared_error(-jax.grad(energy)(x), forces).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x, forces)
    assert set(layers) == {"Dense_0", "Dense_1"}
    tx = getattr(kfe, method)(0.03, layers)
    state, losses = jax.jit(tx.init)(params), []
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)

    @jax.jit
    def step(params, state, key):
        loss, grads, taps = differentiate(params, x, forces, key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    for i in range(30):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
