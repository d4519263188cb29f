"""What a step costs beside Adam's, on the MNIST autoencoder, with a FLOP-based lower bound beside each figure.

All optimizers run in one process and in turn, step by step, so that a noisy machine slows all of them alike. A step's
cost is the mean over two whole refresh periods; the median of the steps that refresh nothing and the dearest step are
reported too.

`--model` measures K-FAC's step alone instead, on one of three models: seconds of tracing, instructions of the compiled program,
temporary memory and milliseconds; `--against FOLDER` measures another checkout of this repository in the same run, in turn
with this one. Run `python -m benchmarks.step_cost --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfe_optax as kfe
from benchmarks import checkouts
from benchmarks.step_worker import CONFIGS
from kfe_optax._layers.table import align

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
PERIOD = 100
PART, IN_PART = 1 / 8, ", an eighth"


class Autoencoder(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        code = len(self.sizes) // 2
        for i, size in enumerate(self.sizes[1:], 1):
            x = nn.Dense(size)(x)
            x = x if i in (code, len(self.sizes) - 1) else nn.relu(x)
        return x


@dataclasses.dataclass
class Run:
    """One optimizer under measurement: its compiled step, its state, the FLOPs of a step and the seconds measured."""

    name: str
    step: Callable[..., Any]
    state: tuple[Any, Any]
    flops: float
    seconds: list[float] = dataclasses.field(default_factory=list)

    def take(self, x: jax.Array, key: jax.Array) -> None:
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.step(*self.state, x, key))
        self.seconds.append(time.perf_counter() - start)


def gradient_flops(sides: list[tuple[int, int]], batch: int) -> float:
    """A matrix product forward, two backward; the first layer needs no gradient of its input."""
    products = [2.0 * batch * d_in * d_out for d_in, d_out in sides]
    return 3 * sum(products) - products[0]


def fisher_flops(sides: list[tuple[int, int]], batch: int) -> float:
    """One factor update: the backward products that reach each layer's output, and the two Gram matrices."""
    back = [2.0 * batch * d_in * d_out for d_in, d_out in sides[1:]]
    gram = [2.0 * batch * (d_in**2 + d_out**2) for d_in, d_out in sides]
    return sum(back) + sum(gram)


def application_flops(sides: list[tuple[int, int]], products: int) -> float:
    """Products with a (d_in, d_in) and a (d_out, d_out) matrix: one pair for inverses, two for an eigenbasis."""
    return sum(products * 2.0 * (d_in**2 * d_out + d_in * d_out**2) for d_in, d_out in sides)


def factorization_flops(sides: list[tuple[int, int]], per_cube: float) -> float:
    return sum(per_cube * (d_in**3 + d_out**3) for d_in, d_out in sides)


