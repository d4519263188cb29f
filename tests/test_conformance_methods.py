"""One suite for every method: what a step does to its state, hard inputs, failed factorizations, checkpoints, wrappers."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import kfe_optax as kfe
from kfe_optax._jax.counts import CYCLE, LAST
from kfe_optax._methods import periods

from .dense import assert_close
from .methods import (
    CASES,
    DAMPING,
    LATER_DAMPING,
    REFRESH,
    Trainer,
    factorized,
    make_problem,
    of_layer,
    quick,
)
from .test_counts import ended


@pytest.fixture(scope="module")
def problem():
    return make_problem()


# Of the methods' variants the plain ones do.
VARIANTS = ("kfac exact", "ekfac qr", "soap with a tolerance", "kronecker of gradient")
PLAIN = [name for name in CASES if name not in VARIANTS]


@pytest.fixture(scope="module", params=quick(*PLAIN, slow=VARIANTS))
def trainer(request, problem):
    """A compiled step of every method in turn; pytest groups the tests by it."""
    return Trainer(request.param, problem)


# One of each way to a basis or a root: the others hold nothing else that a release of JAX may change.
_RELEASED = ("kfac", "ekfac", "lanczos", "kfac_tridiagonal", "two_level_kfac", "spectral_kfac", "soap")
RELEASED = [
    pytest.param(
        *case.values, marks=[*case.marks, pytest.mark.release] if case.values[0] in _RELEASED else case.marks
    )
    for case in quick(*PLAIN, slow=VARIANTS)
]


@pytest.fixture
def good(trainer):
    """A state after two steps."""
    return trainer.step(trainer.first.state, trainer.problem.batch(1)).state


def finite(tree) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


def zero(tree) -> bool:
    return all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(tree))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def described(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype, v.weak_type), tree)


def counts(state) -> tuple[int, int, int]:
    info = kfe.info(state)
    return int(info.failures), int(info.nonfinite), int(info.last_refresh)


def descends(result, name: str) -> bool:
    """Whether the preconditioned gradient of a layer still points uphill, as a positive definite inverse leaves it."""
    pairs = zip(jax.tree.leaves(result.updates[name]), jax.tree.leaves(result.grads[name]), strict=True)
    return sum(np.vdot(*(np.asarray(leaf, np.float64) for leaf in pair)) for pair in pairs) > 0


def aged(state):
    """The state as if a thousand batches were in its averages, whose ρ is then the decay."""
    method = state.method._replace(factors=state.method.factors._replace(updates=jnp.int32(1000)))
    state = state._replace(method=method)
    if hasattr(state, "coarse"):
        state = state._replace(coarse=state.coarse._replace(updates=jnp.int32(1000)))
    return state


def averages(state):
    """All that a state keeps as running averages of curvature."""
    coarse = state.coarse.averages if hasattr(state, "coarse") else ()
    return {"factors": state.method.factors, "scale": getattr(state.method, "scale", {}), "coarse": coarse}


def sizes(tree, name) -> list[float]:
    """The largest entries of a layer's arrays, or of all of them."""
    leaves = jax.tree.leaves(tree) if name is None else of_layer(tree, name)
    return [float(np.abs(np.asarray(leaf, np.float64)).max()) for leaf in leaves]


def same_method(state, other):
    """The curvature is as it was; the damping of a step is reported whatever became of the step."""
    ours, theirs = state.method, other.method
    if hasattr(theirs, "damping"):
        ours = ours._replace(damping=theirs.damping)
    assert_equal((ours, state.rest), (theirs, other.rest))


@pytest.mark.parametrize("trainer", RELEASED, indirect=True)
def test_constant_state_one_trace_donation(trainer):
    """Donated steps with and without refreshes: one trace, the same tree, shapes, dtypes and weak types."""
    params = jax.tree.map(jnp.array, trainer.params)
    state = trainer.tx.init(params)
    start, structure = described(state), jax.tree.structure(state)
    losses = []
    for seed, at in enumerate((0, 1, REFRESH - 1, REFRESH, REFRESH + 1)):
        state = before = state._replace(count=jnp.asarray(at, jnp.int32))
        batch = trainer.problem.batch(seed)
        params, state, updates, _, loss = trainer.jitted(params, state, batch)
        losses.append(float(loss))
        assert described(state) == start
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
        # Scalars that are only written are no arguments of the program, so their buffers are not taken.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim)
        assert counts(state)[2] == {0: 0, REFRESH: REFRESH, REFRESH + 1: REFRESH}.get(at, counts(state)[2])
    assert jax.tree.structure(state) == structure
    assert (trainer.traces, trainer.jitted._cache_size()) == (1, 1)
    assert counts(state)[:2] == (0, 0)
    assert len(set(losses)) == 5 and losses[-1] < losses[0]


