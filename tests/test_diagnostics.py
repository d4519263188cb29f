"""`kfe.check_layers`: the law of rows on a user's model."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from . import problems
from .methods import quick
from .models import cross_entropy
from .zoo import CASES


@pytest.mark.parametrize(
    "name",
    quick(
        "over_time",
        "batch_norm_dropout",
        slow=["mlp", "remat_scan", "example_vmap"],
        of=["mlp", "remat_scan", "over_time", "batch_norm_dropout", "example_vmap"],
    ),
)
def test_a_sound_model(name):
    """Every layer is ok, or says why it is not checked."""
    case = CASES[name]
    loss_fn, params, args = case.make(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, *args)
    checks = kfe.check_layers(loss_fn, layers, params, *args)
    # What keeps no per-example gradients cannot be checked.
    assert checks.ok == case.example_gradients
    assert "WRONG" not in str(checks)
    assert [check.name for check in checks] == list(layers)
    for check in checks:
        assert (check.gradient_error is not None) == case.example_gradients
        assert check.note or check.example_error is not None


def test_a_layer_tagged_with_another_input():
    """The rows of a mistaken tag are found out, in the table and in numbers; the other layer is fine."""
    generator = np.random.default_rng(0)
    x, y = (jnp.asarray(generator.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    params = {name: {"kernel": jnp.eye(3) + 0.1} for name in ("right", "wrong")}

    def loss_fn(params, x, y):
        hidden = kfe.tag_dense(x, x @ params["right"]["kernel"], params["right"])
        z = kfe.tag_dense(2 * hidden, hidden @ params["wrong"]["kernel"], params["wrong"])
        return kfe.losses.l2_loss(z, y).mean()

    layers = kfe.find_layers(loss_fn, params, x, y)
    checks = kfe.check_layers(loss_fn, layers, params, x, y)
    assert not checks.ok
    right, wrong = checks
    assert right.gradient_error < 1e-5
    assert right.example_error < 1e-5
    # Twice the input is twice the gradient: as large an error as the gradient itself.
    assert wrong.gradient_error == pytest.approx(1, rel=1e-4)
    assert wrong.example_error == pytest.approx(1, rel=1e-4)
    rows = str(checks).splitlines()
    assert "WRONG" in next(row for row in rows if row.startswith("wrong"))
    assert "ok" in next(row for row in rows if row.startswith("right"))


def advantages(x):
    """Of each example, normalized over the batch: an example alone has none."""
    a = x[:, 0]
    return (a - a.mean()) / (a.std() + 1e-3)


def squares(params):
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(params))


# How the losses of the examples, a function of their inputs, form the loss → whether single examples can be checked.
LOSSES = {
    "sum": (lambda losses, params, x: losses(x).sum(), True),
    "squares": (lambda losses, params, x: losses(x).mean() + 0.1 * squares(params), True),
    "norm": (lambda losses, params, x: losses(x).mean() + 10 * jnp.sqrt(squares(params)), True),
    "squares beside a sum": (lambda losses, params, x: losses(x).sum() + squares(params), False),
    "advantages": (lambda losses, params, x: (losses(x) * advantages(x)).mean(), False),
    "advantages, squares": (
        lambda losses, params, x: (losses(x) * advantages(x)).mean() + squares(params),
        False,
    ),
    "centered inputs": (lambda losses, params, x: losses(x - x.mean(0)).mean(), False),
}


@functools.cache
def made(name, mistake):
    """A network of two layers, the first tagged with an input that is a little larger than its own."""
    combine, _ = LOSSES[name]
    problem = problems.make("plain")

    def loss_fn(params, x, y):
        def losses(x):
            first, last = params
            hidden = x @ first["kernel"] + first["bias"]
            hidden = jnp.tanh(kfe.tag_dense((1 + mistake) * x, hidden, first))
            z = kfe.tag_dense(hidden, hidden @ last["kernel"] + last["bias"], last)
            return kfe.losses.softmax_cross_entropy_with_integer_labels(z, y)

        return combine(losses, params, x)

    return problem, loss_fn, kfe.find_layers(loss_fn, problem.params, *problem.args)


def check_loss(name, mistake=0.0, start=lambda params: params):
    problem, loss_fn, layers = made(name, mistake)
    return kfe.check_layers(loss_fn, layers, start(problem.params), *problem.args)


def zero_head(params):
    return [*params[:-1], jax.tree.map(jnp.zeros_like, params[-1])]


@pytest.mark.parametrize("name", LOSSES)
def test_a_sound_loss(name):
    """Penalties and weights of the whole batch are no false alarm."""
    checks = check_loss(name)
    assert checks.ok
    assert "WRONG" not in str(checks)
    for check in checks:
        assert (check.example_error is not None) == LOSSES[name][1]
        assert ("do not add up" in check.note) != LOSSES[name][1]
        assert ("penalty" in check.note) == ("squares" in name or name == "norm")


@pytest.mark.parametrize("name", ["sum", "squares", "advantages"])
def test_a_head_of_zeros(name):
    """All examples have one loss, so that its value compares nothing; and what has no gradient is not checked."""
    checks = check_loss(name, start=zero_head)
    assert checks.ok
    hidden, head = checks
    assert (head.example_error is not None) == LOSSES[name][1]
    assert hidden.errors == []
    assert "no example has a gradient here" in hidden.note
    assert "not checked" in str(checks).splitlines()[2]


@pytest.mark.parametrize(
    "name", quick("sum", "squares", "squares beside a sum", "advantages", "centered inputs", of=LOSSES)
)
def test_a_mistake_beside_it(name):
    """What lets a penalty through finds a mistaken tag still."""
    checks = check_loss(name, mistake=0.1)
    assert not checks.ok
    mistaken, right = checks
    assert mistaken.gradient_error > 0.01
    assert all(error < 1e-4 for error in right.errors)


def test_an_optimum():
    """Where the examples' gradients cancel, the rounding of their sum is no mistake."""
    generator = np.random.default_rng(0)
    x, y = (jnp.asarray(generator.normal(size=(8, d)), jnp.float32) for d in (3, 2))
    params = {"kernel": jnp.asarray(np.linalg.lstsq(np.asarray(x), np.asarray(y))[0])}

    def loss_fn(params, *, x, y):
        return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"], params), y).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x=x, y=y)
    (check,) = checks = kfe.check_layers(loss_fn, layers, params, x=x, y=y)
    assert checks.ok
    assert check.example_error is not None
    assert check.note == ""


