"""How closely several devices agree with one: every method, under pmap, shard_map and sharded jit, on 1, 2, 4 and 8 devices.

The same global batches on fake CPU devices. A difference is the largest over the parameters' arrays of ‖a − b‖ / ‖b − start‖,
between what one device makes of the steps (b) and what several do (a): after one step from equal state, and after twenty steps,
over which the order of sums, rounding and, in float32, the optimizer itself pull the two apart. Writes every number to a JSON
file, from which an interrupted run goes on (what is in it is not computed again), and prints a table in Markdown.

    python -m benchmarks.agreement --out agreement.json
    python -m benchmarks.agreement --methods kfac ekfac --whole

from the root of the repository: the small network and the methods' options are those of the tests. A whole run compiles
26 steps a method, which takes two or three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before JAX starts: the devices, and cheap compilation, which is nearly all that this benchmark does.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
).strip()

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import kfe_optax as kfe
from tests import methods, several_devices

STEPS = 20
DEVICES = (1, 2, 4, 8)
TYPES = ("float32", "float64")
# What the project promises of these numbers; a drift of float32 over twenty steps is only reported.
BOUNDS = {("float32", 1): 1e-4, ("float64", 1): 1e-10, ("float64", STEPS): 1e-8}
COLUMNS = (*BOUNDS, ("float32", STEPS))
# {method: {dtype: {"pmap 4": {"1": after one step, "20": after twenty}}}}
Record = dict[str, dict[str, dict[str, dict[str, float]]]]


def measure(name: str, cells: list[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], dict[str, float]]]:
    """The differences of one method in each of these cells (mode, devices), in the precision that is switched on."""
    base = methods.make_problem(dtype=jnp.result_type(float))

    def loss_fn(params, x, y):
        return base.loss_fn(params, x, y, 1.0)

    layers = kfe.find_layers(loss_fn, base.params, base.x, base.y)
    tx = optax.chain(methods.CASES[name].having(decay=0.95).make(layers), optax.scale_by_learning_rate(0.02))
    batches = several_devices.batches_of(base.x, base.y)

    def make(axis_name):
        return several_devices.train_step(loss_fn, layers, tx, axis_name)

    start = base.params, tx.init(base.params)
    alone = several_devices.run(jax.jit(make(None)), *start, batches, STEPS)
    for mode, devices in cells:
        # Where the step's results will be, so that the second step is not compiled anew.
        placed = jax.device_put(start, NamedSharding(several_devices.mesh_of(devices), PartitionSpec()))
        step = several_devices.divided(mode, devices, make)
        found = several_devices.run(step, *placed, batches, STEPS)
        after = {}
        for steps in (1, STEPS):
            (params, _), (theirs, _) = found[steps - 1], alone[steps - 1]
            finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
            after[str(steps)] = several_devices.difference(params, theirs, base.params) if finite else np.nan
        yield (mode, devices), after


def fill(record: Record, name: str, path: Path) -> None:
    """Measures what the record has not of this method, and writes the record after each number."""
    for dtype in TYPES:
        own = record.setdefault(name, {}).setdefault(dtype, {})
        cells = [(mode, n) for mode in several_devices.MODES for n in DEVICES if f"{mode} {n}" not in own]
        if not cells:
            continue
        with jax.enable_x64(dtype == "float64"):
            for (mode, devices), after in measure(name, cells):
                own[f"{mode} {devices}"] = after
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        jax.clear_caches()


def table(record: Record, names: list[str]) -> str:
    """One row a method: the largest number over all modes and devices."""
    lines = [_header("method"), _rule(1)]
    for name in names:
        cells = [_largest(record[name], *column) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def whole_table(record: Record, names: list[str]) -> str:
    """One row for every method, mode and number of devices."""
    lines = [_header("method | mode | devices"), _rule(3)]
    for name in names:
        for mode in several_devices.MODES:
            for n in DEVICES:
                cells = [f"{record[name][dtype][f'{mode} {n}'][str(s)]:.1e}" for dtype, s in COLUMNS]
                lines.append(f"| {name} | {mode} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _header(first: str) -> str:
    titles = [f"{dtype}, {'1 step' if steps == 1 else f'{steps} steps'}" for dtype, steps in COLUMNS]
    return f"| {first} | {' | '.join(titles)} |"


def _rule(left: int) -> str:
    return "|" + "---|" * left + "---:|" * len(COLUMNS)


def _largest(own: dict[str, Any], dtype: str, steps: int) -> str:
    largest = float(np.max([after[str(steps)] for after in own[dtype].values()]))
    bound = BOUNDS.get((dtype, steps))
    return f"{largest:.1e}" + (f" (above {bound:g})" if bound is not None and not largest < bound else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=list(kfe.METHODS),
        choices=list(methods.CASES),
        metavar="NAME",
        help=f"among {', '.join(methods.CASES)}; all of kfe.METHODS by default",
    )
    parser.add_argument("--out", type=Path, default=Path("agreement.json"), help="the JSON file")
    parser.add_argument("--whole", action="store_true", help="print every mode and number of devices")
    options = parser.parse_args()
    record: Record = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for name in options.methods:
        fill(record, name, options.out)
        print(table(record, [name]).splitlines()[-1], flush=True)
    print(f"\nJAX {jax.__version__}, the largest over modes and devices\n")
    print((whole_table if options.whole else table)(record, options.methods))


if __name__ == "__main__":
    main()
