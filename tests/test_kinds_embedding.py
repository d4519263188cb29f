"""A table that is looked up and is the output layer as well: F ≈ A₁⊗G₁ + A₂⊗G₂, and the product that keeps its trace."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from . import dense_kinds as dk
from .dense import assert_close
from .kind_networks import N, random

TOKENS = np.array([[1, 1, 2], [0, 1, 0], [2, 3, 1], [3, 3, 3], [0, 0, 4]])
MASK = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
TARGETS = (TOKENS + 1) % 5
VOCABULARY, FEATURES = 6, 3


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, FEATURES, name="embed", param_dtype=jnp.float64)
        return embed.attend(nn.tanh(embed(tokens)))


def outputs(params, tokens):
    return Tied().apply({"params": params}, tokens)


def loss_fn(params, tokens, targets):
    losses = kfe.losses.softmax_cross_entropy_with_integer_labels(outputs(params, tokens), targets)
    return losses.sum(-1).mean()


@functools.cache
def problem():
    params = {"embed": {"embedding": jnp.asarray(random(0, VOCABULARY, FEATURES))}}
    return params, kfe.find_layers(loss_fn, params, TOKENS, TARGETS)


def uses(outer, live):
    """(lookup, attend) as `dense_kinds.Rows` with ā and g in their places, for rows (c, n, t, V) at the logits.

    The attend's ā = ∂loss/∂logits stands in the place of g, and its g = tanh(e) in that of ā.
    """
    table = np.asarray(problem()[0]["embed"]["embedding"])
    hidden = np.tanh(table[TOKENS])
    first = dk.Rows(dk.one_hot(TOKENS, VOCABULARY), (outer @ table) * (1 - hidden**2), live)
    return first, dk.Rows(hidden, outer, live)


def logits():
    table = np.asarray(problem()[0]["embed"]["embedding"])
    return np.tanh(table[TOKENS]) @ table.T


def all_columns():
    """(c, n, t, V): each position's own columns, zero at the other positions."""
    z = logits()
    found = []
    for t in range(z.shape[1]):
        for column in dk.columns(z[:, t]):
            found.append(np.zeros_like(z))
            found[-1][:, t] = column
    return np.stack(found)


def product(first, second):
    """(A, G): Σ tr(G_u) A_u / σ and Σ tr(A_u) G_u with σ = Σ tr A_u tr G_u."""
    (a1, g1), (g2, a2) = first.expand(), second.expand()
    a2 = np.diag(np.diag(a2))
    pairs = [(a1, g1), (a2, g2)]
    sigma = sum(np.trace(a) * np.trace(g) for a, g in pairs)
    inputs = sum(np.trace(g) * a for a, g in pairs) / sigma
    return np.diag(inputs), sum(np.trace(a) * g for a, g in pairs)


@jax.jit
def read(taps, v):
    """K-FAC's term, the second moment, the diagonal of E[M V Mᵀ], and M of the first draw."""
    (term,) = kfe.factors.estimate(kfe.factors.kfac(), taps)["embed"]
    moment, contracted = taps.pulled().reduce(
        lambda s: (s["embed"].second_moment_in(None, None), s["embed"].contract_output(v, True))
    )
    return tuple(term), moment, contracted, taps.draw(0)["embed"].example_gradients()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fisher", ["exact", pytest.param("empirical", marks=pytest.mark.slow)])
def test_tied_embedding(fisher, masked, x64):
    params, layers = problem()
    layer = layers["embed"]
    assert layer.mixed and not layer.has_rows
    mask = MASK if masked else None
    collect = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher)
    _, grads, taps = collect(params, TOKENS, TARGETS, row_mask=mask)
    live = MASK.astype(float) if masked else None
    residual = (dk.softmax(logits()) - np.eye(VOCABULARY)[TARGETS])[None]
    first, second = uses(all_columns() if fisher == "exact" else residual, live)
    v = random(3, FEATURES, FEATURES)
    term, found, contracted, examples = read(taps, v + v.T)
    assert_close(term, product(first, second), 1e-11)
    gradients = first.gradients() + second.gradients().swapaxes(-1, -2)
    moment = (gradients**2).sum((0, 1)) / N
    assert_close(found, moment, 1e-11)
    if fisher == "empirical":
        assert_close(examples, gradients[0], 1e-11)
        assert masked or not np.abs(grads["embed"]["embedding"] - gradients[0].mean(0)).max() > 1e-12
    expected = np.einsum("cnij,jk,cnik->i", gradients, v + v.T, gradients) / N
    assert_close(contracted, expected, 1e-11)


def test_tokens_of_a_layer_in_low_precision():
    """bfloat16 has no odd numbers above 256, but tokens are counted as what they are."""
    tokens = jnp.array([[257], [259]])
    model = nn.Embed(300, 1, dtype=jnp.bfloat16)
    params = {"embed": {"embedding": jnp.ones((300, 1))}}

    def loss_fn(params, tokens):
        return kfe.losses.l2_loss(model.apply({"params": params["embed"]}, tokens)).mean()

    layers = kfe.find_layers(loss_fn, params, tokens)
    _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, tokens)
    assert_close(taps["embed"].covariances()[0], jnp.zeros(300).at[tokens].set(0.5), 1e-6)


def test_the_product_keeps_the_trace(x64):
    """tr A tr G = Σ tr A_u tr G_u, and tr A = 1."""
    first, second = uses(all_columns(), None)
    a, g = product(first, second)
    (a1, g1), (g2, a2) = first.expand(), second.expand()
    np.testing.assert_allclose(
        np.sum(a) * np.trace(g), np.trace(a1) * np.trace(g1) + np.trace(a2) * np.trace(g2)
    )


def test_a_tied_embedding_has_no_common_input_factor(x64):
    params, layers = problem()
    _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, TOKENS, TARGETS)
    with pytest.raises(ValueError, match="no common A"):
        taps["embed"].covariances()
    with pytest.raises(ValueError, match="exchanged have no common mean"):
        layers.configure(sharing="reduce")