@pytest.mark.parametrize("bad", ["examples", "gradient"])
def test_a_batch_with_nan_changes_nothing(trainer, good, bad):
    """The update is zero, the curvature stays, the step is counted; the next step is as if nothing had been."""
    problem = trainer.problem
    spoilt = problem.x.at[0, 0].set(jnp.nan)
    batch = problem.batch(2, x=spoilt) if bad == "examples" else problem.batch(2, scale=jnp.nan)
    result = trainer.step(good, batch, REFRESH)
    assert zero(result.updates)
    same_method(result.state, good)
    assert counts(result.state) == (0, 1, counts(good)[2])
    assert int(result.state.count) == REFRESH + 1
    after, expected = (trainer.step(state, problem.batch(3), REFRESH) for state in (result.state, good))
    assert_equal(after.updates, expected.updates)
    assert_equal(after.state._replace(nonfinite=expected.state.nonfinite), expected.state)


def test_zero_gradient(trainer):
    """No update, no failure, and the step after is an ordinary one."""
    result = trainer.step(trainer.tx.init(trainer.params), trainer.problem.batch(0, scale=0))
    assert zero(result.updates)
    assert finite(result.state)
    after = trainer.step(result.state, trainer.problem.batch(1), REFRESH)
    assert finite((after.updates, after.state))
    assert counts(after.state) == (0, 0, REFRESH)
    assert all(descends(after, name) for name in trainer.problem.layers)


def test_layer_without_gradient_is_left_alone(trainer):
    """A head whose loss has weight zero: its update is its (zero) gradient, not 0/0, and the others do not mind."""
    result = trainer.step(trainer.tx.init(trainer.params), trainer.problem.batch(0, weight=0))
    assert zero((result.updates["head"], result.updates["idle"]))
    assert finite((result.updates, result.state))
    assert counts(result.state)[:2] == (0, 0)
    assert all(descends(result, name) for name in ("dense_0", "dense_1"))
    after = trainer.step(result.state, trainer.problem.batch(1), REFRESH)
    assert all(descends(after, name) for name in trainer.problem.layers)
    assert finite((after.updates, after.state))


def test_overflowing_statistics_are_left_out(trainer, good):
    """Finite gradients with factors beyond float32: the last good factors stay, and the failures are counted."""
    result = trainer.step(good, trainer.problem.batch(2, x=trainer.problem.x * 1e25), REFRESH)
    assert finite(result.grads)
    assert_equal(*(of_layer(state.method.factors, "head") for state in (result.state, good)))
    assert finite((result.updates, result.state))
    failures, nonfinite, refresh = counts(result.state)
    assert (failures > 0, nonfinite, refresh) == (True, 0, REFRESH)
    # Moments that overflowed would be NaN once the basis turns.
    after = trainer.step(result.state, trainer.problem.batch(3), 2 * REFRESH)
    assert finite((after.updates, after.state))
    assert all(descends(after, name) for name in trainer.problem.layers)


@pytest.mark.parametrize("factor", [1e6, 1e18])
def test_a_huge_batch_is_bounded(trainer, good, factor):
    """Finite and out of all proportion: factors, scales and coarse averages grow 1 + 0.05 · 100 times at most, counted."""
    problem = trainer.problem
    old = aged(good)
    result = trainer.step(old, problem.batch(2, x=problem.x * factor), 0)
    assert finite((result.grads, result.updates, averages(result.state)))
    # A scale that restarts from the factors grows once with them and once by itself.
    growth = 36.01 if trainer.case.options.get("on_refresh") == "restart" else 6.001
    for name in problem.layers:
        before, after = (sizes(averages(state), name) for state in (old, result.state))
        assert all(new <= growth * max(before) for new in after)
    failures, nonfinite, refresh = counts(result.state)
    assert failures > counts(good)[0] and (nonfinite, refresh) == (0, 0)
    after, expected = (trainer.step(state, problem.batch(3), 0) for state in (result.state, old))
    assert counts(after.state)[0] == failures and finite((after.updates, after.state))
    if trainer.case.damped:  # the moments of an inner transformation are its own
        for name in problem.layers:
            ours, theirs = (sum(sizes(r.updates[name], None)) for r in (after, expected))
            assert theirs / 40 < ours < 40 * theirs


