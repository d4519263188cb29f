"""Does the coarse-space correction help? Two-level K-FAC against K-FAC, Adam and gradient descent, over several seeds.

By default on the 64-layer linear network with batch norm of Tselepidis et al. (2020), `configs/deep_linear.py`. Writes
the figure `two_level.png` and every curve, `two_level.json`, and prints a table in Markdown. A loss is the mean over
the batches of an interval of steps; the last column is the first step at which the mean over the seeds has K-FAC's
final loss. `python benchmarks/two_level.py --help`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.plots import plot_repeats
from kfe_optax.experiments.repeats import Curves, band, repeat
from kfe_optax.experiments.task import make_task

REFERENCE = "kfac"


def table(curves: list[Curves]) -> str:
    """Final losses with their confidence intervals, the time of a step, and when K-FAC's final loss was reached."""
    reference = next((runs for runs in curves if runs.name == REFERENCE), curves[0])
    target = band(reference.losses).mean[-1]
    lines = [
        f"| optimizer | training loss | 95 % interval | ms a step | {reference.name}'s final loss at step, after |",
        "|---|---|---|---|---|",
    ]
    for runs in curves:
        mean, low, high = band(runs.losses)
        reached = np.flatnonzero(mean <= target)
        at = "never"
        if len(reached):
            at = f"{runs.steps[reached[0]]}, {runs.seconds.mean(axis=0)[reached[0]]:.1f} s"
        lines.append(
            f"| {runs.name} | {mean[-1]:.5f} | {low[-1]:.5f} to {high[-1]:.5f} | {runs.milliseconds:.2f} | {at} |"
        )
    return "\n".join(lines)


def record(curves: list[Curves], config: str, seeds: list[int]) -> dict:
    return {
        "config": config,
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}",
        "seeds": seeds,
        "optimizers": {
            runs.name: {
                "compile_seconds": round(runs.compile_seconds, 2),
                "steps": runs.steps.tolist(),
                "seconds": np.round(runs.seconds, 3).tolist(),
                "losses": [[float(f"{loss:.6g}") for loss in row] for row in runs.losses],
            }
            for runs in curves
        },
    }


def value_of(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main() -> None:
    # As `kfe-optax` does: OpenBLAS's threads spin against XLA's. It is read when it is first needed.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/deep_linear.py")
    parser.add_argument("--optimizers", nargs="*", default=["sgd", "adam", "kfac", "two_level_kfac"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="of the config, as model.depth=32 or steps=500",
    )
    parser.add_argument("--every", type=int, default=20, help="steps a point of the curves")
    parser.add_argument("--out", default="docs", help="the folder of the figure and the JSON file")
    parser.add_argument("--name", default="two_level", help="their name")
    options = parser.parse_args()
    config = load_config(options.config)
    for setting in options.set:
        field, _, text = setting.partition("=")
        config.update_from_flattened_dict({field: value_of(text)})
    dataset = load(config)
    seeds = list(range(options.seeds))
    curves = repeat(config, options.optimizers, dataset, seeds=seeds, every=options.every)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    loss_name = make_task(config, dataset).loss_name
    plot_repeats(curves, folder / f"{options.name}.png", config.title, loss_name)
    described = " ".join([options.config, *options.set])
    content = json.dumps(record(curves, described, seeds), separators=(",", ":"))
    (folder / f"{options.name}.json").write_text(content + "\n", encoding="utf-8")
    print(table(curves))


if __name__ == "__main__":
    main()
