"""Shared positions: "expand" and "reduce" are exact where theory says so, and wrong in each other's setting.

Without nonlinearities s_t = W̄ᵀ ā_t reaches the outputs through a constant matrix (Eschenhagen et al. 2023). With an output a
position, z_t = B s_t, F = E[Σ_t ā_t ā_tᵀ]⊗BᵀB, which is "expand"; with the mean as the output, z = mean_t B s_t, F = E[ā āᵀ]⊗BᵀB
of the mean ā, which is "reduce". What lies before a layer does not matter; behind it nothing may mix positions but the mean.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from .dense import relative_error

N, T, CHANNELS, HIDDEN, CLASSES, TOKENS = 4, 4, 2, 3, 2, 5
SIDE = 4  # images of 4×4
TOLERANCE, WRONG = 1e-10, 1e-2


class Rowwise(nn.Module):
    """Dense layers on (n, t, d)."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="last")(nn.Dense(HIDDEN, name="first")(x))


class Calls(nn.Module):
    """The same layers called once for every position."""

    @nn.compact
    def __call__(self, x):
        first, last = nn.Dense(HIDDEN, name="first"), nn.Dense(CLASSES, name="last")
        return jnp.stack([last(first(x[:, t])) for t in range(T)], 1)


class Loop(nn.Module):
    """The same layers in a loop over time."""

    @nn.compact
    def __call__(self, x):
        def step(cell, carry, x):
            return carry, cell(x)

        loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        return loop(Rowwise(name="cell"), (), x)[1]


class Recurrent(nn.Module):
    """A loop over time whose state is linear in the last one: later outputs mix the positions of "state" and of "input"."""

    @nn.compact
    def __call__(self, x):
        state = nn.Dense(HIDDEN, use_bias=False, name="state")
        inputs, last = nn.Dense(HIDDEN, name="input"), nn.Dense(CLASSES, name="last")
        h, z = jnp.zeros((len(x), HIDDEN)), []
        for t in range(T):
            h = state(h) + inputs(x[:, t])
            z.append(last(h))
        return jnp.stack(z, 1)


class Tokens(nn.Module):
    """An embedding and a dense layer."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(CLASSES, name="last")(nn.Embed(TOKENS, HIDDEN, name="first")(tokens))


class Convolutions(nn.Module):
    """Convolutions with these windows; the last of them has a position an output."""

    windows: tuple[tuple[int, int], ...]
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x):
        for name, window in zip(("first", "last"), self.windows, strict=True):
            x = nn.Conv(HIDDEN if name == "first" else CLASSES, window, padding=self.padding, name=name)(x)
        return x.reshape(len(x), -1, CLASSES)


POINT, WINDOW = (1, 1), (2, 2)
MODELS = {
    "tokens": Rowwise(),
    "calls": Calls(),
    "loop": Loop(),
    "embedding": Tokens(),
    "points": Convolutions((POINT, POINT)),
    "windows": Convolutions((WINDOW, POINT)),
    "padded": Convolutions((WINDOW, POINT), "SAME"),
    "mixing": Convolutions((WINDOW, WINDOW)),
    "circular": Convolutions((WINDOW, WINDOW), "CIRCULAR"),
    "mixing_padded": Convolutions((WINDOW, WINDOW), "SAME"),
    "recurrent": Recurrent(),
}
# Where later windows or states mix positions, only the last layer sees them apart.
PER_POSITION = {
    *(
        f"{name}/{layer}"
        for name in ("tokens", "embedding", "points", "windows", "padded")
        for layer in ("first", "last")
    ),
    *("calls/first", "calls/last", "loop/cell/first", "loop/cell/last", "recurrent/last"),
    *("mixing/last", "circular/last", "mixing_padded/last"),
}
# A mean over a circle is that of every window in it: circular padding mixes positions and is exact. A table has one row a token,
# and the mean of one-hot vectors has an A that is no diagonal.
POOLED = {*PER_POSITION, "circular/first"} - {"embedding/first"}


def inputs(name):
    generator = np.random.default_rng(0)
    if name == "embedding":
        return jnp.asarray(generator.integers(0, TOKENS, (N, T)))
    shape = (SIDE, SIDE) if isinstance(MODELS[name], Convolutions) else (T,)
    return jnp.asarray(generator.normal(size=(N, *shape, CHANNELS)) + 0.3)


@functools.cache
def linear(pooled):
    """(layers, taps, {layer: F from the Jacobian of its own outputs}) of all models side by side, each with a squared error."""
    x = {name: inputs(name) for name in MODELS}
    shapes = jax.eval_shape(lambda: {k: m.init(jax.random.key(0), x[k])["params"] for k, m in MODELS.items()})
    generator = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(generator.normal(size=s.shape)), shapes)

    def outputs(name, params):
        z = MODELS[name].apply({"params": params}, x[name])
        return z.mean(1) if pooled else z

    def loss_fn(params):
        z = jnp.concatenate([outputs(name, own).reshape(N, -1) for name, own in params.items()], 1)
        return kfe.losses.l2_loss(z).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params)
    jacobian = jax.jit(
        lambda p: {name: jax.jacobian(functools.partial(outputs, name))(own) for name, own in p.items()}
    )
    found = jacobian(params)
    blocks = {}
    for name, layer in layers.items():
        model = name.split("/")[0]
        flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2 if pooled else 3 :]), found[model])
        whole = {other: flat if other == model else None for other in found}
        rows = np.asarray(jax.vmap(layer.to_matrix)(whole)).reshape(-1, np.prod(layer.sides))
        blocks[name] = rows.T @ rows / N
    return layers, params, loss_fn, blocks


@functools.cache
def factors(pooled, sharing):
    """{layer: K-FAC's A⊗G} as dense matrices."""
    layers, params, loss_fn, _ = linear(pooled)
    layers = layers.configure(sharing=sharing)
    collect = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")
    estimate = jax.jit(lambda params: kfe.factors.estimate(kfe.factors.kfac(), collect(params)[2]))
    terms = estimate(params)
    return {
        name: np.kron(*(np.diag(side) if side.ndim == 1 else side for side in map(np.asarray, term)))
        for name, (term,) in terms.items()
    }


LAYERS = [
    *(
        f"{name}/{layer}"
        for name, model in MODELS.items()
        if not isinstance(model, Loop | Recurrent)
        for layer in ("first", "last")
    ),
    *("loop/cell/first", "loop/cell/last", "recurrent/state", "recurrent/input", "recurrent/last"),
]


@pytest.mark.parametrize("name", LAYERS)
def test_expand(name, x64):
    """Exact with an output a position where nothing behind the layer mixes positions; wrong with the mean as the output."""
    error = relative_error(factors(False, "expand")[name], linear(False)[3][name])
    assert error < TOLERANCE if name in PER_POSITION else error > WRONG
    assert relative_error(factors(True, "expand")[name], linear(True)[3][name]) > WRONG


@pytest.mark.parametrize("name", LAYERS)
def test_reduce(name, x64):
    """Exact with the mean as the output where all positions have one share in it; wrong with an output a position."""
    error = relative_error(factors(True, "reduce")[name], linear(True)[3][name])
    assert error < TOLERANCE if name in POOLED else error > WRONG
    assert relative_error(factors(False, "reduce")[name], linear(False)[3][name]) > WRONG


def test_all_layers(x64):
    """The cases are the layers that there are, and the repeated ones are shared."""
    layers = linear(False)[0]
    assert set(layers) == set(LAYERS)
    assert {name.split("/")[0] for name, layer in layers.items() if layer.shared} == {
        "calls",
        "loop",
        "recurrent",
    }
