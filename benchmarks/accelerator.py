"""One command of at most nine minutes that says how this package does on this machine's device: a Markdown report and a JSON.

    python -m benchmarks.accelerator --out report

In this order, and as far as `--minutes` go (what no time was left for is named at the end):

- `tests`: oracles in float64 on the device, a chosen part of the tests;
- `precision`: one step of every method in float32 and with TF32 products, how far it is from the CPU's in float64;
- `algebra`: milliseconds of Cholesky, eigh, QR, this package's inverse and msign on matrices of 256 to 4,096;
- `steps`: what a step costs beside Adam's, Muon's and SOAP's, on the MNIST autoencoder at batch 512, on a Transformer of width
  1,024 and on ResNet20: the median, the dearest (the one that refreshes), compilation, memory;
- `training`: loss against seconds on the autoencoder.

On a CPU the sizes are smaller; `--size` sets them. Everything is written after each part, so that a run that is cut off leaves
what it has found.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfe_optax as kfe
from benchmarks.today.programs import step_of, train
from benchmarks.today.tasks import OPTIMIZERS, configured
from kfe_optax import polar
from kfe_optax._linalg import kronecker

TESTS = (
    "tests/test_kfac_oracle.py",
    "tests/test_ekfac_oracle.py",
    "tests/test_kronecker_oracle.py",
    "tests/test_polar.py",
)


class Size(NamedTuple):
    """Matrices, {model: (config, changes)}, steps that are timed and of training; of which optimizers and methods."""

    matrices: tuple[int, ...]
    models: Mapping[str, tuple[str, dict[str, Any]]]
    timed: int
    trained: int
    optimizers: tuple[str, ...] = ("adam", "muon", "soap", "kfac", "ekfac", "spectral_kfac")
    methods: tuple[str, ...] = tuple(kfe.METHODS)


def _transformer(width: int, depth: int, batch: int, length: int) -> tuple[str, dict[str, Any]]:
    changes = {"model.width": width, "model.depth": depth, "model.heads": max(1, width // 64)}
    return "transformer_characters", changes | {
        "model.hidden": 4 * width,
        "data.length": length,
        "batch_size": batch,
    }


_AUTOENCODER = ("mnist_autoencoder", {"batch_size": 512})
_RESNET = ("resnet20", {"data.augment": "", "batch_size": 512})
SIZES = {
    "full": Size(
        (256, 512, 1024, 2048, 4096),
        {"autoencoder": _AUTOENCODER, "transformer": _transformer(1024, 8, 16, 256), "resnet20": _RESNET},
        120,
        980,
    ),
    "small": Size(
        (256, 512),
        {"autoencoder": _AUTOENCODER, "transformer": _transformer(128, 2, 8, 64)},
        55,
        100,
    ),
    "tiny": Size(
        (8,),
        {"autoencoder": ("mnist_small", {"model.sizes": (784, 8, 784), "batch_size": 8})},
        3,
        4,
        ("adam", "kfac"),
        ("kfac", "ekfac"),
    ),
}


@dataclasses.dataclass
class Report:
    """What was found, a table a part; `rows` are dictionaries with the same keys."""

    device: str
    out: Path
    deadline: float
    parts: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def over(self, what: str) -> bool:
        """Whether no time is left for something, which is then named in the report."""
        over = time.monotonic() > self.deadline
        if over:
            self.left_out.append(what)
        return over

    def add(self, part: str, **row: Any) -> None:
        self.parts.setdefault(part, []).append(row)
        print(f"{part}: {', '.join(f'{k} {_shown(v)}' for k, v in row.items() if k != 'curve')}", flush=True)
        self.write()

    def write(self) -> None:
        found = {"device": self.device, "parts": self.parts, "left out": self.left_out}
        self.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
        self.out.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        lines = [f"# {self.device}", ""]
        for part, rows in self.parts.items():
            columns = [name for name in rows[0] if name != "curve"]
            lines += [f"## {part}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_shown(row[name]) for name in columns)} |" for row in rows]
            lines.append("")
        if self.left_out:
            lines += [f"No time was left for: {', '.join(self.left_out)}.", ""]
        return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tests(report: Report, size: Size) -> None:
    """Oracles on the device."""
    del size
    if importlib.util.find_spec("pytest") is None or report.over("tests"):
        return
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", *TESTS]
    environment = {**os.environ, "KFE_OPTAX_TESTS_ON": jax.default_backend()}
    clock = time.monotonic()
    left = max(1.0, report.deadline - clock)
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=left, check=False
        )
        words = (ended.stdout.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired:
        words = "no time left"
    report.add("tests", result=words, seconds=time.monotonic() - clock)


def precision(report: Report, size: Size) -> None:
    """‖Δ − Δ₆₄‖ / ‖Δ₆₄‖ of a first step, Δ₆₄ that of the CPU in float64."""
    for name in size.methods:
        method = kfe.METHODS[name]
        if report.over(f"precision of {name}"):
            return
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            exact = _one_step(method.scale_by, jnp.float64)
        row = {}
        for words, products in (("float32", "highest"), ("TF32 products", "tensorfloat32")):
            with jax.default_matmul_precision(products):
                found = _one_step(method.scale_by, jnp.float32)
            row[words] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        report.add("precision", method=name, **row)


def _one_step(scale_by: Callable[..., Any], dtype: Any) -> np.ndarray:
    """The update of a small network's layers, from the exact Fisher."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((12, 16), (16, 5), (64, 12))
    drawn = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))
    first, second, x = (array.astype(dtype) for array in drawn)
    params, labels = {"in": {"kernel": first / 4}, "out": {"kernel": second / 4}}, jnp.arange(64) % 5

    def loss_fn(params, x, labels):
        logits = jnp.tanh(x @ params["in"]["kernel"]) @ params["out"]["kernel"]
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    layers = kfe.find_layers(loss_fn, params, x, labels)
    tx = scale_by(layers, 0.1)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, labels)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(updates)])


