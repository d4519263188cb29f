"""Optimizers on the networks that people train today: each with five learning rates on one grid and nothing else tuned.

Run the parts that you want, in any order, as often as you like; what is in the results file (`results.jsonl`) is not run again:

    python -m benchmarks.today run --tasks characters mlp --optimizers adam muon spectral_kfac
    python -m benchmarks.today cost --tasks characters
    python -m benchmarks.today report

For each task and optimizer the rates of `RATES` times the optimizer's own unit are run with seed 0, then seeds 1 and 2 with the
best of them and with the middle one, which the documentation recommends. Every rate rises over the first tenth of the steps and
falls linearly to zero. A loss is the mean over the batches of an interval of steps; the validation loss is that of the whole test
set at the end. `run --trials 10` tunes up to two more numbers of each optimizer by random search (a second table). `cost`
measures a step of each, all in turn in one process, with nothing else running: seconds in the tables are steps times that. With
`--data FOLDER` the tasks on characters and on images use `tinyshakespeare.txt`, `cifar10_10k.npz` and `mnist.npz` of that
folder, else embedded data.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path

from benchmarks.today.programs import costs, train
from benchmarks.today.report import report
from benchmarks.today.results import RESULTS, Results, final, missing, trials_of
from benchmarks.today.tasks import OPTIMIZERS, TASKS, problem_of, trial_of


def run(options: argparse.Namespace, results: Results) -> None:
    for task, name in itertools.product(options.tasks, options.optimizers):
        recipe = OPTIMIZERS[name]
        for factor, seed in missing(results.records, task, name, options.seeds, options.factors):
            problem, rate = problem_of(task, seed, options.data), factor * recipe.unit
            found = train(problem, recipe, rate, seed)
            results.add(task=task, optimizer=name, factor=factor, rate=rate, seed=seed, **found)
            print(f"{task} {name} rate {rate:.3g} seed {seed}: {final(found):.4f}", flush=True)
        for trial in range(options.trials):
            if trial in trials_of(results.records, task, name):
                continue
            rate, drawn = trial_of(recipe, trial)
            found = train(problem_of(task, 0, options.data), recipe, rate, 0, drawn)
            results.add(task=task, optimizer=name, trial=trial, rate=rate, options=drawn, seed=0, **found)
            print(f"{task} {name} trial {trial}: {final(found):.4f}", flush=True)


def cost(options: argparse.Namespace, results: Results) -> None:
    for task in options.tasks:
        found = costs(problem_of(task, 0, options.data), options.optimizers, options.steps, options.rounds)
        results.add(task=task, costs=found)
        print(task, found, flush=True)


def main() -> None:
    # As `kfe-optax` does: OpenBLAS's threads spin against XLA's. It is read when it is first needed.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "cost", "report"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument(
        "--factors", nargs="+", type=int, default=range(5), help="which of the five rates, 0 to 4"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=0, help="of the random search")
    parser.add_argument("--steps", type=int, default=50, help="of a round of cost")
    parser.add_argument("--rounds", type=int, default=3, help="of cost")
    parser.add_argument("--data", default="", help="a folder with the data files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file, which is added to")
    parser.add_argument("--figures", type=Path, help="a folder for the report's figures")
    options = parser.parse_args()
    results = Results(options.results)
    if options.command == "report":
        print(report(results.records, options.figures))
    else:
        {"run": run, "cost": cost}[options.command](options, results)


if __name__ == "__main__":
    main()
