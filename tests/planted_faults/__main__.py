"""`python -m tests.planted_faults`: measure, in about an hour on two cores. Interrupted, it goes on where it was."""

from __future__ import annotations

import argparse
import pathlib
import shutil
import warnings

# Sets the environment of all tests, and loads JAX, which the forked processes then share.
from tests import conftest  # noqa: F401  # isort: skip
import chex  # noqa: F401
import flax.linen
import flax.nnx  # noqa: F401
import hypothesis  # noqa: F401
import jax.experimental.jet  # noqa: F401
import optax  # noqa: F401

from . import coverage_map, faults, planting, table

STATE = faults.ROOT / ".planted_faults"


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.planted_faults", description=__doc__)
    parser.add_argument("--only", default="", metavar="WORDS", help="faults with this in their name or area")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--marker", default="not nightly", help="which tests count, as for pytest -m")
    parser.add_argument(
        "--tests",
        nargs="+",
        default=["test_*.py"],
        metavar="PATTERN",
        help="the test files that count, such as 'tests/test_tracing*.py'",
    )
    parser.add_argument(
        "--fresh",
        choices=["results", "all"],
        help="forget the results first, or also the map of what the tests execute: it knows no test that is newer",
    )
    parser.add_argument("--state", type=pathlib.Path, default=STATE)
    given = parser.parse_args()
    # Nothing has been computed when the processes fork, so no thread of JAX's is lost.
    warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
    if given.fresh == "all":
        shutil.rmtree(given.state / "map", ignore_errors=True)
    if given.fresh:
        shutil.rmtree(given.state / "results", ignore_errors=True)
    everything = faults.read()
    for fault in everything:
        fault.planted((faults.ROOT / fault.file).read_text())
    coverage_map.measure(given.state / "map", given.tests, given.marker, given.processes)
    maps = coverage_map.load(given.state / "map", given.tests, coverage_map.collect(given.marker))
    chosen = [fault for fault in everything if given.only in fault.name or given.only in fault.area]
    for line in planting.run(chosen, maps, given.state / "results", given.processes):
        print(line, flush=True)
    print(table.write(everything, given.state / "results"))


if __name__ == "__main__":
    main()
