"""What the examples share: Adam at three rates against K-FAC and its relatives with nothing but their defaults.

    python -m examples.NAME [--steps N] [--seed S] [--optimizers adam spectral_kfac] [--out FILE]

All begin at the same parameters and see the same draws, and every learning rate rises over the first tenth of the
steps and falls linearly to zero. Printed are means over twentieths of the run; the picture has the best of Adam's
rates, the table all of them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfe_optax as kfe

INTERVALS = 20
WARM_UP = 0.1


class Problem(Protocol):
    """What an example brings, a NamedTuple: the first parameters, and what is carried from step to step beside them (data, a
    replay buffer); the arguments of a step's loss after the parameters, and what is carried on; a number of each step."""

    steps: int
    unit: str  # of what is measured
    loss_fn: Callable[..., jax.Array]

    def start(self, key: jax.Array) -> tuple[Any, Any]: ...
    def arguments(self, params: Any, carried: Any, key: jax.Array) -> tuple[tuple[Any, ...], Any]: ...
    def measure(self, params: Any, carried: Any, loss: jax.Array) -> jax.Array: ...


class Recipe(NamedTuple):
    """`make(rate, layers)`, a rate, and what the optimizer needs beside a gradient."""

    make: Callable[..., optax.GradientTransformation]
    rate: float = math.nan
    curvature: bool = True
    quadratic_model: bool = False
    fixed: bool = False  # the same draw on every step: a line search compares losses of one batch


OPTIMIZERS = {
    "adam": Recipe(lambda rate, _: optax.adam(rate), curvature=False),
    "kfac": Recipe(kfe.kfac, 0.15),
    "ekfac": Recipe(kfe.ekfac, 0.15),
    "spectral_kfac": Recipe(kfe.spectral_kfac, 0.1),
    "kfac_natural": Recipe(lambda rate, layers: kfe.kfac(rate, layers, 1e-2, **kfe.NATURAL), 0.1),
    "lbfgs": Recipe(lambda *_: optax.lbfgs(), curvature=False, fixed=True),
}
FAMILY = ("adam", "kfac", "ekfac", "spectral_kfac")
# What the documentation recommends for equations, and what is usual for them.
PHYSICS = (*FAMILY, "kfac_natural", "lbfgs")


def schedule_of(rate: float, steps: int) -> optax.Schedule:
    """From zero to the rate over the first tenth, then linearly to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    rise, fall = (
        optax.linear_schedule(rate / warm_up, rate, warm_up),
        optax.linear_schedule(rate, 0, steps - warm_up),
    )
    return optax.join_schedules([rise, fall], [warm_up])


def begin(problem: Problem, seed: int) -> tuple[Any, Any, kfe.Layers]:
    """The first parameters, what is carried, and the layers of the loss."""
    key = jax.random.key(seed)
    # Compiled once for every optimizer: a problem is hashed by its sizes.
    start = jax.jit(type(problem).start, static_argnums=0)
    params, carried = start(problem, jax.random.fold_in(key, 0))
    arguments, _ = jax.eval_shape(problem.arguments, params, carried, key)
    return params, carried, kfe.find_layers(problem.loss_fn, params, *arguments)


def train(
    problem: Problem, recipe: Any, rate: float, seed: int, verbose: bool = False
) -> tuple[np.ndarray, float]:
    """What is measured, a mean for each interval, and the seconds of all steps without compilation."""
    key = jax.random.key(seed)
    params, carried, layers = begin(problem, seed)
    schedule = rate if recipe.quadratic_model else schedule_of(rate, problem.steps)
    tx = optax.with_extra_args_support(recipe.make(schedule, layers))
    with_taps = kfe.value_grad_and_taps(problem.loss_fn, layers, quadratic_model=recipe.quadratic_model)
    fixed = getattr(recipe, "fixed", False)

    def step(params, opt_state, carried, count):
        drawn, own = jax.random.split(jax.random.fold_in(key, 0 if fixed else count + 1))
        arguments, carried = problem.arguments(params, carried, drawn)
        if recipe.curvature:
            loss, grads, taps = with_taps(params, *arguments, key=own)
            updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        else:
            loss, grads = jax.value_and_grad(problem.loss_fn)(params, *arguments)
            search = {"value": loss, "grad": grads, "value_fn": lambda w: problem.loss_fn(w, *arguments)}
            updates, opt_state = tx.update(grads, opt_state, params, **search)
        measured = problem.measure(params, carried, loss)
        return optax.apply_updates(params, updates), opt_state, carried, measured

    given = params, jax.jit(tx.init)(params), carried
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*given, jnp.zeros((), jnp.int32)).compile()
    means, clock = [], time.perf_counter()
    for part in np.array_split(np.arange(problem.steps), min(INTERVALS, problem.steps)):
        found = []
        for i in part:
            *given, measured = compiled(*given, jnp.asarray(i, jnp.int32))
            found.append(measured)
        means.append(np.mean(jax.device_get(found)))
        if verbose:
            print(f"  step {part[-1] + 1:5d}: {means[-1]:.4g}", flush=True)
    return np.array(means), time.perf_counter() - clock


def draw(title: str, problem: Problem, curves: dict[str, np.ndarray], linear: bool, out: Path) -> None:
    """The curves over the steps; what is to be small has a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, means in curves.items():
        ends = problem.steps * np.arange(1, len(means) + 1) / len(means)
        axes.plot(ends, means if linear else np.abs(means), label=label)
    axes.set(title=title, xlabel="step", ylabel=problem.unit, yscale="linear" if linear else "log")
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    plt.close(figure)


def main(
    name: str,
    title: str,
    problem: Any,
    rates: Sequence[float],
    larger_is_better: bool = False,
    optimizers: Sequence[str] = FAMILY,
    arguments: Sequence[str] | None = None,
) -> dict[str, float]:
    """The command line of an example; the last means by optimizer, of Adam the best of these rates."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=title)
    parser.add_argument("--steps", type=int, default=problem.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizers", nargs="+", default=list(optimizers), choices=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, default=Path(f"runs/examples/{name}.png"))
    options = parser.parse_args(arguments)
    problem = problem._replace(steps=options.steps)
    print(f"{title}: {problem.unit}, {problem.steps} steps\n{begin(problem, options.seed)[2]}", flush=True)
    best, curves, rows = {}, {}, []
    for optimizer in options.optimizers:
        recipe = OPTIMIZERS[optimizer]
        for rate in rates if optimizer == "adam" else [recipe.rate]:
            label = optimizer if math.isnan(rate) else f"{optimizer}, {rate:g}"
            print(label, flush=True)
            means, seconds = train(problem, recipe, rate, options.seed, verbose=True)
            rows.append(f"{label:20s}  {means[-1]:10.4g}  {1e3 * seconds / problem.steps:8.1f} ms a step")
            last = means[-1] if math.isfinite(means[-1]) else -math.inf if larger_is_better else math.inf
            if optimizer not in best or (last > best[optimizer]) == larger_is_better:
                best[optimizer], curves[optimizer] = last, (label, means)
    print("\n".join(["", f"last twentieth: {problem.unit}", *rows, f"the picture: {options.out}"]))
    draw(title, problem, dict(curves.values()), larger_is_better, options.out)
    return best