def test_counts_at_the_end_of_int32(trainer, good):
    """None wraps around: no step refreshes by that, all is ready, and the next refresh comes when it is due."""
    problem = trainer.problem
    end = ended(good)
    result = trainer.step(end, problem.batch(1), LAST)
    expected = trainer.step(good, problem.batch(1), REFRESH + 7)  # as far behind a refresh
    assert_equal(result.updates, expected.updates)
    assert counts(result.state) == (LAST, LAST, LAST)
    assert (int(result.state.count) + CYCLE - 1) == LAST
    due = int(result.state.count) + (-int(result.state.count)) % REFRESH
    after = trainer.step(result.state, problem.batch(2), due)
    assert counts(after.state) == (LAST, LAST, due) and finite((after.updates, after.state))
    assert int(after.state.method.factors.updates) == LAST
    for batch in (problem.batch(2, scale=jnp.nan), problem.batch(2, x=problem.x * 1e25)):
        assert counts(trainer.step(end, batch, due).state)[:2] == (LAST, LAST)


@pytest.mark.parametrize("name", PLAIN)
def test_all_that_is_due_is_due_more_often_in_the_beginning(name, problem, monkeypatch):
    """Every period of a method knows of its first refreshes."""
    asked, due = [], periods.due
    monkeypatch.setattr(periods, "due", lambda *given: asked.append(given[1:]) or due(*given))
    tx = CASES[name].having(initial_refreshes=3, refreshes_per_doubling=5).make(problem.layers)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, problem.layers)

    def step(params, state, batch):
        _, grads, taps = differentiate(params, batch.x, batch.y, batch.weight, key=batch.key)
        return tx.update(grads, state, params, taps=taps)

    jax.eval_shape(step, problem.params, jax.eval_shape(tx.init, problem.params), problem.batch())
    assert len(asked) >= 2 and all(early in ((3, 5), (0, 5)) for _, early in asked)
    assert sum(early == (0, 5) for _, early in asked) <= 1  # EKFAC's scale


@pytest.mark.parametrize("trainer", RELEASED, indirect=True)
def test_a_failed_factorization_keeps_the_last_one(trainer, good):
    """An eigh, QR or Cholesky that yields NaN: root or basis stay, are counted, and the next refresh gets over it."""
    result = trainer.step(good, trainer.problem.batch(2, x=trainer.problem.x * 1e6), REFRESH)
    assert int(result.state.method.factors.failures.sum()) == 0
    assert counts(result.state)[0] > 0 and counts(result.state)[2] == REFRESH
    # The first leaf of a basis holds eigenvalues, the last one what an inverse or a rotation keeps.
    assert_equal(factorized(result.state, "head", 0)[-1], factorized(good, "head", 0)[-1])
    assert finite((result.updates, result.state))
    # Only the factors are still too large.
    healed = result.state._replace(method=result.state.method._replace(factors=good.method.factors))
    after = trainer.step(healed, trainer.problem.batch(3, x=2 * trainer.problem.x), 2 * REFRESH)
    assert counts(after.state) == (counts(result.state)[0], 0, 2 * REFRESH)
    changes = [
        np.abs(a - b).max()
        for a, b in zip(factorized(after.state, "head", 0), factorized(good, "head", 0), strict=True)
    ]
    assert max(changes) > 0
    assert finite((after.updates, after.state))


def test_rank_deficient_factors(trainer):
    """One example eight times, with equal columns: factors of rank one, which are no failure."""
    x = trainer.problem.x
    x = jnp.broadcast_to(x[:1].at[:, 1].set(x[0, 0]), x.shape)
    result = trainer.step(trainer.tx.init(trainer.params), trainer.problem.batch(0, x=x))
    for seed, at in ((1, 1), (2, REFRESH)):
        result = trainer.step(result.state, trainer.problem.batch(seed, x=x), at)
        assert finite((result.updates, result.state))
        assert all(descends(result, name) for name in trainer.problem.layers)
    assert counts(result.state)[:2] == (0, 0)


