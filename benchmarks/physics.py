"""Optimizers with their default settings on a physics-informed network and on variational Monte Carlo (`examples/`).

    python -m benchmarks.physics
    python -m benchmarks.physics --problems poisson --optimizers adam kfac --rates 1e-3 1e-2

Each runs at the learning rate that the documentation recommends (`benchmarks/today/tasks.py`), or at those given, which rises
over the first tenth of the steps and falls linearly to zero. Printed are means over twentieths of the run: of the error against
the exact solution, or of the energy above the exact one, in hartree.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfe_optax as kfe
from benchmarks.today.tasks import OPTIMIZERS, Recipe, schedule_of
from examples import helium, poisson

INTERVALS = 20
NAMES = ("adam", "kfac_natural", "kfac", "ekfac", "spectral_kfac")


class Poisson(NamedTuple):
    """512 new points a step inside, and as many on the edge."""

    steps: int = 1000
    unit: str = "relative error"

    def start(self, key: jax.Array) -> tuple[Any, Any]:
        return poisson.init(key), ()

    def arguments(self, params: Any, carried: Any, key: jax.Array) -> tuple[tuple[Any, ...], Any]:
        return (poisson.sample(key),), carried

    def measure(self, params: Any, arguments: Any) -> jax.Array:
        return poisson.error(params)

    loss_fn = staticmethod(poisson.loss_fn)


class Helium(NamedTuple):
    """512 walkers, ten steps of each between two of the optimizer."""

    steps: int = 1000
    unit: str = "energy above the exact one"

    def start(self, key: jax.Array) -> tuple[Any, Any]:
        params = helium.init(key)
        return params, helium.start(params, jax.random.fold_in(key, 1))

    def arguments(self, params: Any, carried: Any, key: jax.Array) -> tuple[tuple[Any, ...], Any]:
        walkers = helium.walk(params, carried, key)
        return (walkers, helium.local_energies(params, walkers)), walkers

    def measure(self, params: Any, arguments: Any) -> jax.Array:
        return arguments[1].mean() - helium.ENERGY

    loss_fn = staticmethod(helium.loss_fn)


PROBLEMS = {"poisson": Poisson(), "helium": Helium()}


def train(problem: Any, recipe: Recipe, rate: float, seed: int) -> tuple[np.ndarray, float]:
    """What is measured, a mean for each interval, and the seconds of all steps without compilation."""
    key = jax.random.key(seed)
    params, carried = problem.start(jax.random.fold_in(key, 0))
    layers = kfe.find_layers(problem.loss_fn, params, *problem.arguments(params, carried, key)[0])
    schedule = rate if recipe.quadratic_model else schedule_of(rate, problem.steps)
    tx = optax.with_extra_args_support(recipe.make(schedule, layers))
    if recipe.curvature:
        differentiate = kfe.value_grad_and_taps(
            problem.loss_fn, layers, quadratic_model=recipe.quadratic_model
        )
    else:
        differentiate = jax.value_and_grad(problem.loss_fn)

    def step(params, opt_state, carried, count):
        draw, own = jax.random.split(jax.random.fold_in(key, count + 1))
        arguments, carried = problem.arguments(params, carried, draw)
        measured = problem.measure(params, arguments)
        if recipe.curvature:
            _, grads, taps = differentiate(params, *arguments, key=own)
            extra = {"taps": taps}
        else:
            (_, grads), extra = differentiate(params, *arguments), {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, carried, measured

    given = params, jax.jit(tx.init)(params), carried
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*given, jnp.zeros((), jnp.int32)).compile()
    found, clock = [], time.perf_counter()
    for i in range(problem.steps):
        *given, measured = compiled(*given, jnp.asarray(i, jnp.int32))
        found.append(measured)
    found = np.asarray(jax.block_until_ready(found))
    return np.array([part.mean() for part in np.array_split(found, INTERVALS)]), time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", default=list(NAMES), choices=list(OPTIMIZERS))
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    for name in options.problems:
        problem = PROBLEMS[name]
        if options.steps:
            problem = problem._replace(steps=options.steps)
        print(f"{name}: {problem.unit}, {problem.steps} steps; twentieths 1, 5, 10, 15, 20")
        for optimizer in options.optimizers:
            recipe = OPTIMIZERS[optimizer]
            for rate in options.rates or [recipe.unit]:
                for seed in range(options.seeds):
                    found, seconds = train(problem, recipe, rate, seed)
                    curve = "  ".join(f"{found[i]:.2e}" for i in (0, 4, 9, 14, 19))
                    print(
                        f"  {optimizer:14s} rate {rate:<8.3g} seed {seed}: {curve}  {seconds:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
