"""Optimizers with their default settings on a physics-informed network and on variational Monte Carlo (`examples/`).

    python -m benchmarks.physics
    python -m benchmarks.physics --problems poisson --optimizers adam kfac --rates 1e-3 1e-2

Each runs at the learning rate that the documentation recommends (`benchmarks/today/tasks.py`), or at those given, which rises
over the first tenth of the steps and falls linearly to zero. Printed are means over twentieths of the run: of the error against
the exact solution, or of the energy above the exact one, in hartree.
"""

from __future__ import annotations

import argparse

from benchmarks.today.tasks import OPTIMIZERS
from examples import helium, poisson
from examples.race import train

NAMES = ("adam", "kfac_natural", "kfac", "ekfac", "spectral_kfac")
PROBLEMS = {"poisson": poisson.PROBLEM._replace(steps=1000), "helium": helium.PROBLEM._replace(steps=1000)}


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
