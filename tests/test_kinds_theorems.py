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

PLAIN = {
    **{name: CONVOLUTIONS[name] for name in ("conv1", "feature_groups", "local")},
    "rows": LINEAR_MAPS["positions"],
    "tokens": EMBEDDINGS["repeated"],
    "norm": case(norm, nn.LayerNorm, (3, 4), -1),
}


@functools.cache
def plain():
    return Network(PLAIN)


FACTORIZATIONS = {
    "kfac": kfe.factors.kfac(),
    "tkfac": kfe.factors.tkfac(pairing="example"),
    "kpsvd": kfe.factors.kpsvd(tolerance=1e-12, max_iterations=2000),
    "deflation": kfe.factors.deflation(tolerance=1e-12, max_iterations=2000),
    "lanczos": kfe.factors.lanczos(tolerance=1e-12),
    "kfac_corrected": kfe.factors.kfac_corrected(tolerance=1e-12, max_iterations=2000),
}
THEOREMS = ("conv1", "feature_groups", "rows")


@functools.cache
def estimated():
    """{factors: {layer: terms}} and {layer: {factors: error}} by `kfe.diagnostics`."""
    network = plain()
    _, taps = network.taps("exact")

    @jax.jit
    def run(taps):
        terms = {name: kfe.factors.estimate(made, taps, THEOREMS) for name, made in FACTORIZATIONS.items()}
        errors = {
            name: diagnostics.kronecker_error(taps["conv1"], own["conv1"]) for name, own in terms.items()
        }
        return terms, errors

    return run(taps)


@pytest.mark.slow
@pytest.mark.parametrize("name", THEOREMS)
def test_factorizations(name, x64):
    """Each is what it is of F, blocks by themselves: the closer ones are closer, TKFAC keeps the trace."""
    network = plain()
    layer, rows = network.layers[name], network.rows(name, "exact")
    f, rank = blocks(layer, fisher(rows)), len(layer.stack_shape) + 1
    terms, errors = estimated()
    sides = {
        method: [[blocks(layer, full(side, rank)) for side in term] for term in own[name]]
        for method, own in terms.items()
    }
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
        if name == "conv1":
            assert_close(jax.tree.map(float, errors), error, 1e-6)


# TEKFAC in a network with convolutions.


@pytest.mark.slow
@pytest.mark.parametrize("damping_type", ["trace", "plain"])
def test_tekfac_with_convolutions(damping_type, x64):
    """λ_l of each convolution, of all its feature groups together, one of them at the floor; β in everything else."""
    network = plain()
    layers = {name: Blocks(network, name) for name in PLAIN}
    traces = {name: sum(np.trace(f) for f in own.f.values()) for name, own in layers.items()}
    convolutions = [name for name, layer in network.layers.items() if layer.kind.name == "conv"]
    assert convolutions == ["conv1", "feature_groups"]
    first, second = (traces[name] for name in convolutions)
    floor = np.sqrt(first * second)
    options = {
        "trace_floor": floor,
        "pairing": "example",
        "null_threshold": 0.0,
        "damping_type": damping_type,
    }
    updates, state = one_step(network, {"it": kfe.scale_by_tekfac(network.layers, DAMPING, **options)})["it"]
    tuned = {name: max(traces[name], floor) / network.layers[name].size for name in convolutions}
    assert min(first, second) < floor
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
