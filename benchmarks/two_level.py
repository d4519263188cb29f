"""Does the coarse-space correction help? Two-level K-FAC against K-FAC, Adam and gradient descent, over several seeds.

By default on the 64-layer linear network with batch norm of Tselepidis et al. (2020), `configs/deep_linear.py`. Writes
what `kfe-optax compare` writes, the figure as `two_level.png`, and prints a table in Markdown: the training loss and its
standard deviation over the seeds; the last column is the first step at which the mean over the seeds has K-FAC's final loss.
`python benchmarks/two_level.py --help`.
"""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.runs import Run, by_name, curve

REFERENCE = "kfac"


def table(runs: Sequence[Run]) -> str:
    """Final losses with their deviations, the time of a step, and when K-FAC's final loss was reached."""
    groups = by_name(runs)
    reference = groups.get(REFERENCE, runs[:1])
    target = curve(reference, "train_loss").mean[-1]
    lines = [
        f"| optimizer | training loss | deviation | ms a step | {reference[0].name}'s final loss at step, after |",
        "|---|---|---|---|---|",
    ]
    for name, own in groups.items():
        found = curve(own, "train_loss")
        place = found.first_at_or_below(target)
        at = "never" if place is None else f"{found.step[place]:.0f}, {found.seconds[place]:.1f} s"
        time = 1e3 * found.seconds[-1] / found.step[-1]
        lines.append(f"| {name} | {found.mean[-1]:.5f} | {found.deviation[-1]:.5f} | {time:.2f} | {at} |")
    return "\n".join(lines)


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
    parser.add_argument("--out", default="runs/two_level", help="the folder of the figure and the curves")
    parser.add_argument("--name", default="two_level", help="the figure's name")
    options = parser.parse_args()
    config = load_config(options.config)
    for setting in options.set:
        field, _, text = setting.partition("=")
        config.update_from_flattened_dict({field: value_of(text)})
    config.compare.update(optimizers=",".join(options.optimizers), seeds=options.seeds)
    config.evaluate_every = f"{options.every} steps"
    folder = Path(options.out)
    runs = compare(config, folder)
    (folder / "compare.png").rename(folder / f"{options.name}.png")
    print(table(runs))


if __name__ == "__main__":
    main()
