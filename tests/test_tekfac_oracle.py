"""TEKFAC against a dense float64 loop, and its damping as a pure function."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax._layers.kinds.dense import Dense
from kfe_optax._linalg import damping as damping_lib

from . import dense_factors as df
from . import factor_rows as fr
from . import given_factors as gf
from .dense import assert_close, relative_error
from .dense_optimizers import due

DECAY, FLOOR = 0.6, 150.0
PERIODS = {"factor_update_period": 1, "basis_update_period": 2, "scale_update_period": 3}


class Tekfac:
    """One layer, densely."""

    def __init__(self, pairing):
        self.pairing, self.average = pairing, df.TkfacAverage(DECAY)
        self.basis = self.theta = None

    def step(self, step, a, g):
        """Rows of the batch in; Θ, U_Φ, U_Ψ of this step out."""
        f = df.fisher_of_rows(a, g)
        if due(step, PERIODS["factor_update_period"], 1):
            self.average.add(*df.tkfac(a, g, self.pairing))
        if due(step, PERIODS["basis_update_period"], 1):
            _, phi, psi = self.average.value
            new = np.linalg.eigh(phi)[1], np.linalg.eigh(psi)[1]
            if self.basis is not None:
                turned = [(n.T @ o) ** 2 for o, n in zip(self.basis, new, strict=True)]
                self.theta = turned[0] @ self.theta @ turned[1].T
            self.basis = new
        if due(step, PERIODS["scale_update_period"], 1):
            best = df.best_diagonal(f, *self.basis)
            self.theta = best if self.theta is None else DECAY * self.theta + (1 - DECAY) * best
        return self.theta, *self.basis


@pytest.mark.parametrize(
    ("pairing", "damping_type", "convolutions"),
    [("example", "plain", False), ("position", "trace", False), ("example", "trace", True)],
)
def test_dense_loop(pairing, damping_type, convolutions, x64, monkeypatch):
    """Θ and bases of six steps with all periods different; trace-tuned damping is plain without convolutions."""
    monkeypatch.setattr(Dense, "convolution", convolutions)
    layers = fr.layers()
    differentiate = kfe.value_grad_and_taps(fr.loss_fn, layers, fisher="empirical")
    names = [name for name in fr.SHAPES if pairing == "example" or name != "twice"]
    schedule = lambda step: 0.3 / (1 + step)
    tx = kfe.scale_by_tekfac(
        layers,
        schedule,
        damping_type=damping_type,
        trace_floor=FLOOR,
        decay=DECAY,
        pairing=pairing,
        null_threshold=0.0,
        **PERIODS,
    )
    params = {name: fr.parameters()[name] for name in names}

    @jax.jit
    def update(state, rows, gradients):
        taps = differentiate(fr.parameters(), rows)[2]
        return tx.update(gradients, state, params, taps=taps)

    state, references, floored = tx.init(params), {}, set()
    generator = np.random.default_rng(0)
    for step in range(6):
        rows = fr.random_rows(step)
        gradients = {name: own for name, own in gf.random_gradients(generator).items() if name in names}
        new, state = update(state, rows, gradients)
        for name in names:
            stacked = fr.SHAPES[name][0]
            for i in range(stacked or 1):
                pick = (lambda v, i=i: np.asarray(v)[i]) if stacked else np.asarray
                a, g = (pick(v) for v in rows[name])
                reference = references.setdefault((name, i), Tekfac(pairing))
                theta, u_in, u_out = reference.step(step, a, g)
                assert_close(pick(state.method.scale[name]).sum(), theta.sum())
                (divisor,) = df.tekfac_denominators(
                    [theta], schedule(step), [convolutions], convolutions, FLOOR
                )
                floored.add(bool(theta.sum() < FLOOR))
                v = pick(gradients[name]["kernel"])
                expected = u_in @ ((u_in.T @ v @ u_out) / divisor) @ u_out.T
                assert_close(pick(new[name]["kernel"]), expected)
    assert not convolutions or floored == {True, False}


@pytest.mark.parametrize("trace_tuned", [True, False])
def test_trace_tuned_damping(trace_tuned, x64):
    """Two convolutions, one of them a stack of two, and two fully connected layers; ϑ above one trace and below the others."""
    generator = np.random.default_rng(0)
    convolution = {"c": trace_tuned, "d": False, "cc": trace_tuned, "e": False}
    shapes = {"c": (4, 3), "d": (3, 2), "cc": (2, 2, 3), "e": (5, 1)}
    scales = {name: generator.uniform(size=shape) for name, shape in shapes.items()}
    scales["cc"] *= np.array([5, 0.01])[:, None, None]
    floor, damping = 0.5, 0.2
    found = damping_lib.trace_tuned(
        {name: jnp.asarray(scale) for name, scale in scales.items()},
        {
            name: types.SimpleNamespace(kind=types.SimpleNamespace(convolution=c), stacked=shapes[name][:-2])
            for name, c in convolution.items()
        },
        jnp.asarray(damping),
        floor,
    )
    thetas = [scales["c"], scales["d"], *scales["cc"], scales["e"]]
    assert [bool(theta.sum() < floor) for theta in thetas].count(True) == 1
    conv = [True, False, True, True, False]
    c, d, first, second, e = df.tekfac_denominators(thetas, damping, conv, trace_tuned, floor)
    assert_close(found, {"c": c, "d": d, "cc": np.stack([first, second]), "e": e}, 1e-14)
    assert first.max() > c.max() > second.max()  # β is that of one layer of the stack
    plain = df.tekfac_denominators(thetas, damping, conv)
    assert (relative_error(c, plain[0]) > 1e-2) == trace_tuned
