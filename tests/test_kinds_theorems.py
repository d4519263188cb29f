"""What the papers prove, on layers with shared positions, and TEKFAC's damping of convolutions, against dense float64."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax import diagnostics

from . import dense_factors as df
from .dense import assert_close, relative_error
from .kind_blocks import DAMPING, Blocks, blocks, fisher, full, one_step
from .kind_cases import CONVOLUTIONS, EMBEDDINGS, LINEAR_MAPS
from .kind_cases_more import case, norm
from .kind_networks import Network
from .methods import quick

PLAIN = {
    **{name: CONVOLUTIONS[name] for name in ("conv1", "feature_groups", "local")},
    "rows": LINEAR_MAPS["positions"],
    "tokens": EMBEDDINGS["repeated"],
    "norm": case(norm, nn.LayerNorm, (3, 4), -1),
}


FACTORIZATIONS = {
    "kfac": kfe.factors.kfac(),
    "tkfac": kfe.factors.tkfac(pairing="example"),
    "kpsvd": kfe.factors.kpsvd(tolerance=1e-12, max_iterations=2000),
    "deflation": kfe.factors.deflation(tolerance=1e-12, max_iterations=2000),
    "lanczos": kfe.factors.lanczos(tolerance=1e-12),
    "kfac_corrected": kfe.factors.kfac_corrected(tolerance=1e-12, max_iterations=2000),
}
THEOREMS = ("conv1", "feature_groups", "rows")


def estimated(network, name):
    """{factors: terms of the layer} and {factors: errors} by `kfe.diagnostics`."""
    _, taps = network.taps("exact")

    @jax.jit
    def run(taps):
        terms = {
            method: kfe.factors.estimate(made, taps, (name,))[name] for method, made in FACTORIZATIONS.items()
        }
        return terms, {method: diagnostics.kronecker_error(taps[name], own) for method, own in terms.items()}

    return run(taps)


@pytest.mark.slow
@pytest.mark.parametrize("name", quick("feature_groups", of=THEOREMS))
def test_factorizations(name, x64):
    """Each is what it is of F, blocks by themselves: the closer ones are closer, TKFAC keeps the trace."""
    # By itself: every product with F runs all of a network again.
    network = Network({name: PLAIN[name]})
    layer, rows = network.layers[name], network.rows(name, "exact")
    f, rank = blocks(layer, fisher(rows)), len(layer.stack_shape) + 1
    terms, errors = estimated(network, name)
    sides = {
        method: [[blocks(layer, full(side, rank)) for side in term] for term in own]
        for method, own in terms.items()
    }
    errors = {method: blocks(layer, np.asarray(own), rank=0) for method, own in errors.items()}
    for index, own in f.items():
        found = {
            method: df.matrix([(a[index], b[index]) for a, b in pairs]) for method, pairs in sides.items()
        }
        error = {method: relative_error(matrix, own) for method, matrix in found.items()}
        best = [relative_error(df.matrix(df.best_terms(own, *layer.sides, r)), own) for r in (1, 2)]
        assert_close(error["kpsvd"], best[0], 1e-6)
        assert_close([error["deflation"], error["lanczos"]], [best[1]] * 2, 1e-6)
        assert error["lanczos"] < error["kpsvd"] < min(error["kfac"], error["tkfac"])
        assert error["kfac_corrected"] < error["kfac"]
        assert_close(np.trace(found["tkfac"]), np.trace(own), 1e-12)
        assert relative_error(np.trace(found["kfac"]), np.trace(own)) > 1e-3
        assert_close({method: own[index] for method, own in errors.items()}, error, 1e-6)


# TEKFAC in a network with convolutions.


@functools.cache
def tekfac():
    """(network, its blocks, tr F of each layer, a floor above one of them, {damping type: (updates, state)})."""
    network = Network(PLAIN)
    layers = {name: Blocks(network, name) for name in PLAIN}
    traces = {name: sum(np.trace(f) for f in own.f.values()) for name, own in layers.items()}
    convolutions = [name for name, layer in network.layers.items() if layer.kind.name == "conv"]
    assert convolutions == ["conv1", "feature_groups"]
    first, second = (traces[name] for name in convolutions)
    floor = np.sqrt(first * second)
    assert min(first, second) < floor
    options = {"trace_floor": floor, "pairing": "example", "null_threshold": 0.0}
    made = {
        name: kfe.scale_by_tekfac(network.layers, DAMPING, damping_type=name, **options)
        for name in ("trace", "plain")
    }
    return network, layers, traces, floor, one_step(network, made)


@pytest.mark.slow
@pytest.mark.parametrize("damping_type", ["trace", "plain"])
def test_tekfac_with_convolutions(damping_type, x64):
    """λ_l of each convolution, of all its feature groups together, one of them at the floor; β in everything else."""
    network, layers, traces, floor, steps = tekfac()
    updates, state = steps[damping_type]
    tuned = {
        name: max(traces[name], floor) / layer.size
        for name, layer in network.layers.items()
        if layer.kind.name == "conv"
    }
    beta = max(tuned.values())
    for name, own in layers.items():
        basis, scale = own.basis(state.method.basis[name]), blocks(own.layer, state.method.scale[name])
        found = own.matrix(updates)
        assert_close(sum(s.sum() for s in scale.values()), traces[name], 1e-10)
        for index, v in own.v.items():
            u_a, u_g, s = basis[0][index], basis[1][index], scale[index]
            assert_close(s, df.best_diagonal(own.f[index], u_a, u_g), 1e-10)
            denominators = s + DAMPING
            if damping_type == "trace":
                denominators = s + tuned[name] if name in tuned else beta * (s + DAMPING)
            assert_close(found[index], u_a @ ((u_a.T @ v @ u_g) / denominators) @ u_g.T, 1e-10)
