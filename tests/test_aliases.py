"""The aliases: their defaults have no scale, the rest is Adam's alone, and `kfe.NATURAL` is the natural gradient's own step."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfe_optax as kfe

from . import problems
from .dense import assert_close
from .methods import quick

STEPS = 3


class Net(nn.Module):
    """An embedding, a norm, two dense layers, and a parameter in no layer."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Dense(6, name="first")(nn.Embed(5, 4, name="embed")(tokens))
        x = nn.Dense(3, name="last")(nn.tanh(nn.LayerNorm(name="norm")(x)))
        return jnp.sin(self.param("angle", nn.initializers.ones, (3,))) * x


class NnxNet(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.embed, self.first = nnx.Embed(5, 4, rngs=rngs), nnx.Linear(4, 6, rngs=rngs)
        self.norm, self.last = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.angle = nnx.Param(jnp.ones(3))

    def __call__(self, tokens):
        return jnp.sin(self.angle[...]) * self.last(jnp.tanh(self.norm(self.first(self.embed(tokens)))))


def made(framework="linen"):
    """(loss_fn, params, layers), in the precision that is switched on."""
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, labels = jax.random.randint(keys[0], (12,), 0, 5), jax.random.randint(keys[1], (12,), 0, 3)

    def loss(logits):
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    if framework == "nnx":
        params, loss_fn = NnxNet(nnx.Rngs(0)), lambda model: loss(model(tokens))
        nnx.update(params, jax.tree.map(lambda p: p.astype(float), nnx.state(params, nnx.Param)))
    else:
        params = jax.tree.map(lambda p: p.astype(float), Net().init(keys[2], tokens)["params"])
        loss_fn = lambda params: loss(Net().apply({"params": params}, tokens))
    layers = kfe.find_layers(loss_fn, params)
    assert set(layers) == {"embed", "first", "norm", "last"}
    return loss_fn, params, layers


def steps_of(tx, loss_fn, params, layers, *args):
    """[(gradient, update)] of the first steps of an optimizer."""
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")
    parameters, found = problems.state_of(params), []
    state, update = tx.init(parameters), jax.jit(tx.update)
    for _ in range(STEPS):
        _, grads, taps = differentiate(params, *args)
        updates, state = update(grads, state, parameters, taps=taps)
        parameters = optax.apply_updates(parameters, updates)
        if isinstance(params, nnx.Module):
            nnx.update(params, parameters)
        else:
            params = parameters
        found.append((grads, updates))
    return found


def length(name, matrix):
    """What a layer's outputs change by at the most, or, with spectral K-FAC, in the root mean square."""
    values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    size = np.sqrt(np.mean(values**2)) if name == "spectral_kfac" else values[0]
    return size * np.sqrt(matrix.shape[0] / matrix.shape[1])


@pytest.mark.parametrize(
    "name",
    quick("kfac", "ekfac", "tkfac", "spectral_kfac", of=kfe.METHODS),
)
def test_the_scale_of_the_loss(name, x64):
    problem = problems.make("plain")
    layers, make = problem.layers(), kfe.METHODS[name].optimizer
    found = []
    for factor in (1, 1000):
        loss_fn = lambda *args, factor=factor: factor * problem.loss_fn(*args)
        found.append(steps_of(make(0.03, layers), loss_fn, problem.params, layers, *problem.args))
    for (_, once), (_, often) in zip(*found, strict=True):
        assert_close(once, often, 1e-8)
    assert length(name, layers["0"].to_matrix(found[0][0][1])) == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("wrapped", ["", "injected", "partitioned"])
def test_the_rest_is_adams_alone(framework, wrapped, x64):
    """A tenth of Adam's step with b2 = 0.99, and the momentum is the layers' own, in any container."""
    loss_fn, params, layers = made(framework)
    make = optax.inject_hyperparams(kfe.kfac) if wrapped == "injected" else kfe.kfac
    tx, adam = make(0.03, layers), optax.adam(0.003, b2=0.99)
    if wrapped == "partitioned":
        frozen = lambda path: "first" if "first" in jax.tree_util.keystr(path) else "others"
        labels = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: frozen(path), tree)
        tx = optax.partition({"others": tx, "first": optax.set_to_zero()}, labels)
    found = steps_of(tx, loss_fn, params, layers)
    state, update = adam.init(found[0][0]), jax.jit(adam.update)
    for grads, updates in found:
        expected, state = update(grads, state)
        for name in ("embed", "norm", "angle"):
            assert_close(updates[name], expected[name], 1e-10)
        assert not np.allclose(jax.tree.leaves(updates["last"])[0], jax.tree.leaves(expected["last"])[0])


