"""Each reason for which something is kept out of a state is provoked, counted and named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._jax import failures
from kfe_optax._linalg import kronecker

from .dense import assert_close


def loss_fn(params, x):
    z = kfe.tag_dense(x, x @ params["kernel"], {"kernel": params["kernel"]})
    return kfe.losses.l2_loss(params["temperature"] * z).sum(-1).mean()


# With outputs of zero a batch of any size has a finite loss and gradient.
PARAMS = {"kernel": jnp.zeros((3, 2)), "temperature": jnp.ones(())}
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
LAYERS = kfe.find_layers(loss_fn, PARAMS, X)
# Everything in every step, so that whatever is bad gets as far as it can.
ALWAYS = {"factor_update_period": 1}
EACH = {
    "kfac": lambda **o: kfe.scale_by_kfac(LAYERS, 0.1, inverse_update_period=1, **ALWAYS, **o),
    "ekfac": lambda **o: kfe.scale_by_ekfac(LAYERS, 0.1, basis_update_period=1, **ALWAYS, **o),
    "in_kfe": lambda **o: kfe.in_kfe(optax.scale_by_adam(), LAYERS, basis_update_period=1, **ALWAYS, **o),
}


def stepped(tx, state=None, scale=1.0, poison=()):
    """One step on a batch so many times as large, with a gradient that is NaN in these parameters."""
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, LAYERS)(PARAMS, scale * X, key=jax.random.key(0))
    grads = {name: leaf * (jnp.nan if name in poison else 1) for name, leaf in grads.items()}
    state = tx.init(PARAMS) if state is None else state
    return tx.update(grads, state, PARAMS, taps=taps)[1]


def reasons(state):
    """{reason: how often} of those that there were."""
    told = kfe.info(state)
    assert told.nonfinite == told.reasons["gradient"] + told.reasons["rest"]
    assert told.failures == sum(told.reasons[reason.name.lower()] for reason in kfe.Failure)
    return {name: int(count) for name, count in told.reasons.items() if count}


@pytest.mark.parametrize("name", EACH)
def test_nothing_and_a_gradient(name):
    tx = EACH[name]()
    state = stepped(tx)
    assert reasons(state) == {}
    assert reasons(stepped(tx, state, poison=("kernel", "temperature"))) == {"gradient": 1}


def test_the_rest():
    """A rest whose update is not finite, though the gradient is."""
    bad = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u + jnp.inf, updates))
    assert reasons(stepped(EACH["kfac"](rest=bad))) == {"rest": 1}


@pytest.mark.parametrize("name", ["kfac", "in_kfe"])
@pytest.mark.parametrize(("scale", "reason"), [(1e25, "estimate"), (1e3, "proportion")])
def test_estimates(name, scale, reason):
    """A factor beyond float32, and one that is a million times as large as the one before it."""
    tx = EACH[name]()
    assert reasons(stepped(tx, stepped(tx), scale)) == {reason: 1}


@pytest.mark.parametrize("name", EACH)
def test_factorizations(name, monkeypatch):
    eigh = kronecker.raw_eigh
    tx = EACH[name]()
    state = stepped(tx)
    with monkeypatch.context() as patch:
        patch.setattr(kronecker, "raw_eigh", lambda stack: eigh(stack * jnp.nan))
        patch.setattr(kronecker, "_cholesky", lambda stack: stack * jnp.nan)
        assert reasons(stepped(EACH[name](), state)) == {"factorization": 2}


def test_inner_states():
    """A second moment that overflows inside `in_kfe`."""
    bad = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u + jnp.inf, updates))
    tx = kfe.in_kfe(bad, LAYERS, rest=optax.identity())
    assert reasons(stepped(tx)) == {"inner": 1}


def test_several_states():
    """Counts of several preconditioners are added; states that vmap has stacked keep an axis; no preconditioner, no reasons."""
    tx = EACH["kfac"]()
    state = stepped(tx, stepped(tx), 1e3)
    assert reasons((state, state)) == {"proportion": 2}
    stacked = kfe.info(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state))
    assert_close(stacked.reasons["proportion"], jnp.ones(2))
    assert_close(stacked.failures, jnp.ones(2))
    assert kfe.info(optax.adam(1.0).init(PARAMS)).reasons is None


def test_counts_without_reasons():
    """Those of an estimator of one's own count as estimates."""
    assert failures.between(jnp.int32(1), jnp.int32(3)).tolist() == [2, 0, 0, 0]
    assert failures.between(failures.none(), failures.estimates(1, 2)).tolist() == [1, 2, 0, 0]
