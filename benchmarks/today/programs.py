"""Compiled steps: one run of training, and what a step of each optimizer costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfe_optax as kfe
from benchmarks.today.tasks import OPTIMIZERS, Problem, Recipe
from examples.race import schedule_of

INTERVALS = 20


class Program(NamedTuple):
    """A compiled step, (params, opt_state, model_state, batch, count) to the first three and the loss, and where it begins."""

    step: Any
    start: tuple[Any, Any, Any]
    compile_seconds: float


def step_of(
    problem: Problem, recipe: Recipe, tx_of: Callable[[Any], Any], seed: int
) -> tuple[Callable[..., Any], tuple[Any, Any, Any], Any]:
    """The step of a task with the transformation `tx_of(layers)`, where it begins, and a batch."""
    task = problem.task
    key = jax.random.key(seed)
    batch = problem.batches(0)
    params, model_state = jax.jit(task.init)(jax.random.fold_in(key, 1), batch["image"])
    layers = kfe.find_layers(task.loss_fn, params, batch, model_state, key, has_aux=task.has_state)
    tx = optax.with_extra_args_support(tx_of(layers))
    if recipe.curvature:
        differentiate = kfe.value_grad_and_taps(
            task.loss_fn, layers, has_aux=task.has_state, quadratic_model=recipe.quadratic_model
        )
    else:
        differentiate = jax.value_and_grad(task.loss_fn, has_aux=task.has_state)

    def step(params, opt_state, model_state, batch, count):
        own = jax.random.fold_in(key, count)
        if recipe.curvature:
            found, grads, taps = differentiate(params, batch, model_state, own, key=own)
            extra = {"taps": taps}
        else:
            (found, grads), extra = differentiate(params, batch, model_state, own), {}
        loss, model_state = found if task.has_state else (found, model_state)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, model_state, loss

    return step, (params, jax.jit(tx.init)(params), model_state), batch


def program_of(problem: Problem, recipe: Recipe, tx_of: Callable[[Any], Any], seed: int) -> Program:
    """`step_of`, compiled."""
    step, start, batch = step_of(problem, recipe, tx_of, seed)
    clock = time.perf_counter()
    given = (*start, batch, jnp.zeros((), jnp.int32))
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*given).compile()
    return Program(compiled, start, time.perf_counter() - clock)


def train(
    problem: Problem, recipe: Recipe, rate: float, seed: int, options: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """One run: the curve of the training loss, with seconds without compilation, and the measures of the test set."""
    task, steps = problem.task, problem.steps
    # What has no learning rate has no schedule either.
    schedule = rate if recipe.quadratic_model else schedule_of(rate, steps)
    program = program_of(problem, recipe, lambda layers: recipe.make(schedule, layers, **options or {}), seed)
    (params, opt_state, model_state), seconds, curve = program.start, 0.0, []
    for ends in np.array_split(np.arange(steps), min(INTERVALS, steps)):
        batches = [problem.batches(int(i)) for i in ends]
        losses = []
        clock = time.perf_counter()
        for i, batch in zip(ends, batches, strict=True):
            params, opt_state, model_state, loss = program.step(
                params, opt_state, model_state, batch, jnp.asarray(i, jnp.int32)
            )
            losses.append(loss)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - clock
        curve.append([int(ends[-1]) + 1, round(seconds, 3), float(np.mean(losses)) * task.loss_scale])
    if recipe.quadratic_model:
        params = kfe.averaged_parameters(opt_state, params)
    test = task.evaluate(params, problem.dataset.test_images, problem.dataset.test_labels, model_state)
    info = kfe.info(opt_state)
    failures = 0 if info.failures is None else int(info.failures)
    return {"compile": round(program.compile_seconds, 1), "failures": failures, "curve": curve, "test": test}


def costs(problem: Problem, names: Sequence[str], steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step of each optimizer, refreshes included: the median over rounds, in which they take turns."""
    programs, states, clocks = {}, {}, {name: [] for name in names}
    for name in names:
        recipe = OPTIMIZERS[name]
        programs[name] = program_of(problem, recipe, lambda layers, r=recipe: r.make(r.unit / 100, layers), 0)
        states[name] = programs[name].start
    batches = [problem.batches(i) for i in range(steps)]
    for turn in range(rounds + 1):
        for name in names:
            clock = time.perf_counter()
            for i, batch in enumerate(batches):
                count = jnp.asarray(turn * steps + i, jnp.int32)
                *states[name], _ = programs[name].step(*states[name], batch, count)
            jax.block_until_ready(states[name])
            # The first round has the refreshes of the first steps.
            if turn:
                clocks[name].append(1000 * (time.perf_counter() - clock) / steps)
    return {name: round(float(np.median(own)), 2) for name, own in clocks.items()}
