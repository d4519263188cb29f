"""The growing batch: the formula's sizes on a ladder, batches that a step's number alone decides, and the job."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rich.console import Console

from kfe_optax.experiments import settings
from kfe_optax.experiments.batches import Batches
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.growth import Phase, growing_batch
from kfe_optax.experiments.job import make_job
from kfe_optax.experiments.sweep import sweep
from kfe_optax.experiments.train import train


def formula(k, first, largest, steps):
    """m_k of Martens and Grosse (2015), k = 1, 2, ..."""
    if k >= steps:
        return largest
    c = (steps - 1) / math.log2(largest / first)
    return min(math.floor(first * 2 ** ((k - 1) / c)), largest)


@pytest.mark.parametrize(
    ("first", "largest", "steps", "sizes"),
    [(1000, 60_000, 500, 6), (512, 50_000, 500, 40), (1, 9, 100, 9), (16, 72, 5, 4), (3, 5, 2, 3)],
)
def test_sizes_are_the_formulas_rounded_down_to_the_ladder(first, largest, steps, sizes):
    phases = growing_batch(first, largest, steps, sizes)
    assert phases[0] == Phase(0, first)
    assert phases[-1] == Phase(steps - 1, largest)
    assert len(phases) <= sizes
    ladder = {round(first * (largest / first) ** (rung / (sizes - 1))) for rung in range(sizes)}
    for step in range(steps + 20):
        size = max((phase for phase in phases if phase.start <= step), key=lambda p: p.start).batch_size
        wanted = formula(step + 1, first, largest, steps)
        assert size == max(rung for rung in ladder if rung <= wanted)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((64, 64, 10, 3), "from config.batch_size = 64 to 64 examples"),
        ((8, 64, 1, 3), "and 1 sizes|in 1 steps"),
        ((8, 64, 10, 1), "and 1 sizes|in 1 steps"),
    ],
)
def test_batches_that_do_not_grow_are_one_sentence(arguments, sentence):
    with pytest.raises(ExperimentError, match=sentence):
        growing_batch(*arguments)


def test_a_new_size_begins_a_new_epoch_and_a_step_alone_decides():
    images, labels = np.zeros((20, 1), np.float32), np.arange(20)
    phases = (Phase(0, 6), Phase(4, 9), Phase(5, 20))
    batches = Batches(images, labels, phases, seed=3)
    # Three batches of 6 an epoch, so that step 3 is the second epoch's first.
    assert [batches.epoch(step) for step in range(8)] == [0, 0, 0, 1, 2, 3, 4, 5]
    assert [batches.batch_size(step) for step in range(7)] == [6, 6, 6, 6, 9, 20, 20]
    assert batches.first_steps(5) == [0, 4]
    assert batches.first_steps(6) == [0, 4, 5]
    forward = [batches.indices(step) for step in range(8)]
    assert [len(rows) for rows in forward] == [6, 6, 6, 6, 9, 20, 20, 20]
    assert len(set(np.concatenate(forward[:3]))) == 18
    again = Batches(images, labels, phases, seed=3)
    for step in reversed(range(8)):
        np.testing.assert_array_equal(again.indices(step), forward[step])
    # One size is the plain batch.
    plain, one = Batches(images, labels, 6, seed=3), Batches(images, labels, (Phase(0, 6),), seed=3)
    for step in range(7):
        np.testing.assert_array_equal(plain.indices(step), one.indices(step))


def growing(config):
    config.batch_size = 8
    config.batch_growth.update(steps=5, largest=0, sizes=3)
    config.steps = 7
    config.adam = settings.adam(1e-2)
    config.optimizer = "adam"
    return config


@pytest.mark.slow
def test_the_job_has_a_program_for_each_size_of_the_run(tiny_config):
    config = growing(tiny_config)
    job = make_job(config, "adam", load(config), config.steps)
    sizes = [len(job.batches(step)["label"]) for step in range(7)]
    assert sizes == [8, 8, 24, 24, 72, 72, 72]
    state = job.state
    for step in range(7):
        state, loss = job.step(state, job.batches(step))
        assert np.isfinite(loss)
    short = make_job(config, "adam", load(config), 3)
    with pytest.raises(KeyError):
        short.step(short.state, job.batches(6))


@pytest.mark.slow
def test_a_resumed_run_with_a_growing_batch_equals_an_uninterrupted_one(tiny_config, tmp_path):
    config, console = growing(tiny_config), Console(quiet=True)
    whole = train(config, tmp_path / "whole", console=console)
    config.steps = 3
    train(config, tmp_path / "parts", console=console)
    config.steps = 7
    resumed = train(config, tmp_path / "parts", resume=True, console=console)
    assert resumed.measures == whole.measures
    records = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("whole", "parts")]
    for first, second in zip(*records, strict=True):
        for column in (0, 1, 4):  # step, epoch, loss
            assert first.split(",")[column] == second.split(",")[column]


def test_what_cannot_grow_says_so(tiny_config, tmp_path):
    config = growing(tiny_config)
    config.compare.budget = "1 second"
    with pytest.raises(ExperimentError, match="'compare for some seconds' has one batch size"):
        compare(config, tmp_path, Console(quiet=True))
    config.batch_growth.largest = 73
    with pytest.raises(ExperimentError, match="largest is 73 and there are 72"):
        make_job(config, "adam", load(config), 3)


def test_a_sweep_has_growing_batches(tiny_config, tmp_path):
    config = growing(tiny_config)
    config.optimizer = "sgd"
    config.sweep.update(learning_rate="1e-3,1e-2", damping="")
    best = sweep(config, tmp_path / "sweep", console=Console(quiet=True)).trials[0]
    config.sgd.learning_rate.value = best.params["learning_rate"]
    alone = train(config, tmp_path / "train", console=Console(quiet=True))
    assert best.user_attrs == pytest.approx(alone.measures, rel=1e-5)
