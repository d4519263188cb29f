"""Optimizers on the networks that people train today: each with five learning rates on one grid and nothing else tuned.

Run the parts that you want, in any order, as often as you like; what is in the results file (`today.jsonl`) is not run again:

    python benchmarks/today.py run --tasks characters mlp --optimizers adam muon spectral_kfac
    python benchmarks/today.py table

For each task and optimizer the rates of `RATES` times the optimizer's own unit are run with seed 0, then seeds 1 and 2 with the
best of them. Every rate rises over the first tenth of the steps and falls linearly to zero. A loss is the mean over the batches
of an interval of steps; the validation loss is that of the whole test set at the end. With `--data FOLDER`, the tasks on
characters and on images use `tinyshakespeare.txt`, `cifar10_10k.npz` and `mnist.npz` of that folder, else embedded data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfe_optax as kfe
from kfe_optax.experiments.batches import make_batches
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.task import make_task

RESULTS = Path(__file__).with_suffix(".jsonl")
RATES = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
INTERVALS = 20
WARM_UP = 0.1


class Recipe(NamedTuple):
    """An optimizer: `make(rate, layers)`, and the middle of its five rates, the one that the documentation recommends."""

    make: Callable[[Any, Any], optax.GradientTransformation]
    unit: float
    curvature: bool = True


OPTIMIZERS: dict[str, Recipe] = {
    "sgd": Recipe(lambda rate, _: optax.sgd(rate, 0.9, nesterov=True), 0.1, False),
    "adam": Recipe(lambda rate, _: optax.adam(rate), 5e-3, False),
    "adamw": Recipe(lambda rate, _: optax.adamw(rate), 5e-3, False),
    "muon": Recipe(lambda rate, _: optax.contrib.muon(rate), 2e-2, False),
    "soap": Recipe(lambda rate, layers: kfe.soap(rate, layers), 5e-3, False),
    "kfac": Recipe(lambda rate, layers: kfe.kfac(rate, layers), 0.1),
    "ekfac": Recipe(lambda rate, layers: kfe.ekfac(rate, layers), 0.1),
    "tkfac": Recipe(lambda rate, layers: kfe.tkfac(rate, layers), 0.1),
    "spectral_kfac": Recipe(lambda rate, layers: kfe.spectral_kfac(rate, layers), 0.1),
}


class Setting(NamedTuple):
    """A task: a config of this repository, changed, and how many steps of it are taken."""

    config: str
    steps: int
    changes: Mapping[str, Any] = MappingProxyType({})
    data: str = ""  # the file of `--data`


_WIDE = {"model.width": 256, "model.depth": 4, "model.hidden": 1024, "model.heads": 4}
_VIT = {"model.width": 96, "model.depth": 3, "model.heads": 3, "model.hidden": 384, "data.augment": ""}

TASKS: dict[str, Setting] = {
    "characters": Setting("transformer_characters", 400, {}, "tinyshakespeare.txt"),
    "characters_wide": Setting("transformer_characters", 60, _WIDE, "tinyshakespeare.txt"),
    "vit": Setting("vit_small", 150, _VIT, "cifar10_10k.npz"),
    "resnet20": Setting("resnet20", 100, {"data.augment": ""}, "cifar10_10k.npz"),
    "resnet20_without_norm": Setting("resnet20_without_norm", 100, {}, "cifar10_10k.npz"),
    "lstm": Setting("lstm_characters", 200, {"data.length": 64}, "tinyshakespeare.txt"),
    "mlp": Setting("mnist_classifier", 200, {"batch_size": 128}, "mnist.npz"),
    "mnist_autoencoder": Setting("mnist_autoencoder", 490, {}, "mnist.npz"),
    "curves_autoencoder": Setting("curves_autoencoder", 300),
    "faces_autoencoder": Setting("faces_autoencoder", 60),
}


class Problem(NamedTuple):
    """A task with its data, ready to train."""

    task: Any
    dataset: Any
    batches: Any
    steps: int


def problem_of(name: str, seed: int, data: str) -> Problem:
    setting = TASKS[name]
    config = load_config(f"configs/{setting.config}.py")
    config.update_from_flattened_dict(dict(setting.changes))
    if data and setting.data:
        config.data_dir = str(Path(data) / setting.data)
    dataset = load(config)
    return Problem(make_task(config, dataset), dataset, make_batches(config, dataset, seed), setting.steps)


def schedule_of(rate: float, steps: int) -> optax.Schedule:
    """From zero to the rate over the first tenth, then linearly to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(rate / warm_up, rate, warm_up),
            optax.linear_schedule(rate, 0.0, steps - warm_up),
        ],
        [warm_up],
    )