def test_kinds_of_the_rest():
    loss_fn, params, layers = made()
    grads, default = steps_of(kfe.kfac(0.03, layers), loss_fn, params, layers)[0]
    _, kept = steps_of(kfe.kfac(0.03, layers, rest_kinds=()), loss_fn, params, layers)[0]
    for name in ("embed", "norm"):
        for ours, others, gradient in zip(
            *map(jax.tree.leaves, (default[name], kept[name], grads[name])), strict=True
        ):
            sign = -0.003 * np.sign(gradient)
            live = np.abs(gradient) > 1e-4
            np.testing.assert_allclose(ours[live], sign[live], rtol=1e-3)
            assert not np.allclose(others[live], sign[live], rtol=0.1)
    with pytest.raises(ValueError, match="There is no kind of layer 'norms'"):
        kfe.kfac(0.03, layers, rest_kinds=("norms",))


def test_a_bound_goes_with_a_steps_own_length():
    layers = problems.make("plain").layers()
    with pytest.raises(
        ValueError,
        match=r"^max_kl bounds a step's own length, which size='spectral' replaces: take size=None",
    ):
        kfe.kfac(0.03, layers, max_kl=1e-2)
    kfe.kfac(0.03, layers, size=None, max_kl=1e-2)


def test_natural(x64):
    """It is the chain by hand, and cannot be changed."""
    loss_fn, params, layers = made()
    inside = layers.without(kinds=("embedding", "norm"))
    rest = optax.chain(optax.scale_by_adam(b2=0.99), optax.scale(0.1))
    of_layers = {name: jax.tree.map(lambda _, name=name: name in inside, params[name]) for name in params}
    chain = optax.chain(
        kfe.clip_by_kl(kfe.scale_by_kfac(inside, 1e-2, rest=rest), 1e-2, 0.1),
        optax.masked(optax.trace(0.9), of_layers),
        optax.scale_by_learning_rate(0.1),
        kfe.clip_layers(inside, 0.1),
    )
    ours = steps_of(kfe.kfac(0.1, layers, 1e-2, **kfe.NATURAL), loss_fn, params, layers)
    for (_, mine), (_, theirs) in zip(ours, steps_of(chain, loss_fn, params, layers), strict=True):
        assert_close(mine, theirs, 1e-12)
    with pytest.raises(TypeError):
        kfe.NATURAL["size"] = "rms"


# Blocks form no chain of layers, and `kfe.kfac_tridiagonal` says so. The fitted products of the others are tested on stacks
# where their factors are.
FITTED = ("kpsvd", "deflation", "lanczos", "kfac_corrected")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] * (name in FITTED))
        for name in kfe.METHODS
        if name != "kfac_tridiagonal"
    ],
)
def test_blocks_and_stacked_layers(name):
    """Experts, and a stack of layers: each has a damping of its own. The step is that of each by itself."""
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (2, 4, 5)), "o": jax.random.normal(key, (5, 3))}
    x, labels = jax.random.normal(jax.random.key(1), (6, 2, 4)), jnp.arange(6) % 3

    def loss_fn(params, x, labels):
        logits = jnp.tanh(jnp.einsum("nbi,bio->nbo", x, params["w"])).sum(1) @ params["o"]
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    layers = kfe.find_layers(loss_fn, params, x, labels)
    assert layers["w"].shape == (2, 4, 5)
    tx = getattr(kfe, name)(0.1, layers)

    @jax.jit
    def step(params):
        _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, labels)
        return tx.update(grads, tx.init(params), params, taps=taps)[0]

    updates = step(params)
    for matrix in updates["w"]:
        assert length(name, matrix) == pytest.approx(0.1, rel=0.1)
