"""An estimate out of all proportion to the running one weighs less: the numbers of it, and what it does to a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax.factors import base
from kfe_optax.factors.base import EXCESS, Term
from kfe_optax.factors.chained import ChainFactors

from . import factor_rows as fr
from .dense import assert_close

RHO = 0.9
average = jax.jit(base.average, static_argnums=3)


def gram(seed, d, size=1.0):
    rows = np.random.default_rng(seed).normal(size=(2 * d, d))
    return jnp.asarray(size * rows.T @ rows / len(rows))


def largest(matrix):
    return float(jnp.abs(matrix).max())


def mixed(old, new, p):
    """The average with the weights of an estimate that is p > EXCESS times as large."""
    weight = (1 - RHO) * EXCESS / p
    return jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, old, new)


@pytest.mark.parametrize("size", [1.5, 1e4, 1e18, 1e300])
@pytest.mark.parametrize("side", [0, 1])
def test_the_weight_of_a_huge_estimate(x64, side, size):
    """(1 − ρ) EXCESS / p for both sides, p of the side that is out of proportion; below EXCESS the plain average."""
    old, new = Term(gram(0, 3), gram(1, 2)), [gram(2, 3), gram(3, 2)]
    new[side] = size * new[side]
    new = Term(*new)
    (result,), failures = (lambda found: (found[0].values(), found[1]))(
        average({"layer": old}, {"layer": new}, jnp.float64(RHO))
    )
    p = largest(new[side]) / largest(old[side])
    expected = mixed(old, new, p if p > EXCESS else EXCESS)
    assert_close(result, expected, 1e-12)
    assert int(failures.sum()) == (p > EXCESS)
    growth = largest(result[side]) / largest(old[side])
    assert growth <= 1 + (1 - RHO) * EXCESS


def test_what_no_past_can_judge(x64):
    """A first estimate, ρ = 0 and a side that was zero count in full; what is not finite is left out."""
    zero, old = Term(jnp.zeros((3, 3)), jnp.zeros((2, 2))), Term(gram(0, 3), gram(1, 2))
    huge = Term(gram(2, 3, 1e20), gram(3, 2, 1e20))
    rho = jnp.float64(RHO)
    for before, weight in ((zero, rho), (old, 0 * rho)):
        result, failures = average({"": before}, {"": huge}, weight)
        assert_close(result[""], huge, 1e-15)
        assert int(failures.sum()) == 0
    half = Term(old.input, zero.output)
    result, failures = average({"": half}, {"": Term(old.input, huge.output)}, rho)
    assert_close(result[""], Term(old.input, (1 - RHO) * huge.output), 1e-12)
    assert int(failures.sum()) == 0
    result, failures = average({"": old}, {"": Term(huge.input * jnp.inf, huge.output)}, rho)
    assert_close(result[""], old, 1e-15)
    assert int(failures.sum()) == 1


def test_a_rise_that_lasts_is_followed(x64):
    """From 1e-9 to 1: each update lets the average grow 1 + (1 − ρ) EXCESS times, until nothing is out of proportion."""
    mean, new = {"": gram(0, 3, 1e-9)}, {"": gram(1, 3)}
    excessive = 0
    while excessive < 20:
        mean, failures = average(mean, new, jnp.float64(RHO))
        if not failures.any():
            break
        excessive += 1
    assert excessive == int(np.ceil(np.log(1e9 / EXCESS) / np.log(1 + (1 - RHO) * EXCESS)))
    for _ in range(60):
        mean, failures = average(mean, new, jnp.float64(RHO))
    assert_close(mean, new, 1e-2)


def test_second_terms_and_neighbors_do_not_judge(x64):
    """P⊗Q may be near zero in one batch; the joint factors of a chain stay positive semi-definite with their weights."""
    first = Term(gram(0, 3), gram(1, 2))
    old = (first, jax.tree.map(lambda side: 1e-9 * side, first))
    result, failures = average({"": old}, {"": (first, first)}, jnp.float64(RHO), lambda e: e[0])
    assert_close(result[""][1].input, (1 - RHO) * first.input, 1e-7)
    assert int(failures.sum()) == 0

    def chain(seed, size):
        joint = [gram(seed + side, 5) for side in (0, 1)]
        joint[0] = (
            jnp.diag(jnp.array([size] * 3 + [1.0] * 2))
            @ joint[0]
            @ jnp.diag(jnp.array([size] * 3 + [1.0] * 2))
        )
        blocks = [((j[:3, :3], j[3:, 3:]), (j[:3, 3:],)) for j in joint]
        return ChainFactors(blocks[0][0], blocks[1][0], blocks[0][1], blocks[1][1])

    old, new = chain(0, 1.0), chain(2, 1e9)
    result, failures = average({"": old}, {"": new}, jnp.float64(RHO), lambda c: (c.input, c.output))
    p = largest(new.input[0]) / largest(old.input[0])
    assert_close(result[""], mixed(old, new, p), 1e-12)
    assert int(failures.sum()) == 1
    own = result[""]
    joint = np.block([[own.input[0], own.input_next[0]], [own.input_next[0].T, own.input[1]]])
    assert np.linalg.eigvalsh(joint).min() > 0


def test_streaming_terms(x64):
    """The batch is in the operator with its bounded weight: seen from the last S it grows 1 + (1 − ρ) EXCESS times."""
    layers, factors = (
        {name: fr.layers()[name] for name in ("positions", "stack")},
        kfe.factors.streaming(1, RHO),
    )
    differentiate = kfe.value_grad_and_taps(fr.loss_fn, fr.layers(), fisher="empirical")

    @jax.jit
    def update(state, rows):
        _, _, taps = differentiate(fr.parameters(), rows)
        return factors.update(state, base.Source(fr.layers(), taps.pulled(), {}), jnp.int32(0))

    state = factors.init(list(layers.values()), fr.WHOLE)
    for seed in range(12):  # until ρ is the decay
        state = update(state, fr.random_rows(seed))
    assert int(state.failures.sum()) == 0
    for size in (1e3, 1e9):
        huge = jax.tree.map(lambda v, size=size: size * v, fr.random_rows(12))
        after = update(state, huge)
        assert int(after.failures.sum()) == len(layers)
        for name, (old,) in state.terms.items():
            (new,) = after.terms[name]
            before, grown = (np.sqrt(jnp.sum(t.input**2) * jnp.sum(t.output**2)) for t in (old, new))
            assert 2 * before < grown < 5 * (1 + (1 - RHO) * EXCESS) * before


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [("kfac", {}, 80), ("ekfac", {"scale": "running"}, 80), pytest.param("ekfac", {}, 240, id="ekfac")],
)
def test_one_huge_batch_in_a_run(name, options, steps):
    """x·1e18 and images of 0..255 among images of 0..1: the run trains as without them.

    A scale of EKFAC's that is measured every 10 steps forgets a batch ten times as slowly.
    """
    generator = np.random.default_rng(0)
    centers, labels = generator.normal(size=(4, 16)), generator.integers(0, 4, 512)
    x, y = jnp.asarray(centers[labels] + generator.normal(size=(512, 16)), jnp.float32), jnp.asarray(labels)

    def loss_fn(params, x, y):
        hidden = jnp.tanh(kfe.tag_dense(x, x @ params[0]["kernel"], params[0]))
        logits = kfe.tag_dense(hidden, hidden @ params[1]["kernel"], params[1])
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    start = [
        {"kernel": jnp.asarray(generator.normal(size=shape) / 4, jnp.float32)} for shape in ((16, 8), (8, 4))
    ]
    layers = kfe.find_layers(loss_fn, start, x[:32], y[:32])
    # Of estimates alone: a bound on the steps keeps a run that is led astray from coming back at once.
    tx = getattr(kfe, name)(0.1, layers, 1e-2, **{**kfe.NATURAL, "max_change": None}, **options)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)

    @jax.jit
    def step(params, state, x, y, key):
        _, grads, taps = differentiate(params, x, y, key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    def run(factor):
        params, state, draws = start, tx.init(start), np.random.default_rng(1)
        for i in range(steps):
            chosen = draws.permutation(512)[:32]
            params, state = step(
                params, state, x[chosen] * (factor if i == 20 else 1), y[chosen], jax.random.key(i)
            )
        return float(loss_fn(params, x, y)), int(kfe.info(state).failures)

    # From batches of 32 a run ends anywhere between 0.01 and 0.1; unbounded estimates of EKFAC's end at 0.27.
    enough = float(loss_fn(start, x, y)) / 10
    clean, none = run(1.0)
    assert clean < enough and none == 0
    for factor in (255.0, 1e6, 1e18):
        loss, failures = run(factor)
        assert loss < enough and failures > 0, (factor, loss, clean)