def test_schedules(trainer, good):
    """λ of the step is in `kfe.info`; with ρ at zero the factors forget what was before."""
    now, later = trainer.first.state, trainer.step(good, trainer.problem.batch(3), REFRESH).state
    if trainer.case.damped:
        assert_close((kfe.info(now).damping, kfe.info(later).damping), (DAMPING, LATER_DAMPING), 1e-6)
    else:
        assert kfe.info(now).damping is None
    other = trainer.step(good, trainer.problem.batch(2, x=2 * trainer.problem.x[::-1]), 0).state

    def difference(at):
        states = [trainer.step(s, trainer.problem.batch(3), at).state for s in (good, other)]
        worst = 0.0
        for name in trainer.problem.layers:
            # The sign of (P, Q) is chosen to agree with the old pair.
            ours, theirs = ([abs(leaf) for leaf in of_layer(s.method.factors, name)] for s in states)
            if not ours:  # the factors of a chain are under the name of its first layer
                continue
            size = max(np.linalg.norm(leaf) for leaf in ours)
            worst = max(worst, *(np.linalg.norm(a - b) / size for a, b in zip(ours, theirs, strict=True)))
        return worst

    assert difference(0) > 0.1
    # KPSVD and its kin start from the old terms, and stop at a tolerance.
    assert difference(REFRESH) < 1e-2


