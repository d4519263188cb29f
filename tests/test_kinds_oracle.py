"""Every kind of layer against its definition in float64: the law of rows, factors, second moments, contractions, traces."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from . import kind_cases, kind_cases_more
from .dense import assert_close, relative_error
from .kind_networks import N, Network, expected_answers

GROUPS = {
    "convolutions": kind_cases.CONVOLUTIONS,
    "linear maps": kind_cases.LINEAR_MAPS,
    "embeddings": kind_cases.EMBEDDINGS,
    "norms": kind_cases_more.NORMS,
    "shared": kind_cases_more.SHARED,
    "stacked": kind_cases_more.STACKED,
    "masked": kind_cases_more.MASKED,
}
# One of each way in which rows are formed; the long tail is nightly.
QUICK = {
    "convolutions": "conv2 circular asymmetric batches feature_groups depthwise transposed_flipped local groups sua "
    "sua_uncentered reduce",
    "linear maps": "positions first_axes axes_in_another_order paired_axis queries projection einsum_awkward_blocks reduce",
    "embeddings": "one_token repeated reduce",
    "norms": "batch_train layer axes_in_another_order separate_axes scale_only zero_scale flattened called_twice",
    "shared": "conv groups sua_uncentered conv_reduce flattened projection blocks_reduce recurrent tokens tokens_reduce",
    "stacked": "conv axes tokens layer_norm twice_reduce",
    "masked": "positions prefix pooled flattened conv_stride tokens reduce dense_twice "
    "dense_alike_reduce tokens_twice tokens_twice_reduce all_dead",
}
# Of whom everything is asked; in the nightly tests of all.
THOROUGH = {
    "convolutions": "conv2 feature_groups depthwise local groups",
    "linear maps": "positions projection einsum_awkward_blocks",
    "embeddings": "one_token repeated",
    "norms": "layer scale_only",
    "shared": "conv recurrent tokens",
    "stacked": "conv tokens",
    "masked": "positions tokens",
}
# In pieces of two examples and a rest, without waiting for the nightly test of all.
PIECES = {
    "feature_groups": kind_cases.CONVOLUTIONS["feature_groups"],
    "sua_uncentered": kind_cases.CONVOLUTIONS["sua_uncentered"],
    "projection": kind_cases.LINEAR_MAPS["projection"],
    "tokens": kind_cases.EMBEDDINGS["repeated"],
    "masked": kind_cases_more.MASKED["conv_stride"],
    "twice": kind_cases_more.SHARED["conv_reduce"],
}


@functools.lru_cache(maxsize=1)
def network(group, part):
    """The layers of a group: the "quick" ones, the "rest", all in "pieces", or the few of `PIECES`."""
    if group == "few":
        return Network(PIECES, PIECES, 2)
    cases = GROUPS[group]
    if part == "pieces":
        return Network(cases, cases, 2)
    cases = {
        name: make for name, make in cases.items() if (name in QUICK[group].split()) == (part == "quick")
    }
    return Network(cases, THOROUGH[group].split() if part == "quick" else cases)


def every(part):
    """(group, name) of the layers of one part."""
    for group, cases in GROUPS.items():
        for name in cases:
            if part == "pieces" or (name in QUICK[group].split()) == (part == "quick"):
                yield group, name


@pytest.mark.parametrize(
    ("part", "group", "name"),
    [
        *(
            pytest.param(
                "quick", *case, marks=pytest.mark.slow if case[0] in ("linear maps", "masked") else []
            )
            for case in every("quick")
        ),
        *(pytest.param("rest", *case, marks=pytest.mark.nightly) for case in every("rest")),
    ],
)
def test_definition(part, group, name, x64):
    """The law of rows, G of all columns of the Fisher at the outputs, and everything that an empirical tap answers."""
    net = network(group, part)
    check_law(net, name)
    # J and H in closed form; A is the same as that of the empirical tap.
    assert_close(net.exact[name], expected_answers(net, name, "exact")["G"], 1e-11)
    check_answers(net, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name"),
    [
        *(("few", name) for name in PIECES),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in every("pieces")),
    ],
)
def test_in_pieces(group, name, x64):
    """The same from pieces of two examples and a rest."""
    assert N % 2
    check_answers(network(group, "pieces"), name)


def check_law(net, name):
    """Σ_t ā gᵀ of each example is its own gradient, by the loops and by plain differentiation; their mean is the gradient."""
    layer, gradients = net.layers[name], net.empirical[0]
    # (*blocks, 1, n, ...) → (n, *blocks, ...)
    expected = np.moveaxis(net.rows(name, "empirical").gradients()[..., 0, :, :, :], -3, 0)
    if net.branches[name].plain:
        assert_close(net.example_gradients[name], expected, 1e-11)
        assert_close(gradients[name], expected.mean(0), 1e-11)
    assert_close(net.round_trip[name], {path: net.params[name][path[-1]] for _, path in layer.paths}, 1e-15)


def check_answers(net, name):
    """Rows, example gradients, factors, second moments, contractions and traces."""
    expected = expected_answers(net, name, "empirical")
    for question, answer in net.empirical[1][name].items():
        errors = jax.tree.leaves(jax.tree.map(relative_error, answer, expected[question]))
        assert max(errors) < 1e-11, question
