"""A distribution of one's own: in every loss that registers, and what is said where it is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import kfe_optax as kfe

from .dense import assert_close
from .negative_binomial import NegativeBinomial

X, COUNTS = jnp.linspace(-1, 1, 8).reshape(4, 2), jnp.arange(12).reshape(4, 3) % 5
PARAMS = {"kernel": jnp.ones((2, 3)) / 2}


def statistics(loss_fn, dtype=jnp.float32, **options):
    params = jax.tree.map(lambda v: v.astype(dtype), PARAMS)
    layers = kfe.find_layers(loss_fn, params, X.astype(dtype))
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", **options)
    return differentiate(params, X.astype(dtype))[2]


def test_the_ways_to_register_it(x64):
    """As a loss, as outputs with weights, under a vmap: the same Fisher, also where each trace makes an equal one."""

    def mean(params, x):
        loss = kfe.losses.negative_log_likelihood(x @ params["kernel"], COUNTS, NegativeBinomial())
        return loss.sum(-1).mean()

    def registered(params, x):
        z = kfe.register_output(x @ params["kernel"], NegativeBinomial(r=2.5))
        return NegativeBinomial().negative_log_likelihood(z, COUNTS).sum(-1).mean()

    def mapped(params, x):
        loss = lambda z, y: kfe.losses.negative_log_likelihood(z, y, NegativeBinomial()).sum()
        return jax.vmap(loss)(x @ params["kernel"], COUNTS).mean()

    expected = statistics(mean, jnp.float64)["kernel"].covariances()
    assert_close(expected[1], jnp.diag(jnp.diag(expected[1])), 1e-12)
    for loss_fn in (registered, mapped):
        assert_close(statistics(loss_fn, jnp.float64)["kernel"].covariances(), expected, 1e-12)


def test_outside_it_is_plain():
    z = X @ PARAMS["kernel"]
    expected = NegativeBinomial().negative_log_likelihood(z, COUNTS)
    assert_close(kfe.losses.negative_log_likelihood(z, COUNTS, NegativeBinomial()), expected, 1e-7)


@dataclasses.dataclass(frozen=True)
class Own(kfe.Distribution):
    """Sound by itself: a Gaussian's Fisher."""

    event_ndim = 0

    def negative_log_likelihood(self, z, targets):
        return (z - targets) ** 2 / 2

    def root_transpose(self, z, u):
        return u


class ByIdentity(Own):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclasses.dataclass(frozen=True)
class OfAnArray(Own):
    scale: Any = dataclasses.field(default_factory=lambda: jnp.ones(3))


class OfMatrices(Own):
    event_ndim = 3


class OfNames(Own):
    event_ndim = "last"


class Summed(Own):
    def root_transpose(self, z, u):
        return u.sum(-1)


class Short(Own):
    def sample(self, key, z):
        return jax.random.normal(key)


class Silent(Own):
    def root_transpose(self, z, u):
        pass


class Unfinished(kfe.Distribution):
    event_ndim = 0

    def negative_log_likelihood(self, z, targets):
        return z - targets


# A way to make one → the error and its sentence.
NONE = {
    "a class": (lambda: Own, TypeError, r"is an instance, not a class: pass Own\(\.\.\.\)"),
    "a name": (lambda: "poisson", TypeError, "derives from kfe.Distribution; str has no event_ndim"),
    "by identity": (ByIdentity, TypeError, "which ByIdentity is not: make it a frozen dataclass"),
    "of an array": (OfAnArray, TypeError, "which OfAnArray is not.*What is an array belongs in z"),
    "an array for a number": (lambda: kfe.Gaussian(jnp.ones(())), TypeError, "variance is a Python number"),
    "too many axes": (OfMatrices, ValueError, r"OfMatrices.event_ndim, 3, must say how many.*\(4, 3\)"),
    "no number": (OfNames, ValueError, "OfNames.event_ndim, 'last', must say how many"),
    "a sum": (Summed, ValueError, r"Summed.* must return an array of the shape of z, \(4, 3\), not"),
    "a short draw": (Short, ValueError, r"Short.sample must return an array of the shape of z"),
    "nothing": (Silent, ValueError, r"Silent.* must return an array of the shape of z, \(4, 3\), not None"),
    "without a root": (Unfinished, TypeError, "abstract.* .?root_transpose"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_distribution(name):
    """Both entrances say it while tracing."""
    make, error, sentence = NONE[name]

    def as_loss(params, x):
        return kfe.losses.negative_log_likelihood(x @ params["kernel"], COUNTS, make()).mean()

    def as_output(params, x):
        return jnp.square(kfe.register_output(x @ params["kernel"], make())).mean()

    for loss_fn in (as_loss, as_output):
        with pytest.raises(error, match=sentence):
            kfe.find_layers(loss_fn, PARAMS, X)


@pytest.mark.parametrize("listening", [False, True])
def test_targets_of_another_shape(listening):
    """A loss of pairs of examples, (n, n), is none of the events."""

    def loss_fn(params, x):
        z = x @ params["kernel"][:, 0]
        return kfe.losses.negative_log_likelihood(z, COUNTS[:, :1], Own()).mean()

    sentence = (
        r"Own.negative_log_likelihood must return one number an event, \(4,\) for outputs of shape \(4,\)"
    )
    call = (lambda: kfe.find_layers(loss_fn, PARAMS, X)) if listening else (lambda: loss_fn(PARAMS, X))
    with pytest.raises(ValueError, match=sentence):
        call()


def test_outputs_that_are_no_real_numbers():
    def loss_fn(params, x):
        return kfe.losses.negative_log_likelihood((x @ params["kernel"]).astype(int), COUNTS, Own()).mean()

    with pytest.raises(TypeError, match="The outputs of Own must be floating, not int32"):
        kfe.find_layers(loss_fn, PARAMS, X)
