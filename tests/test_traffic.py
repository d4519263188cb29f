"""The benchmarks' bytes: read from compiled programs, and predicted by the paper model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import kfe_optax as kfe
from benchmarks import communication
from benchmarks.traffic import Traffic, traffic

from . import problems, several_devices

DEVICES = 4
RATIO = (DEVICES - 1) / DEVICES
AXIS = several_devices.AXIS


def over_devices(function):
    """Its traffic with an argument (4, 6) in float32 on every device."""
    mapped = jax.shard_map(
        function,
        mesh=several_devices.mesh_of(DEVICES),
        in_specs=several_devices.DIVIDED,
        out_specs=several_devices.DIVIDED,
        check_vma=False,
    )
    rows = jnp.ones((4 * DEVICES, 6), jnp.float32)
    return traffic(jax.jit(mapped).lower(rows).compile(), DEVICES)


def total(x):
    return jax.lax.psum(x, AXIS)


def three_times(x):
    return jax.lax.fori_loop(0, 3, lambda _, value: jnp.sin(total(value)), x)


def sometimes(x):
    return jax.lax.cond(x[0, 0] > 0, lambda v: total(v) + total(v @ v.T)[0, 0], total, x)


def gathered(x):
    return jax.lax.all_gather(x, AXIS).sum(0)


@pytest.mark.parametrize(
    ("function", "always", "branches"),
    [
        (jnp.sin, 0, 0),
        (total, 2 * RATIO * 24, 0),
        (three_times, 3 * 2 * RATIO * 24, 0),
        (sometimes, 0, 2 * RATIO * (24 + 16)),
        (gathered, RATIO * 24 * DEVICES, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_traffic_of_a_program(function, always, branches):
    assert over_devices(function) == Traffic(4 * always, 4 * branches)


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        traffic("HloModule nothing", DEVICES)


@functools.cache
def problem():
    return problems.make("linen", sizes=(5, 4, 3), examples=2 * DEVICES)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_the_paper_model_is_what_a_step_sends(method):
    found = problem()
    layers = found.layers()
    tx = {"kfac": kfe.scale_by_kfac, "ekfac": kfe.scale_by_ekfac}[method](layers, 0.1)
    step = several_devices.divided(
        "shard_map", DEVICES, lambda axis: several_devices.train_step(found.loss_fn, layers, tx, axis)
    )
    batch = tuple(jnp.asarray(leaf) for leaf in found.args)
    program = step.lower(found.params, tx.init(found.params), batch, jax.random.key(0)).compile()
    measured = traffic(program, DEVICES)
    volume = communication.predicted(method, [layer.sides for layer in layers.values()], DEVICES)
    scalars = 4 * 2 * RATIO  # of one scalar that is summed: the loss, the number of examples and the like
    assert 0 <= measured.always - volume.step <= 4 * scalars
    assert 0 <= measured.branches - volume.factors <= 4 * scalars