def algebra(report: Report, size: Size) -> None:
    """Milliseconds, the median of three."""
    operations = {
        "Cholesky": jnp.linalg.cholesky,
        "inverse": lambda m: kronecker.inverse(m[None])[0],
        "eigh": jnp.linalg.eigh,
        "QR": jnp.linalg.qr,
        "msign": polar.msign,
        "product": lambda m: m @ m,
    }
    for d in size.matrices:
        if report.over(f"algebra at {d}"):
            return
        square = jax.random.normal(jax.random.key(d), (d, d))
        matrix = square @ square.T / d + jnp.eye(d)
        row = {name: 1000 * _median(jax.jit(operation), matrix) for name, operation in operations.items()}
        report.add("algebra", size=d, **row)


def _median(function: Callable[..., Any], *arguments: Any) -> float:
    seconds = []
    for _ in range(4):  # the first compiles
        clock = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - clock)
    return float(np.median(seconds[1:]))


def steps(report: Report, size: Size) -> None:
    """A step of each optimizer with its defaults; milliseconds."""
    for model, (config, changes) in size.models.items():
        problem = configured(config, changes)
        adam = None
        for name in size.optimizers:
            if report.over(f"{name} on the {model}"):
                return
            found = _timed(problem, name, size.timed)
            adam = found["mean"] if name == "adam" else adam
            ratio = {} if adam is None else {"in Adam's": found["mean"] / adam}
            report.add("steps", model=model, optimizer=name, **found, **ratio)


def _timed(problem: Any, name: str, count: int) -> dict[str, Any]:
    recipe = OPTIMIZERS[name]
    step, state, batch = step_of(problem, recipe, lambda layers: recipe.make(recipe.unit / 100, layers), 0)
    numbers = [jnp.asarray(i, jnp.int32) for i in range(count + 2)]
    clock = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, batch, numbers[0]).compile()
    compilation = time.perf_counter() - clock
    seconds = []
    for number in numbers:
        clock = time.perf_counter()
        *state, loss = jax.block_until_ready(compiled(*state, batch, number))
        seconds.append(time.perf_counter() - clock)
    milliseconds = 1000 * np.asarray(seconds[2:])
    memory = compiled.memory_analysis()
    return {
        "median": float(np.median(milliseconds)),
        "mean": float(milliseconds.mean()),
        "dearest": float(milliseconds.max()),
        "labels a second": 1000 * batch["label"].size / float(milliseconds.mean()),
        "compiling, s": compilation,
        "temporary, MB": memory.temp_size_in_bytes / 1e6,
        "state, MB": sum(leaf.nbytes for leaf in jax.tree.leaves(state[1])) / 1e6,
        "loss": float(loss),
    }


def training(report: Report, size: Size) -> None:
    """The autoencoder, each optimizer at its recommended rate; the curve is in the JSON."""
    model = next(iter(size.models))
    problem = configured(*size.models[model])._replace(steps=size.trained)
    for name in size.optimizers:
        if report.over(f"training with {name}"):
            return
        recipe = OPTIMIZERS[name]
        run = train(problem, recipe, recipe.unit, 0)
        _, seconds, loss = run["curve"][-1]
        row = {"loss": loss, "seconds": seconds, "compiling, s": run["compile"], "failures": run["failures"]}
        report.add("training", optimizer=name, steps=size.trained, **row, curve=run["curve"])


PARTS = {part.__name__: part for part in (tests, precision, algebra, steps, training)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("accelerator"), help="without .md and .json")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    size = SIZES[options.size or ("small" if device.platform == "cpu" else "full")]
    # What is begun is finished: a compilation at the end may take a minute.
    deadline = time.monotonic() + 60 * (options.minutes - min(1.0, options.minutes / 4))
    words = f"{device.device_kind}, JAX {jax.__version__}, kfe_optax {kfe.__version__}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(words, options.out, deadline)
    for part in options.parts:
        PARTS[part](report, size)
    report.write()
    print(report.markdown())


if __name__ == "__main__":
    main()
