"""No global state survives a call: threads do not see each other's tags."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax._statistics import tags

from . import problems
from .dense import assert_close

pytestmark = pytest.mark.release


def test_two_threads_trace_at_once():
    """Two threads inside their traces at the same time: each gets its own taps, a third sees plain layers."""
    barrier = threading.Barrier(3, timeout=60)
    results, errors = {}, []
    found = {kind: problems.make("nnx", kind, seed=seed) for seed, kind in enumerate(("gaussian", "softmax"))}
    found_layers = {kind: problem.layers() for kind, problem in found.items()}
    outside = problems.NnxNet(found["gaussian"].weights)

    def work(kind):
        problem, meetings = found[kind], []

        def loss_fn(model, x, y):
            if not meetings and tags.listener() is not None:
                meetings.append(1)
                barrier.wait()  # both listen
                barrier.wait()  # and the onlooker has called it
            return problem.loss_fn(model, x, y)

        try:
            differentiate = kfe.value_grad_and_taps(loss_fn, found_layers[kind], fisher="exact")
            loss, _, taps = differentiate(problem.params, *problem.args)
            results[kind] = loss, {name: taps[name].covariances() for name in taps}
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(kind,)) for kind in found]
    for thread in threads:
        thread.start()
    barrier.wait()
    seen = outside(found["gaussian"].args[0])
    barrier.wait()
    for thread in threads:
        thread.join()
    assert not errors
    assert_close(seen, problems.NnxNet(found["gaussian"].weights)(found["gaussian"].args[0]), 1e-6)
    for kind, problem in found.items():
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, found_layers[kind], fisher="exact")
        loss, _, taps = differentiate(problem.params, *problem.args)
        assert_close(results[kind], (loss, {name: taps[name].covariances() for name in taps}), 1e-6)


def test_nothing_listens_after_an_exception():
    """And the next call works."""
    problem = problems.make("nnx")
    layers = problem.layers()

    def broken(model, x, y):
        model(x)
        raise RuntimeError("the user's own error")

    for call in (
        lambda: kfe.find_layers(broken, problem.params, *problem.args),
        lambda: kfe.value_grad_and_taps(broken, layers, fisher="exact")(problem.params, *problem.args),
    ):
        with pytest.raises(RuntimeError, match="the user's own error"):
            call()
        assert tags.listener() is None
    assert problem.layers() == layers


def test_no_tags_outside():
    """Neither the user's model nor its inner jit keeps anything of a tagged call."""
    problem = problems.make("nnx")
    inner = jax.jit(lambda x: problem.params(x))
    x = problem.args[0]
    before = jax.make_jaxpr(inner)(x)
    layers = problem.layers()
    kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(problem.params, *problem.args)
    assert str(jax.make_jaxpr(inner)(x)) == str(before)
    assert "kfe" not in str(before)
    assert not [name for layer in problem.params.dense for name in vars(layer) if name.startswith("kfe")]
    np.testing.assert_array_equal(inner(x), jax.jit(problems.NnxNet(problem.weights))(x))
    assert jnp.issubdtype(x.dtype, jnp.floating)
