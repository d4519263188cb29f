"""An update is judged by the next batch, too: bad data are no bad step, and small batches do not lead astray."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax.transforms.looking_back import MEMORY, Seen, to_blame

NAN, INF = float("nan"), float("inf")


def blame(before, there, *, expected=0.4, moved=True, loss=1.0, spread=0.1, last=1.0, bad=None, l2=None):
    """Of h(θ) at θ = 3 and h(2) before the update 1."""
    params = {"w": jnp.array(3.0)}
    bad = not np.isfinite(before) if bad is None else bad

    def loss_at(p):
        return jnp.where(p["w"] == 3.0 - last, there, jnp.nan)

    return bool(
        to_blame(
            {"w": jnp.array(last)},
            jnp.array(moved),
            expected,
            Seen(jnp.array(loss), jnp.array(spread)),
            jnp.array(before),
            jnp.array(bad),
            params,
            loss_at,
            l2,
        )
    )


@pytest.mark.parametrize("before", [NAN, INF, -INF])
def test_data_or_step(before):
    """A loss that is no number is the step's doing where the batch had one before it."""
    assert blame(before, 1.0)
    assert not blame(before, NAN) and not blame(before, INF)
    assert not blame(before, 1.0, moved=False) and not blame(before, 1.0, last=0.0)
    # Of a chain the foretold change is not known, which matters for finite losses alone.
    assert blame(before, 1.0, expected=INF)


def test_a_gradient_that_is_no_number():
    assert blame(1.0, 1.0, bad=True)
    assert not blame(1.0, NAN, bad=True)


def test_a_clear_rise():
    """h(θ) − h(θ − δ₀) > |M|/4 + s/10; asked only where the loss has risen by as much."""
    assert blame(2.0, 1.88)
    assert not blame(2.0, 1.9)
    assert not blame(1.1, 0.0)
    assert not blame(2.0, 1.0, expected=INF) and not blame(2.0, 1.0, moved=False)
    # Before the first batch nothing is known.
    assert not blame(2.0, 1.0, loss=NAN)
    # ½η(θ² − (θ − δ)²) = 2.5 η belongs to the rise.
    assert blame(2.0, 1.95, l2=0.1) and not blame(2.0, 1.95)


def test_usual_changes():
    seen = Seen(jnp.array(NAN), jnp.array(0.0))
    for loss, counts in ((2.0, True), (3.0, True), (50.0, False), (2.5, True)):
        seen = seen.joined(jnp.array(loss), jnp.array(counts))
    assert float(seen.loss) == 2.5
    assert float(seen.spread) == pytest.approx(MEMORY * (1 - MEMORY) * 1.0 + (1 - MEMORY) * 0.5)


def test_small_batches_do_not_diverge():
    """Batches of 8, whose own losses let λ fall without end: what the next batch sees as a clear rise is undone."""
    generator = np.random.default_rng(0)
    centers, labels = generator.normal(size=(4, 16)), generator.integers(0, 4, 512)
    x, y = (
        jnp.asarray(centers[labels] + 1.5 * generator.normal(size=(512, 16)), jnp.float32),
        jnp.asarray(labels),
    )

    def loss_fn(params, x, y):
        hidden = jax.nn.relu(kfe.tag_dense(x, x @ params[0]["kernel"], params[0]))
        logits = kfe.tag_dense(hidden, hidden @ params[1]["kernel"], params[1])
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = [
        {"kernel": jnp.asarray(generator.normal(size=shape) / 4, jnp.float32)}
        for shape in ((16, 16), (16, 4))
    ]
    layers = kfe.find_layers(loss_fn, params, x[:8], y[:8])
    tx = kfe.kfac_adaptive(layers)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True)

    @jax.jit
    def step(carry, given):
        params, state = carry
        chosen, key = given
        loss, grads, taps = differentiate(params, x[chosen], y[chosen], key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return (optax.apply_updates(params, updates), state), loss

    chosen = jnp.asarray(np.stack([generator.permutation(512)[:8] for _ in range(800)]))
    keys = jax.random.split(jax.random.key(0), len(chosen))
    (params, state), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, (chosen, keys)))(
        (params, tx.init(params))
    )
    assert losses.max() < 10 and float(loss_fn(params, x, y)) < 0.3
    assert 0 < kfe.info(state).rejected < 80 and kfe.info(state).damping < 100