def build(batch: int, names: list[str]) -> tuple[list[Run], jax.Array]:
    model = Autoencoder(SIZES)
    x = jax.random.uniform(jax.random.key(0), (batch, SIZES[0]))
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params, x):
        logits = model.apply({"params": params}, x)
        return kfe.losses.sigmoid_binary_cross_entropy(logits, x).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    sides = [layer.sides for layer in layers.values()]
    gradient = gradient_flops(sides, batch)
    fisher = fisher_flops(sides, batch)
    inverse = application_flops(sides, 1)
    rotation = application_flops(sides, 2)
    cholesky, eigh = factorization_flops(sides, 2.0), factorization_flops(sides, 9.0)
    never = 1_000_000_000
    rate = optax.scale_by_learning_rate(1e-5)

    def kfac(factors, inverses):
        return optax.chain(
            kfe.scale_by_kfac(
                layers,
                10.0,
                factor_update_period=factors,
                inverse_update_period=inverses,
                initial_refreshes=1,
            ),
            rate,
        )

    def ekfac(factors, basis):
        return optax.chain(
            kfe.scale_by_ekfac(layers, 10.0, factor_update_period=factors, basis_update_period=basis), rate
        )

    def kronecker(method):
        scale_by = kfe.METHODS[method].scale_by
        options = {"factor_update_period": 10, "inverse_update_period": PERIOD, "initial_refreshes": 1}
        return optax.chain(scale_by(layers, 10.0, **options), rate)

    known = {
        "gradient": (optax.sgd(1e-5), gradient),
        "adam": (optax.adam(1e-5), gradient),
        "kfac, never refreshed": (kfac(never, never), gradient + inverse),
        "ekfac, never refreshed": (ekfac(never, never), gradient + rotation),
        "kfac 10/100": (kfac(10, PERIOD), gradient + inverse + fisher / 10 + cholesky / PERIOD),
        "ekfac 10/100": (ekfac(10, PERIOD), gradient + rotation + fisher / 10 + eigh / PERIOD),
        "kfac 1/100": (kfac(1, PERIOD), gradient + inverse + fisher + cholesky / PERIOD),
    }
    # Curvature from a part of the batch takes a forward pass on it as well.
    part = (fisher + gradient / 3) * PART
    known[f"kfac 10/100{IN_PART}"] = kfac(10, PERIOD), gradient + inverse + part / 10 + cholesky / PERIOD
    known[f"kfac 1/100{IN_PART}"] = kfac(1, PERIOD), gradient + inverse + part + cholesky / PERIOD
    products = [2.0 * batch * d_in * d_out for d_in, d_out in sides]
    # Two tangents: x V and the last tangent's own product in each layer; the loss at the new parameters is one forward pass.
    tangents = 2 * (2 * sum(products) - products[0]) + sum(products) / 5
    for search, times in ((None, 1), (50, 3)):
        known[f"kfac_adaptive 10/50{', searching' if search else ''}"] = (
            kfe.kfac_adaptive(
                layers,
                initial_damping=10.0,
                search_period=search,
                factor_update_period=10,
                inverse_update_period=50,
            ),
            gradient + inverse + fisher / 10 + times * cholesky / 50 + tangents,
        )
    rank_1 = gradient + inverse + fisher / 10 + cholesky / PERIOD
    rank_2 = gradient + rotation + fisher / 10 + (cholesky + eigh) / PERIOD
    for method, flops in (
        ("tkfac", rank_1),
        ("kpsvd", rank_1),
        ("deflation", rank_2),
        ("lanczos", rank_2),
        ("kfac_corrected", rank_2),
    ):
        known[f"{method} 10/100"] = (kronecker(method), flops)
    runs = []
    for name in names or known:
        tx, flops = known[name]
        curvature = name not in ("gradient", "adam")
        options = {"quadratic_model": name.startswith("kfac_adaptive")}
        if name.endswith(IN_PART):
            options["statistics_fraction"] = PART
        step = _step(tx, loss_fn, layers if curvature else None, options)
        copy = jax.tree.map(jnp.array, params)
        runs.append(Run(name, step, (copy, tx.init(copy)), flops))
    return runs, x


def _step(tx: Any, loss_fn: Any, layers: Any, options: dict[str, Any]) -> Callable[..., Any]:
    def curvature_step(params, opt_state, x, key):
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, **options)
        _, grads, taps = differentiate(params, x, key=key)
        updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
        return optax.apply_updates(params, updates), opt_state

    def plain_step(params, opt_state, x, key):
        del key
        grads = jax.grad(loss_fn)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(plain_step if layers is None else curvature_step, donate_argnums=(0, 1))


