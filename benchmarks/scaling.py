"""Training on 1 to 8 devices: what a step costs, what each device keeps and computes, and what the devices send.

A network of equal dense layers, by data-parallel `jax.jit` over a mesh, with one global batch for any number of devices. On
real accelerators seconds fall as work is divided. Fake devices of one CPU (made here where there is no accelerator) share its
cores: dividing the batch gains nothing, and what each of n devices repeats takes n times as long. What is counted holds for both:

- factorizations of a refresh on the device that has the most, and their floating-point operations (2 d³ for a Cholesky inverse,
  9 d³ for an eigendecomposition), counted in the traced program;
- bytes of optimizer state a device, and of transient memory (XLA's buffer assignment);
- bytes that a device sends, by the collectives of the compiled program (`benchmarks/traffic.py`): in every step, and inside
  conditionals, that is in a refresh (here of factors and inverses at once). Beside each, what the paper model of
  `benchmarks/communication.py` says; for "sharded", where the compiler decides what it gathers, that is the least.

All optimizers take their steps in turn, so that a noisy machine slows all of them alike; a time is a median, and the steps that
refresh are apart from the others. `--model 1024` prints the model for 1,024 accelerators and networks of real size. From the
root of the repository:

    python -m benchmarks.scaling
    python -m benchmarks.scaling --layers 2 8 --widths 64 256 --devices 1 8 --optimizers adam kfac "kfac inverses"
    python -m benchmarks.scaling --model 1024
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Read when JAX starts, and by its CPU alone: an accelerator is used where there is one. A number of one's own stands after it.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}".strip()
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import kfe_optax as kfe
from benchmarks import communication
from benchmarks.communication import PER_CUBE
from benchmarks.programs import inner_jaxprs
from benchmarks.traffic import Traffic, traffic
from kfe_optax._layers.table import align, quantity

CLASSES = 10
# The primitive that factorizes.
FACTORIZATION = {"kfac": "cholesky", "ekfac": "eigh"}
OPTIMIZERS = ("adam", *communication.OPTIMIZERS)


class Network(nn.Module):
    layers: int
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers - 1):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(CLASSES)(x)


@dataclasses.dataclass
class Run:
    """One optimizer on some devices: the compiled step with what it is given, what was counted, and the seconds measured."""

    name: str
    step: Callable[..., Any]
    state: tuple[Any, Any]
    batch: Any
    work: tuple[int, float]
    sent: Traffic
    predicted: communication.Volume
    transient: int
    seconds: list[float] = dataclasses.field(default_factory=list)

    def take(self, key: jax.Array) -> None:
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.step(*self.state, self.batch, key))
        self.seconds.append(time.perf_counter() - start)

    def row(self, devices: int, period: int) -> tuple[str, ...]:
        """The first period, in which memory is touched for the first time, is left out of the times."""
        refresh = self.seconds[period::period]
        others = [s for i, s in enumerate(self.seconds) if i >= period and i % period]
        number, flops = self.work
        pairs = (
            (self.sent.always, self.predicted.step),
            (self.sent.branches, self.predicted.factors + self.predicted.inverses),
        )
        return (
            self.name,
            str(devices),
            f"{1e3 * np.median(others):.1f}",
            f"{1e3 * np.median(refresh):.1f}",
            str(number),
            quantity(flops, "FLOP"),
            quantity(max(kfe.state_bytes_per_device(self.state[1]).values()), "B"),
            quantity(self.transient, "B"),
            *(text for found, said in pairs for text in (quantity(found, "B"), quantity(said, "B"))),
        )


HEADER = (
    "optimizer",
    "devices",
    "ms",
    "refresh ms",
    "factorizations",
    "their work",
    "state",
    "transient",
    "every step",
    "model",
    "refresh",
    "model",
)


def make_optimizer(name: str, layers: kfe.Layers, mesh: Any, period: int) -> Any:
    """From its name: the method, then who computes ("inverses", ...) or keeps ("sharded") what."""
    method, *how = name.split()
    if method == "adam":
        return optax.adam(1e-3)
    inverses = "basis_update_period" if method == "ekfac" else "inverse_update_period"
    options = {"factor_update_period": period, inverses: period, "initial_refreshes": 1}
    distribute = next((word for word in how if word != "sharded"), "none")
    scale_by = kfe.METHODS[method].scale_by(layers, 0.1, distribute=distribute, **options)
    tx = optax.chain(scale_by, optax.scale_by_learning_rate(1e-3))
    return kfe.shard_state(tx, mesh, min_size=256) if "sharded" in how else tx


def build(names: list[str], devices: int, depth: int, width: int, batch: int, period: int) -> Iterator[Run]:
    """Compiles a step of each optimizer."""
    mesh = jax.make_mesh(
        (devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    everywhere, divided = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    network = Network(depth, width)
    given = jax.device_put(example_batch(width, batch), divided)
    params = jax.device_put(network.init(jax.random.key(1), given[0])["params"], everywhere)

    def loss_fn(params, x, y):
        logits = network.apply({"params": params}, x)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    layers = kfe.find_layers(loss_fn, params, *given)
    for name in names:
        tx = make_optimizer(name, layers, mesh, period)
        state = tx.init(params)
        state = state if "sharded" in name else jax.device_put(state, everywhere)
        step = make_step(tx, loss_fn, layers if name != "adam" else None)
        kept = jax.tree.map(lambda v: v.sharding, (params, state))
        with jax.set_mesh(mesh):
            jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=kept)
            args = jax.tree.map(jnp.array, params), state, given, jax.random.key(0)
            traced = jitted.trace(*args)
            program = traced.lower().compile()
        yield Run(
            name,
            program,
            args[:2],
            given,
            factorizations(traced.jaxpr.jaxpr, name.split()[0]),
            traffic(program, devices),
            communication.predicted(name, [layer.sides for layer in layers.values()], devices),
            program.memory_analysis().temp_size_in_bytes,
        )


def example_batch(width: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(batch, width)).astype(np.float32), generator.integers(0, CLASSES, batch)


def make_step(tx: Any, loss_fn: Any, layers: kfe.Layers | None) -> Callable[..., Any]:
    def curvature_step(params, opt_state, batch, key):
        _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, *batch, key=key)
        updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        return optax.apply_updates(params, updates), opt_state

    def plain_step(params, opt_state, batch, key):
        del key
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, *batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return plain_step if layers is None else curvature_step


def factorizations(jaxpr: Any, method: str) -> tuple[int, float]:
    """How many matrices the device that has the most to do factorizes, and the FLOPs of it."""
    number, flops = 0, 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == FACTORIZATION.get(method):
            *lead, d, _ = eqn.invars[0].aval.shape
            inside = [(math.prod(lead), math.prod(lead) * PER_CUBE[method] * d**3)]
        else:
            inside = [factorizations(sub, method) for sub in inner_jaxprs(eqn.params.values())]
        if eqn.primitive.name == "cond" and inside:
            inside = [max(inside, key=lambda found: found[1])]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        number += times * sum(found[0] for found in inside)
        flops += times * sum(found[1] for found in inside)
    return number, flops


def measure(options: argparse.Namespace, devices: int, depth: int, width: int) -> list[Run]:
    """All optimizers on so many devices, step by step in turn."""
    runs = list(build(options.optimizers, devices, depth, width, options.batch, options.period))
    for i in range((1 + options.refreshes) * options.period):
        for run in runs:
            run.take(jax.random.key(i))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, nargs="*", default=[9], help="depths of the network")
    parser.add_argument("--widths", type=int, nargs="*", default=[128])
    parser.add_argument("--batch", type=int, default=128, help="examples of a step, on all devices together")
    parser.add_argument(
        "--optimizers", nargs="*", default=list(OPTIMIZERS), choices=OPTIMIZERS, metavar="NAME"
    )
    parser.add_argument("--period", type=int, default=5, help="steps from refresh to refresh")
    parser.add_argument("--refreshes", type=int, default=5, help="how many are timed")
    parser.add_argument("--model", type=int, metavar="N", help="print the paper model for N devices instead")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s a device, for the model")
    parser.add_argument(
        "--periods", type=int, nargs=2, default=[10, 50], help="factors, inverses; for the model"
    )
    options = parser.parse_args()
    if options.model:
        print(communication.report(options.model, options.bandwidth, *options.periods))
        return
    here = jax.devices()
    print(
        f"{platform.machine()}, {len(here)} × {here[0].device_kind}, JAX {jax.__version__}, batch {options.batch}"
    )
    for depth, width in itertools.product(options.layers, options.widths):
        rows = []
        for devices in options.devices:
            if devices > len(here):
                print(f"{devices} devices are left out: there are {len(here)}.")
                continue
            rows += [run.row(devices, options.period) for run in measure(options, devices, depth, width)]
        rows.sort(key=lambda row: options.optimizers.index(row[0]))
        print(f"\n{depth} layers of width {width}\n")
        print(align(HEADER, rows, right=range(1, len(HEADER))), flush=True)


if __name__ == "__main__":
    main()
