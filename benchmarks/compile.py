"""What the first step costs: seconds of tracing, lowering and compiling, and how large the program is, Adam's beside it.

    python -m benchmarks.compile --models transformer --optimizers adam kfac ekfac spectral_kfac

Each program is the whole training step of an optimizer with its defaults, compiled by itself and from nothing. Seconds are those
of the processor, all threads together, so that other work on the machine changes them little; with `--rounds` the programs take
turns, and the medians count. Kernels are what XLA generates code for on a CPU: fusions, and what stands alone.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kfe_optax as kfe
from benchmarks.programs import inner_jaxprs, instructions
from benchmarks.step_worker import CONFIGS
from benchmarks.today.programs import step_of
from benchmarks.today.tasks import OPTIMIZERS, configured
from kfe_optax._layers.table import align

# What compiles to nothing, or calls a library.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "custom-call",
    "while",
    "conditional",
    "call",
}
_COLUMNS = ("tracing", "lowering", "compiling", "all")


def measure(model: str, optimizer: str) -> dict[str, float]:
    """Seconds of the processor by stage; equations of the jaxpr, instructions and kernels of the program."""
    config, changes = CONFIGS[model]
    recipe = OPTIMIZERS[optimizer]
    jax.clear_caches()
    step, start, batch = step_of(
        configured(config, changes), recipe, lambda layers: recipe.make(1e-3, layers), 0
    )
    jax.clear_caches()
    clocks = [time.process_time()]
    traced = jax.jit(step, donate_argnums=(0, 1, 2)).trace(*start, batch, jnp.zeros((), jnp.int32))
    clocks.append(time.process_time())
    lowered = traced.lower()
    clocks.append(time.process_time())
    compiled = lowered.compile()
    clocks.append(time.process_time())
    seconds = [end - begin for begin, end in zip(clocks, clocks[1:], strict=False)]
    return {
        **dict(zip(_COLUMNS, [*seconds, sum(seconds)], strict=True)),
        "equations": equations(traced.jaxpr.jaxpr),
        "instructions": sum(map(len, instructions(compiled)[0].values())),
        "kernels": kernels(compiled),
    }


def equations(jaxpr: Any) -> int:
    """Those of branches, loops and calls among them, once for each place that they are called from."""
    return sum(1 + sum(map(equations, inner_jaxprs(eqn.params.values()))) for eqn in jaxpr.eqns)


def kernels(compiled: Any) -> int:
    """How many fusions, and instructions that stand alone, those of branches and loops among them."""
    computations, _ = instructions(compiled)
    lines = [line for body in computations.values() for line in body]
    # What a fusion, a reduction or a scatter is made of is compiled with it; branches and bodies are computations of their own.
    own = {"while", "conditional", "call"}
    inside = {name for line in lines if line.opcode not in own for name in line.called()}
    return sum(
        line.opcode not in _FREE for name, body in computations.items() if name not in inside for line in body
    )


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """One optimizer a row, with the ratio of its seconds to those of the first."""
    medians = {
        name: {column: statistics.median(turn[column] for turn in turns) for column in turns[0]}
        for name, turns in measured.items()
    }
    first = next(iter(medians.values()))["all"]
    rows = [
        [name, *(f"{own[c]:.2f}" for c in _COLUMNS), f"{own['all'] / first:.1f}"]
        + [f"{own[c]:,.0f}" for c in ("equations", "instructions", "kernels")]
        for name, own in medians.items()
    ]
    header = ["", *(f"{column}, s" for column in _COLUMNS), "ratio", "equations", "instructions", "kernels"]
    return align(header, rows, right=range(1, len(header)))


def report(models: Sequence[str], optimizers: Sequence[str], rounds: int) -> str:
    parts = []
    for model in models:
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in optimizers}
        for _ in range(rounds):
            for name in optimizers:
                measured[name].append(measure(model, name))
        parts.append(f"{model}\n{table(measured)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["adam", "kfac", "ekfac", "spectral_kfac"],
        choices=list(OPTIMIZERS),
    )
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}, kfe_optax {kfe.__version__}"
    )
    print(report(options.models, options.optimizers, options.rounds))


if __name__ == "__main__":
    main()