def application_seconds(batch_runs: list[Run], repeats: int) -> dict[str, float]:
    """Seconds of the preconditioner's matrix products alone, compiled by themselves on random matrices."""
    pairs = [(d_in + 1, d_out) for d_in, d_out in zip(SIZES[:-1], SIZES[1:], strict=True)]
    keys = iter(jax.random.split(jax.random.key(2), 3 * len(pairs)))
    gradient = [jax.random.normal(next(keys), pair) for pair in pairs]
    left = [jax.random.normal(next(keys), (d, d)) for d, _ in pairs]
    right = [jax.random.normal(next(keys), (d, d)) for _, d in pairs]

    @jax.jit
    def inverse(v, a, g):
        return [a_i @ v_i @ g_i for v_i, a_i, g_i in zip(v, a, g, strict=True)]

    @jax.jit
    def rotation(v, a, g, s):
        scaled = [(a_i.T @ v_i @ g_i) / s_i for v_i, a_i, g_i, s_i in zip(v, a, g, s, strict=True)]
        return [a_i @ v_i @ g_i.T for v_i, a_i, g_i in zip(scaled, a, g, strict=True)]

    scale = [1 + jnp.square(v) for v in gradient]
    times: dict[str, list[float]] = {"kfac": [], "ekfac": []}
    for _ in range(repeats + 1):
        for name, call in (
            ("kfac", lambda: inverse(gradient, left, right)),
            ("ekfac", lambda: rotation(gradient, left, right, scale)),
        ):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
        for run in batch_runs:
            run.take(*_arguments)
    return {name: float(np.median(seconds[1:])) for name, seconds in times.items()}


_arguments: tuple[jax.Array, jax.Array]


def main() -> None:
    global _arguments
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument(
        "--steps",
        type=int,
        help=f"{2 * PERIOD}, two refresh periods, by default; with --model those of a round, by default {checkouts.STEPS}",
    )
    parser.add_argument("--only", nargs="*", default=[], help="names of the rows to run")
    parser.add_argument("--model", choices=CONFIGS, help="measure K-FAC's step on this model instead")
    parser.add_argument("--against", metavar="FOLDER", help="with --model: another checkout, measured too")
    options = parser.parse_args()
    if options.against and not options.model:
        parser.error("--against needs --model.")
    if options.model:
        print(f"{options.model}, {platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}")
        print(checkouts.report(options.model, options.against, options.steps or checkouts.STEPS))
        return
    runs, x = build(options.batch, options.only)
    for run in runs:
        for warm_up in range(2):  # the first call compiles
            run.take(x, jax.random.key(warm_up))
        run.seconds.clear()
    # Step counts start at 2 here, so that any `--steps` divisible by the period holds whole periods.
    for i in range(options.steps or 2 * PERIOD):
        for run in runs:
            run.take(x, jax.random.key(2 + i))
    base = next((run for run in runs if run.name == "adam"), runs[0])
    adam = float(np.mean(base.seconds))
    rows = []
    for run in runs:
        mean, median, top = np.mean(run.seconds), np.median(run.seconds), np.max(run.seconds)
        rows.append(
            (
                run.name,
                f"{1e3 * mean:.1f}",
                f"{mean / adam:.2f}",
                f"{run.flops / base.flops:.2f}",
                f"{1e3 * median:.1f}",
                f"{1e3 * top:.1f}",
                f"{run.flops / mean / 1e9:.0f}",
            )
        )
    print(
        f"{platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}, batch {options.batch}"
    )
    header = ("step", "mean ms", "× Adam", "bound", "median ms", "dearest ms", "GFLOP/s")
    print(align(header, rows, right=range(1, 7)))

    by_name = {run.name: run for run in runs}
    never = [name for name in by_name if name.endswith("never refreshed")]
    if "gradient" in by_name and never:
        _arguments = (x, jax.random.key(0))
        for name in ("gradient", *never):
            by_name[name].seconds.clear()
        alone = application_seconds([by_name[name] for name in ("gradient", *never)], repeats=30)
        gradient = float(np.median(by_name["gradient"].seconds))
        print(
            "\nA step that refreshes nothing, against a plain gradient step plus the preconditioner's products:"
        )
        for name in never:
            step = float(np.median(by_name[name].seconds))
            apply = alone[name.split(",")[0]]
            print(
                f"  {name}: {1e3 * step:.1f} ms = {step / (gradient + apply):.2f} × "
                f"({1e3 * gradient:.1f} ms + {1e3 * apply:.1f} ms)"
            )


if __name__ == "__main__":
    main()
