"""What devices exchange in a compiled step: the gradient always, the curvature's sums on a refresh, examples never.

Read from the program that XLA compiles (see `hlo`), for `pmap`, sharded `jit` and `shard_map`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kfe_optax as kfe
from kfe_optax._jax import chunks

from . import hlo, problems

pytestmark = pytest.mark.release

DEVICES = 2
# Fourteen examples a device, and no other size of the problem is a multiple of seven.
SIZES, EXAMPLES = (5, 4, 3), 14 * DEVICES
MODES = ("pmap", "jit", "shard_map")

METHODS: dict[str, Callable[[kfe.Layers], optax.GradientTransformation]] = {
    "kfac": lambda layers: kfe.scale_by_kfac(layers, 0.1),
    "ekfac running": lambda layers: kfe.scale_by_ekfac(layers, 0.1, scale_update_period=5),
    "ekfac batch": lambda layers: kfe.scale_by_ekfac(layers, 0.1, scale="batch", scale_update_period=5),
    "kpsvd": lambda layers: kfe.scale_by_kpsvd(layers, 0.1),
    "two_level": lambda layers: kfe.scale_by_two_level_kfac(layers, 0.1),
    "tridiagonal": lambda layers: kfe.scale_by_block_tridiagonal(layers, 0.1),
}

FACTORS = [(6, 6), (5, 5), (4, 4), (3, 3)]
# What one all-reduce each carries in a refresh; the power method has others, in its iterations.
REFRESH: dict[str, list[list[tuple[int, ...]]]] = {
    "kfac": [FACTORS],
    "ekfac running": [FACTORS],
    "ekfac batch": [FACTORS, [(6, 4), (5, 3)]],
    "two_level": [FACTORS, [(2, 2), (2, 2)]],
    "tridiagonal": [[*FACTORS, (6, 5), (4, 3)]],
}


@functools.cache
def collectives(method: str, mode: str) -> list[hlo.Collective]:
    """Those of a whole training step."""
    problem = problems.make("linen", sizes=SIZES, examples=EXAMPLES)
    layers, axis = problem.layers(), None if mode == "jit" else "data"
    tx = METHODS[method](layers)
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, axis_name=axis)

    def step(params, state, x, y, key):
        loss, grads, taps = differentiate(params, x, y, key=key)
        if axis is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    params, (x, y), key = problem.params, problem.args, jax.random.key(0)
    state, devices = tx.init(params), jax.devices()[:DEVICES]
    if mode == "pmap":
        x, y = (v.reshape(DEVICES, -1, *v.shape[1:]) for v in (x, y))
        mapped = jax.pmap(step, axis, in_axes=(None, None, 0, 0, None), devices=devices)
        return hlo.collectives(mapped.lower(params, state, x, y, key).compile())
    mesh = Mesh(np.array(devices), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")
    if mode == "jit":
        params, state = jax.device_put((params, state), NamedSharding(mesh, whole))
        x, y = jax.device_put((x, y), NamedSharding(mesh, split))
    else:
        specs = (whole, whole, split, split, whole)
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=whole)
    # The power method must know that there is a mesh: on one device it works on examples instead of factors.
    with jax.set_mesh(mesh) if mode == "jit" else contextlib.nullcontext():
        return hlo.collectives(jax.jit(step).lower(params, state, x, y, key).compile())


def counted(shapes) -> Counter:
    """Shapes with their sides in order: XLA may transpose what it sums."""
    return Counter(tuple(sorted(shape)) for shape in shapes)


def has_examples(collective: hlo.Collective) -> bool:
    return any(size and size % 7 == 0 for shape in collective.shapes for size in shape)


# The compilations that stand for the others in a quick run.
QUICK = {("kfac", "shard_map"), ("ekfac running", "pmap"), ("ekfac batch", "jit")}
SLOW = {
    ("kpsvd", "shard_map"),
    ("two_level", "jit"),
    ("tridiagonal", "pmap"),
}


def cases(methods):
    pairs = [(method, mode) for method in methods for mode in MODES]
    tiers = dict.fromkeys(SLOW, pytest.mark.slow)
    return [
        pytest.param(*pair, marks=[] if pair in QUICK else tiers.get(pair, pytest.mark.nightly))
        for pair in pairs
    ]


@pytest.mark.parametrize(("method", "mode"), cases(METHODS))
def test_every_step_exchanges_the_gradient_alone(method, mode):
    """Outside the branches of conditionals: one all-reduce of the gradient and the loss."""
    always = [c for c in collectives(method, mode) if not c.conditional]
    (only,) = always
    assert only.kind == "all-reduce"
    kernels = [(5, 4), (4, 3)]
    assert counted(only.operands) == counted([*kernels, (4,), (3,), ()])


@pytest.mark.parametrize(("method", "mode"), cases(REFRESH))
def test_a_refresh_reduces_everything_at_once(method, mode):
    """The factors of all layers in one all-reduce, cross-covariances with them; scales and coarse sums in one of their own."""
    refresh = [c for c in collectives(method, mode) if c.conditional]
    # N of the gradient's second moment: the loss's weights, two numbers.
    weights = [c for c in refresh if not any(c.operands)]
    carried = sum(len(c.operands) for c in weights)
    # JAX 0.8 adds up the number of devices as well.
    assert carried in ((2, 3) if method == "ekfac running" and mode != "jit" else (0,))
    sums = [c for c in refresh if c not in weights]
    assert {c.kind for c in sums} == {"all-reduce"}
    found = sorted(sorted(counted(c.operands).items()) for c in sums)
    assert found == sorted(sorted(counted(shapes).items()) for shapes in REFRESH[method])


@pytest.mark.parametrize(("method", "mode"), cases(METHODS))
def test_examples_stay_where_they_are(method, mode):
    """No collective carries an axis of examples, the power method's neither."""
    found = collectives(method, mode)
    assert not [c for c in found if has_examples(c)]
    assert {c.kind for c in found} == {"all-reduce"}


@pytest.mark.parametrize(
    ("method", "budget"), [("kfac", 160), pytest.param("ekfac batch", 700, marks=pytest.mark.nightly)]
)
def test_chunks_hold_examples_of_every_device(method, budget, monkeypatch):
    """Rows that do not fit into the budget are summed piece by piece, and each piece is divided over devices as the batch is."""
    monkeypatch.setattr(chunks, "BUDGET", budget)
    found = collectives.__wrapped__(method, "jit")
    assert not [c for c in found if has_examples(c)]
    # What does not fill a chunk may move to its neighbor.
    assert {c.kind for c in found} <= {"all-reduce", "collective-permute"}


def test_the_reader_of_programs():
    """A program made for it: one collective for every step, one in a branch, one in a loop of that branch."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))

    def local(x, y, flag):
        def branch():
            looped = jax.lax.fori_loop(0, y.shape[0], lambda i, v: v + jax.lax.psum(v * i, "data"), y)
            return jax.lax.all_gather(y, "data").sum(0) + looped

        return jax.lax.psum(x, "data"), jax.lax.cond(flag, branch, lambda: y)

    spec = PartitionSpec()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec, spec), check_vma=False)
    compiled = jax.jit(mapped).lower(np.ones((5, 2)), np.ones((3,)), True).compile()
    found = {(c.kind, c.operands, c.conditional) for c in hlo.collectives(compiled)}
    assert ("all-reduce", ((5, 2),), False) in found
    assert ("all-reduce", ((3,),), True) in found
    assert {(kind, conditional) for kind, _, conditional in found} == {
        ("all-reduce", False),
        ("all-reduce", True),
        ("all-gather", True),
    }
    assert hlo.conditionals(compiled) == 1