@pytest.mark.parametrize("trainer", quick("kfac", "kpsvd", "two_level_kfac", "soap"), indirect=True)
def test_checkpoints(trainer, good, tmp_path):
    """Through Orbax, and through a plain list of numpy arrays: the same leaves, and the same steps after them."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", good)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(trainer.tx.init, trainer.params)
        orbax = checkpointer.restore(tmp_path / "state", like)
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(good)]
    plain = jax.tree.unflatten(jax.tree.structure(like), leaves)
    expected = trainer.step(good, trainer.problem.batch(4), REFRESH)
    for restored in (orbax, plain):
        assert_equal(restored, good)
        assert jax.tree.map(lambda v: (v.shape, v.dtype), restored) == jax.tree.map(
            lambda v: (v.shape, v.dtype), good
        )
        resumed = trainer.step(restored, trainer.problem.batch(4), REFRESH)
        assert_equal((resumed.updates, resumed.state), (expected.updates, expected.state))


@pytest.mark.parametrize("trainer", quick("kfac", slow=["soap"]), indirect=True)
def test_all_wrappers_at_once(trainer):
    """MultiSteps of chain, apply_if_finite, masked, partition and inject_hyperparams: the bare update, on the second call."""
    problem = trainer.problem
    # A coarse space couples the layers: without the head the others have another correction.
    other = "temperature" if trainer.name == "two_level_kfac" else "head"
    labels = {name: "other" if name == other else "ours" for name in problem.params}
    parts = {"ours": trainer.case.inject(problem.layers), "other": optax.scale(5.0)}
    mask = {**dict.fromkeys(labels, True), "idle": False}
    wrapped = optax.masked(optax.partition(parts, labels), mask)
    wrapped = optax.chain(optax.identity(), optax.apply_if_finite(wrapped, 3), optax.scale(2.0))
    tx = optax.MultiSteps(wrapped, 2)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, problem.layers)
    batch = problem.batch()
    _, grads, taps = differentiate(problem.params, batch.x, batch.y, batch.weight, key=batch.key)
    update = jax.jit(tx.update)
    between, state = update(grads, tx.init(problem.params), problem.params, taps=taps)
    assert zero(between)
    updates, state = update(grads, state, problem.params, taps=taps)
    expected = {
        **trainer.first.updates,
        other: jax.tree.map(lambda g: 5 * g, grads[other]),
        "idle": grads["idle"],
    }
    assert_close(updates, jax.tree.map(lambda leaf: 2 * leaf, expected), 1e-5)
    assert counts(state) == (0, 0, 0)
    if trainer.case.damped:
        assert_close(kfe.info(state).damping, DAMPING, 1e-6)
    assert update._cache_size() == 1


# The others follow their preconditioner with something else than a clip and momentum.
CLIPPED = [n for n, m in kfe.METHODS.items() if "max_kl" in inspect.signature(m.optimizer).parameters]


@pytest.mark.parametrize("trainer", quick("tekfac", slow=["kfac"], of=CLIPPED), indirect=True)
def test_aliases_with_hyperparameters_in_the_state(trainer):
    """The optimizer of a line of the registry steps along its preconditioner; learning rate and λ change in the state."""
    problem = trainer.problem
    method = kfe.METHODS[trainer.name]
    assert method.optimizer.__name__ == trainer.name and getattr(kfe, trainer.name) is method.optimizer
    tx = optax.inject_hyperparams(method.optimizer)(
        0.1,
        problem.layers,
        damping=DAMPING,
        **{**kfe.NATURAL, "max_kl": None, "max_change": None, "refreshes_per_doubling": 0},
        momentum=0.0,
        rest=optax.scale_by_adam(),
        rest_kinds=(),
        **trainer.case.options,
    )
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, problem.layers)
    update = jax.jit(tx.update)

    def step(state, seed):
        batch = problem.batch(seed)
        _, grads, taps = differentiate(problem.params, batch.x, batch.y, batch.weight, key=batch.key)
        return update(grads, state, problem.params, taps=taps)

    first, state = step(tx.init(problem.params), 0)
    assert_close(first, jax.tree.map(lambda u: -0.1 * u, trainer.first.updates), 1e-5)
    for name, value in (("damping", LATER_DAMPING), ("learning_rate", 0.3)):
        state.hyperparams[name] = jnp.full_like(state.hyperparams[name], value)
    ours, *others = state.inner_state
    ours = ours._replace(count=jnp.asarray(REFRESH, jnp.int32))
    # Schedules among the injected have counts of their own.
    schedules = jax.tree.map(lambda n: jnp.full_like(n, REFRESH), state.hyperparams_states)
    second, state = step(state._replace(inner_state=(ours, *others), hyperparams_states=schedules), 1)
    expected = trainer.step(trainer.first.state, problem.batch(1), REFRESH)
    assert_close(second, jax.tree.map(lambda u: -0.3 * u, expected.updates), 1e-5)
    assert update._cache_size() == 1
    assert_close(kfe.info(state).damping, LATER_DAMPING, 1e-6)


@pytest.fixture(scope="module")
def narrow():
    return make_problem(sizes=(3, 1, 2), examples=1)


@pytest.mark.parametrize("name", quick("ekfac", "kfac_tridiagonal"))
def test_one_example_and_a_layer_of_width_one(name, narrow):
    """Two refreshes without jax.jit around the update."""
    tx = CASES[name].make(narrow.layers)
    differentiate = kfe.value_grad_and_taps(narrow.loss_fn, narrow.layers)
    state = tx.init(narrow.params)
    for seed in range(2):
        state = state._replace(count=jnp.zeros((), jnp.int32))
        _, grads, taps = differentiate(narrow.params, *narrow.batch()[:3], key=jax.random.key(seed))
        updates, state = tx.update(grads, state, narrow.params, taps=taps)
        assert finite((updates, state))
    assert jnp.vdot(updates["head"]["kernel"], grads["head"]["kernel"]) > 0
    assert counts(state) == (0, 0, 0)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", quick("ekfac", slow=["soap"]))
def test_half_precision_parameters(name, dtype):
    """Curvature and the moments of the rest are float32, updates have the gradient's dtype; one parameter has none."""
    small = make_problem(dtype=dtype)
    tx = CASES[name].make(small.layers)
    differentiate = kfe.value_grad_and_taps(small.loss_fn, small.layers)
    _, grads, taps = differentiate(small.params, *small.batch()[:3], key=jax.random.key(0))
    state = tx.init(small.params)
    updates, after = tx.update(grads, state, small.params, taps=taps)
    assert described(after) == described(state)
    kept = [leaf.dtype for layer in small.layers for leaf in of_layer(after.method, layer)]
    kept += [leaf.dtype for leaf in jax.tree.leaves(after.rest) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(kept) == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    # Optax's Adam has the rest, whose ε of 1e-8 is zero in float16.
    assert finite(updates) and zero(updates["idle"]) and not zero(updates["temperature"])
    assert counts(after) == (0, 0, 0)
