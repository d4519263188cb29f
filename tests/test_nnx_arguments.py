"""NNX objects beside the first argument: their state moves as it does under `nnx.value_and_grad`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfe_optax as kfe

from . import problems
from .dense import assert_close
from .models import cross_entropy, other_state


class Net(nnx.Module):
    """Dropout without a stream of its own."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.dense(self.dropout(self.norm(x), rngs=rngs))


class Objects:
    """One of each kind that a loss may be given beside its model."""

    def __init__(self):
        self.model = Net()
        self.args = ({"streams": [nnx.Rngs(1)]}, nnx.Variable(jnp.zeros(())))
        teacher = Net(2)
        teacher.dropout.rate = 0.0
        # The second model moves its statistics, the metric is shared with a dict, and the last stream only in one argument.
        metric = nnx.metrics.Average()
        self.kwargs = {
            "teacher": teacher,
            "metrics": {"loss": metric, "same": metric},
            "noise": nnx.Rngs(noise=3),
            "frozen": Net(4),
        }

    def state(self):
        objects = [self.model, *self.args[0]["streams"], self.args[1], *self.kwargs.values()]
        return jax.tree.map(np.asarray, other_state(objects))


def all_of_them(model, x, y, given, counter, *, teacher, metrics, noise, frozen):
    z = model(x + 0.1 * noise.noise.normal(x.shape), given["streams"][0])
    loss = cross_entropy(z, y) + (0.1 * z * jax.lax.stop_gradient(teacher(x))).mean()
    loss = loss + 0 * frozen.dense.kernel[...].sum()
    metrics["loss"].update(values=loss)
    counter[...] = counter[...] + loss
    return loss


def batch():
    return problems.make("nnx").args


@pytest.fixture(scope="module")
def layers():
    objects = Objects()
    before = objects.state()
    found = kfe.find_layers(all_of_them, objects.model, *batch(), *objects.args, **objects.kwargs)
    assert list(found) == ["norm", "dense"]
    assert_close(objects.state(), before, 1e-30)
    return found


def test_all_state_moves_alike(layers):
    """Streams, metrics, variables and a second model, in containers and by keyword: three steps' losses, gradients and states."""
    ours, theirs = Objects(), Objects()
    differentiate = kfe.value_grad_and_taps(all_of_them, layers)

    def plain_loss(model, x, y, given, counter, teacher, metrics, noise, frozen):
        return all_of_them(
            model, x, y, given, counter, teacher=teacher, metrics=metrics, noise=noise, frozen=frozen
        )

    plain = nnx.jit(nnx.value_and_grad(plain_loss))
    losses = set()
    for i in range(3):
        loss, grads, _ = differentiate(ours.model, *batch(), *ours.args, key=jax.random.key(i), **ours.kwargs)
        expected = plain(theirs.model, *batch(), *theirs.args, *theirs.kwargs.values())
        assert_close((loss, jax.tree.leaves(grads)), (expected[0], jax.tree.leaves(expected[1])), 1e-5)
        assert_close(ours.state(), theirs.state(), 1e-6)
        losses.add(float(loss))
    assert len(losses) == 3
    assert int(ours.args[0]["streams"][0].default.count[...]) == 3
    assert int(ours.kwargs["metrics"]["loss"].count[...]) == 3


def test_state_moves_from_microbatch_to_microbatch(layers):
    """As in as many calls, and what does not move is carried by none of them."""
    (x, y), ours, theirs = batch(), Objects(), Objects()
    differentiate = kfe.value_grad_and_taps(all_of_them, layers, fisher="empirical", microbatches=2)
    _, grads, taps = differentiate(ours.model, x, y, *ours.args, **ours.kwargs)
    whole = kfe.value_grad_and_taps(all_of_them, layers, fisher="empirical")
    found = [whole(theirs.model, x[part::2], y[part::2], *theirs.args, **theirs.kwargs) for part in (0, 1)]
    assert_close(ours.state(), theirs.state(), 1e-6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, found[0][1], found[1][1])
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(mean), 1e-5)
    pairs = [part[2]["dense"].covariances() for part in found]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *pairs)
    assert_close(taps["dense"].covariances(), expected, 1e-5)
    assert not any(leaf.shape == (2, 3, 2) for leaf in jax.tree.leaves(taps))


def test_a_stream_that_the_model_shares():
    """It stays one, and moves once a draw."""

    def loss_fn(model, x, y, rngs):
        assert model.rngs is rngs
        return cross_entropy(model(x + rngs.normal(x.shape)), y)

    (x, y), rngs = batch(), nnx.Rngs(1)
    model = Net()
    model.rngs, model.dropout.rngs = rngs, rngs
    layers = kfe.find_layers(loss_fn, model, x, y, rngs)
    kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(model, x, y, rngs)
    assert model.rngs is rngs
    assert int(rngs.default.count[...]) == 2


@pytest.mark.parametrize("jit", [False, True])
def test_a_parameter_tree_with_a_stream(jit):
    """The first argument need not be a module."""
    problem = problems.make("plain")

    def loss_fn(params, x, y, rngs):
        return problem.loss_fn(params, x + rngs.normal(x.shape), y)

    rngs, expected = nnx.Rngs(1), nnx.Rngs(1)
    layers = kfe.find_layers(loss_fn, problem.params, *problem.args, rngs)

    def step(params, x, y, rngs):
        return kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x, y, rngs)[0]

    step = nnx.jit(step) if jit else step
    for _ in range(2):
        loss = step(problem.params, *problem.args, rngs)
        assert_close(loss, loss_fn(problem.params, *problem.args, expected), 1e-6)
    assert int(rngs.default.count[...]) == 2


def test_a_frozen_model_from_outside_a_trace():
    """What is read alone is not written back: it may belong to an outer trace, and costs no output of the step."""
    objects = Objects()

    def loss_fn(model, x, teacher):
        return ((model(x, nnx.Rngs(0)) - jax.lax.stop_gradient(teacher.dense(x))) ** 2).mean()

    def step(x):
        model = Net()
        layers = kfe.find_layers(loss_fn, model, x, objects.model)
        return kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(model, x, objects.model)[0]

    assert jax.eval_shape(step, batch()[0]).shape == ()


def test_values_are_not_moved():
    """An `nnx.State` among the arguments is values, as under `jax.value_and_grad`."""
    problem = problems.make("plain")
    graph, rest = nnx.split(Net())

    def loss_fn(params, x, y, rest):
        return problem.loss_fn(params, x + nnx.merge(graph, rest).norm(x), y)

    layers = kfe.find_layers(loss_fn, problem.params, *problem.args, rest)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(rest))
    kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(problem.params, *problem.args, rest)
    assert_close(nnx.to_pure_dict(rest), before, 1e-30)
