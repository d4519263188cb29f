"""Losses, parameters and arguments that cannot be right: `find_layers` and `value_grad_and_taps` say what is wrong."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax._jax import static_values

X, Y = jnp.ones((4, 3)), jnp.zeros(4, int)
PARAMS = {"dense": {"kernel": jnp.ones((3, 2))}}


def losses(params, x, y):
    z = kfe.tag_dense(x, x @ params["dense"]["kernel"], params["dense"])
    return kfe.losses.softmax_cross_entropy_with_integer_labels(z, y)


def sound(params, x, y, *_, **__):
    return losses(params, x, y).mean()


@pytest.fixture(scope="module")
def layers():
    return kfe.find_layers(sound, PARAMS, X, Y)


def refused(error, sentence, layers, loss_fn, params=PARAMS, args=(X, Y), has_aux=False):
    """Both entrances say it."""
    with pytest.raises(error, match=sentence):
        kfe.find_layers(loss_fn, params, *args, has_aux=has_aux)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical", has_aux=has_aux)
    with pytest.raises(error, match=sentence):
        differentiate(params, *args)


SCALAR = "The loss must be a real scalar"
# name → (the loss from the examples' losses, has_aux, sentence)
RETURNS = {
    "vector": (lambda v: v, False, rf"^{SCALAR}, but has shape \(4,\) and dtype float32; reduce it"),
    "one element": (lambda v: v.mean(keepdims=True), False, rf"^{SCALAR}, but has shape \(1,\)"),
    "integer": (lambda v: v.mean().astype(int), False, rf"^{SCALAR}, but has shape \(\) and dtype int32"),
    "complex": (lambda v: v.mean() + 0j, False, rf"^{SCALAR}, but has shape \(\) and dtype complex64"),
    "truth": (lambda v: v.mean() > 0, False, rf"^{SCALAR}, but has shape \(\) and dtype bool"),
    "nothing": (lambda v: None, False, rf"^{SCALAR}, and the loss function returned None\."),
    "dictionary": (
        lambda v: {"loss": v.mean()},
        False,
        rf"^{SCALAR}, and the loss function returned a dict\.",
    ),
    "pair": (lambda v: (v.mean(), v), False, "returned a tuple of 2; with has_aux=True it may return"),
    "list": (lambda v: [v.mean()], False, "returned a list of 1; with has_aux=True it may return"),
    "no pair": (
        lambda v: v.mean(),
        True,
        r"must return a pair, \(loss, aux\), and it returned an array of shape \(\)",
    ),
    "triple": (lambda v: (v.mean(), v, v), True, "must return a pair.*and it returned a tuple of 3"),
    "nothing, aux": (lambda v: None, True, "must return a pair.*and it returned None"),
    "vector, aux": (lambda v: (v, 1), True, rf"^{SCALAR}, but has shape \(4,\)"),
    "constant": (
        lambda v: jnp.ones(()),
        False,
        "does not depend on the parameters, so that its gradient is zero",
    ),
    "stopped": (
        lambda v: jax.lax.stop_gradient(v.mean()),
        False,
        "and not behind jax.lax.stop_gradient alone",
    ),
    "stopped in a jit": (
        lambda v: jax.jit(lambda u: jax.jit(jax.lax.stop_gradient)(u).mean())(v),
        False,
        "and not behind jax.lax.stop_gradient alone",
    ),
    "stopped in a remat": (
        lambda v: jax.checkpoint(lambda u: jax.lax.stop_gradient(u).mean())(v),
        False,
        "and not behind jax.lax.stop_gradient alone",
    ),
    "number": (lambda v: 1.0, False, "does not depend on the parameters"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_a_loss_returns(name, layers):
    of, has_aux, sentence = RETURNS[name]
    refused(ValueError, sentence, layers, lambda params, x, y: of(losses(params, x, y)), has_aux=has_aux)


def test_a_loss_of_the_data_alone(layers):
    def loss_fn(params, x, y):
        del params
        return (x**2).mean() + y.mean()

    refused(ValueError, "does not depend on the parameters", layers, loss_fn)


@pytest.mark.parametrize(
    "leaf", [jnp.zeros((), int), jnp.ones(2, bool), jax.random.key(0)], ids=["whole", "flags", "key"]
)
def test_parameters_without_a_gradient(leaf, layers):
    sentence = "^The parameters hold 'dense/step' of type .* only floating-point arrays have a gradient: pass"
    refused(TypeError, sentence, layers, sound, {"dense": {**PARAMS["dense"], "step": leaf}})


@pytest.mark.parametrize("leaf", [1.0, "name"])
def test_parameters_that_are_no_arrays(leaf):
    with pytest.raises(TypeError, match=f"^The parameters hold 'more' of type {type(leaf).__name__}"):
        kfe.find_layers(sound, {**PARAMS, "more": leaf}, X, Y)


def test_an_empty_batch(layers):
    sentence = r"^The batch is empty: the input of layer 'dense' has shape \(0, 3\)\."
    refused(ValueError, sentence, layers, sound, args=(X[:0], Y[:0]))


def test_axes_that_are_not_bound(layers):
    def loss_fn(params, x, y):
        return jax.lax.pmean(sound(params, x, y), "data")

    sentence = (
        r"unbound axis name: data\. kfe\.find_layers.* is told with axis_name= which axes the loss names"
    )
    refused(ValueError, sentence, layers, loss_fn)
    assert list(kfe.find_layers(loss_fn, PARAMS, X, Y, axis_name="data")) == ["dense"]
    with pytest.raises(
        ValueError, match="unbound axis name: data.*must be called inside the pmap or shard_map"
    ):
        kfe.value_grad_and_taps(sound, layers, fisher="empirical", axis_name="data")(PARAMS, X, Y)
    # The user's own names are not ours.
    with pytest.raises(NameError, match="missing_name"):
        kfe.find_layers(lambda params, x: missing_name, PARAMS, X)  # noqa: F821


def test_num_samples(layers):
    for number in (0, -1, 1.5, None, float("nan"), float("inf"), True, "2", (1,)):
        with pytest.raises(
            ValueError, match="^num_samples counts the draws of .*, a positive whole number, not"
        ):
            kfe.value_grad_and_taps(sound, layers, num_samples=number)


@dataclasses.dataclass
class Options:
    """Without a hash, as dataclasses are by default."""

    weight: float = 1.0
    window: slice = dataclasses.field(default_factory=lambda: slice(0, 2))
    names: tuple = ()


# What stays a Python value → the same again, and another of its kind.
VALUES = {
    "slice": lambda i: slice(0, i),
    "dataclass": lambda i: Options(float(i)),
    "nested dataclass": lambda i: Options(names=([i], {i})),
    "config": lambda i: ConfigDict({"width": i, "parts": [1, 2], "inner": {"depth": 3}}),
    "set": lambda i: {i, "a"},
}


@pytest.mark.parametrize("name", VALUES)
def test_arguments_without_a_hash_are_compared_by_content(name):
    make = VALUES[name]
    arrays, static = static_values.split_call(((), (X, make(1)), {"options": make(2)}))
    again = static_values.split_call(((), (X, make(1)), {"options": make(2)}))[1]
    other = static_values.split_call(((), (X, make(1)), {"options": make(3)}))[1]
    assert static == again
    assert hash(static) == hash(again)
    assert static != other
    _, (x, value), options = static(arrays)
    assert x is X
    assert (value, options) == (make(1), {"options": make(2)})


def test_arguments_without_a_hash_reach_the_loss():
    """A step with the same options is not compiled again, one with others is."""
    traces = []

    def loss_fn(params, x, y, options, *, window):
        traces.append(options.weight)
        return options.weight * sound(params, x[window], y[window])

    def step(weight):
        return differentiate(PARAMS, X, Y, Options(weight), window=slice(0, 2))[0]

    layers = kfe.find_layers(loss_fn, PARAMS, X, Y, Options(), window=slice(0, 2))
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    first = step(1.0)
    count = len(traces)
    assert step(1.0) == first
    assert len(traces) == count
    assert step(3.0) == pytest.approx(3 * float(first), rel=1e-6)


class Holder:
    """Without a hash, and not of a kind that is known."""

    __hash__ = None


def test_arguments_that_cannot_be_compared(layers):
    """The message names the argument, as positions are counted with the parameters first."""
    sentence = "^Argument {} of the loss function holds a {}, which is neither an array nor a value that can be compared"
    refused(TypeError, sentence.format(3, "Holder"), layers, sound, args=(X, Y, Holder()))
    refused(
        TypeError,
        sentence.format(3, "bytearray"),
        layers,
        sound,
        args=(X, Y, [1, Options(names=[bytearray()])]),
    )
    with pytest.raises(TypeError, match=sentence.format("'options'", "Holder")):
        kfe.find_layers(sound, PARAMS, X, Y, options={"a": Holder()})
    with pytest.raises(
        TypeError, match="Argument 3 of the loss function holds arrays in a container that JAX does not know"
    ):
        kfe.find_layers(sound, PARAMS, X, Y, Options(names=[X]))


def test_no_layer():
    """The optimizer says so itself, and why."""

    def loss_fn(params, x, y):
        z = jnp.maximum(x[:, :, None], params["w"]).sum(1)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    params = {"w": jnp.ones((3, 2)), "idle": jnp.ones(3)}
    layers = kfe.find_layers(loss_fn, params, X, Y)
    for make in (kfe.scale_by_kfac, kfe.scale_by_ekfac):
        with pytest.raises(
            ValueError,
            match=r"^The loss has no layer to precondition: .*w .no supported layer reads it \(max at test_misuse_losses.py:",
        ) as error:
            make(layers, 0.1)
        assert "idle (the loss does not use it)" in str(error.value)
    with pytest.raises(
        ValueError, match="no layer to precondition: dense/kernel .left out by Layers.without"
    ):
        kfe.kfac_adaptive(kfe.find_layers(sound, PARAMS, X, Y).without("*"))
    many = nnx.List([nnx.Param(jnp.ones(2)) for _ in range(7)])
    layers = kfe.find_layers(lambda model: sum(p[...].sum() for p in model), many)
    with pytest.raises(ValueError, match=r"and 2 more, which print\(layers\) lists"):
        kfe.kfac(0.1, layers)