def train(problem: Problem, recipe: Recipe, rate: float, seed: int, steps: int = 0) -> dict[str, Any]:
    """One run: seconds without compilation, the curve of the training loss, and the measures of the test set."""
    task, steps = problem.task, steps or problem.steps
    key = jax.random.key(seed)
    batch = problem.batches(0)
    params, model_state = jax.jit(task.init)(jax.random.fold_in(key, 1), batch["image"])
    layers = kfe.find_layers(task.loss_fn, params, batch, model_state, key, has_aux=task.has_state)
    tx = optax.with_extra_args_support(recipe.make(schedule_of(rate, steps), layers))
    if recipe.curvature:
        differentiate = kfe.value_grad_and_taps(task.loss_fn, layers, has_aux=task.has_state)
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

    opt_state = jax.jit(tx.init)(params)
    clock = time.perf_counter()
    given = params, opt_state, model_state, batch, jnp.zeros((), jnp.int32)
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*given).compile()
    compile_seconds, seconds = time.perf_counter() - clock, 0.0
    curve = []
    for ends in np.array_split(np.arange(steps), min(INTERVALS, steps)):
        batches = [problem.batches(int(i)) for i in ends]
        losses = []
        clock = time.perf_counter()
        for i, batch in zip(ends, batches, strict=True):
            params, opt_state, model_state, loss = compiled(
                params, opt_state, model_state, batch, jnp.asarray(i, jnp.int32)
            )
            losses.append(loss)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - clock
        curve.append([int(ends[-1]) + 1, round(seconds, 3), float(np.mean(losses)) * task.loss_scale])
    test = task.evaluate(params, problem.dataset.test_images, problem.dataset.test_labels, model_state)
    info = kfe.info(opt_state)
    failures = 0 if info.failures is None else int(info.failures)
    return {"compile": round(compile_seconds, 1), "failures": failures, "curve": curve, "test": test}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def runs_of(
    records: list[dict[str, Any]], task: str, optimizer: str
) -> dict[tuple[float, int], dict[str, Any]]:
    """{(factor of the rate, seed): run}."""
    return {(r["factor"], r["seed"]): r for r in records if (r["task"], r["optimizer"]) == (task, optimizer)}


def final(run: dict[str, Any]) -> float:
    """The training loss of the last interval, infinite where it is not a number."""
    loss = run["curve"][-1][2]
    return loss if np.isfinite(loss) else float("inf")


def best_factor(runs: dict[tuple[float, int], dict[str, Any]]) -> float:
    return min((factor for factor, seed in runs if seed == 0), key=lambda factor: final(runs[factor, 0]))


def missing(
    records: list[dict[str, Any]], task: str, optimizer: str, seeds: int
) -> Iterator[tuple[float, int]]:
    """What is still to be run; the records may grow in between."""
    for factor in RATES:
        if (factor, 0) not in runs_of(records, task, optimizer):
            yield factor, 0
    for seed in range(1, seeds):
        # The middle rate as well: it is what the documentation recommends.
        for factor in sorted({best_factor(runs_of(records, task, optimizer)), 1.0}):
            if (factor, seed) not in runs_of(records, task, optimizer):
                yield factor, seed


def run(options: argparse.Namespace) -> None:
    records = read(options.results)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        for optimizer in options.optimizers:
            recipe = OPTIMIZERS[optimizer]
            for factor, seed in missing(records, task, optimizer, options.seeds):
                found = train(problem_of(task, seed, options.data), recipe, factor * recipe.unit, seed)
                machine = f"{platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}"
                record = {
                    "task": task, "optimizer": optimizer, "factor": factor, "rate": factor * recipe.unit,
                    "seed": seed, "machine": machine, **found,
                }  # fmt: skip
                records.append(record)
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(
                    f"{task} {optimizer} rate {record['rate']:.3g} seed {seed}: {final(record):.4f}",
                    flush=True,
                )


def reached(curve: list[list[float]], loss: float) -> tuple[float, float] | None:
    """The first step, and second, at which the curve is at or below a loss, between intervals linearly."""
    before = None
    for step, seconds, value in curve:
        if value <= loss:
            if before is None or before[2] <= value:
                return step, seconds
            part = (before[2] - loss) / (before[2] - value)
            return before[0] + part * (step - before[0]), before[1] + part * (seconds - before[1])
        before = (step, seconds, value)
    return None


def tables(records: list[dict[str, Any]]) -> str:
    """A table in Markdown for each task."""
    lines = []
    for task in [t for t in TASKS if any(r["task"] == t for r in records)]:
        adam = runs_of(records, task, "adam")
        target = final(adam[best_factor(adam), 0]) if adam else None
        lines += [
            f"### {task}, {TASKS[task].steps} steps",
            "",
            "| optimizer | best rate | training loss | validation loss | at the recommended rate | ms a step "
            "| steps to Adam's best | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for optimizer in OPTIMIZERS:
            runs = runs_of(records, task, optimizer)
            if not runs:
                continue
            factor = best_factor(runs)
            seeds = [own for (f, _), own in runs.items() if f == factor]
            recommended = [final(own) for (f, _), own in runs.items() if f == 1.0]
            curve = runs[factor, 0]["curve"]
            at = reached(curve, target) if target is not None else None
            steps, seconds = (f"{at[0]:.0f}", f"{at[1]:.1f}") if at else ("–", "–")
            cost = 1000 * (curve[-1][1] - curve[0][1]) / (curve[-1][0] - curve[0][0])
            middle = f"{np.mean(recommended):.4f}" if recommended else "–"
            lines.append(
                f"| {optimizer} | {factor * OPTIMIZERS[optimizer].unit:.3g} "
                f"| {np.mean([final(s) for s in seeds]):.4f} ({len(seeds)}) "
                f"| {np.mean([s['test']['loss'] for s in seeds]):.4f} | {middle} | {cost:.0f} | {steps} | {seconds} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    # As `kfe-optax` does: OpenBLAS's threads spin against XLA's. It is read when it is first needed.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="", help="a folder with the data files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file, which is added to")
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    print(tables(read(options.results)))


if __name__ == "__main__":
    main()