def test_layers_that_cannot_be_checked():
    """Positions, the same for all examples; no layer at all; a single example with a penalty."""
    tokens, labels = jnp.arange(12).reshape(4, 3) % 5, jnp.arange(4) % 2

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(5, 4)(tokens) + nn.Embed(3, 4, name="positions")(jnp.arange(3))
            return nn.Dense(2, name="head")(jnp.tanh(x).mean(1))

    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    def loss_fn(params, tokens, labels):
        return cross_entropy(model.apply({"params": params}, tokens), labels)

    layers = kfe.find_layers(loss_fn, params, tokens, labels)
    checks = kfe.check_layers(loss_fn, layers, params, tokens, labels)
    assert checks.ok
    assert [check.name for check in checks] == list(layers)
    by_name = {check.name: check for check in checks}
    assert by_name["positions"].errors == []
    assert "the same for all examples" in by_name["positions"].note
    assert by_name["head"].example_error is not None

    alone = kfe.check_layers(loss_fn, layers.without("head").without("Embed_0"), params, tokens, labels)
    assert not alone.ok
    none = kfe.check_layers(loss_fn, layers.without("*"), params, tokens, labels)
    assert not none.ok
    assert str(none) == "No layers: nothing is checked."

    def penalized(params, tokens, labels):
        return loss_fn(params, tokens, labels) + 0.1 * jnp.sum(params["head"]["kernel"] ** 2)

    one, two = (kfe.check_layers(penalized, layers, params, tokens[:n], labels[:n]) for n in (1, 2))
    head = {check.name: check for check in one}["head"]
    assert head.errors == [] and "one example does not tell a penalty from a mistake" in head.note
    assert {check.name: check for check in one}["Embed_0"].errors
    assert two.ok and "without the gradient of a penalty" in {check.name: check for check in two}["head"].note
