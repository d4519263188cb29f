"""One checkout's K-FAC step: its tracing, its compiled program and its time, measured when the parent asks.

`benchmarks/checkouts.py` starts this file once a checkout, with that checkout first in PYTHONPATH, so that the same lines
measure both: nothing here may need more of `kfe_optax` than both have. A request is a line of JSON on stdin, [what, its
arguments …], and its answer a line of JSON on stdout:

- ["trace"]: seconds of `jax.jit(step).trace(...)` with JAX's caches cleared before;
- ["compile"]: the text of the compiled program, and the bytes that it needs for the duration of a step;
- ["run", steps]: milliseconds of a step, the mean over so many that follow one another, and the loss of the last.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import kfe_optax as kfe
from kfe_optax.experiments.batches import make_batches
from kfe_optax.experiments.config_files import load_config
from kfe_optax.experiments.data import load
from kfe_optax.experiments.task import make_task

# The configs as benchmarks/today has them, with their embedded data; batches that two cores can take.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoencoder": ("mnist_autoencoder", {}),
    "resnet20": ("resnet20", {"data.augment": "", "batch_size": 32}),
    "transformer": ("transformer_characters", {}),
}


RATE = 1e-5  # it changes nothing of what a step costs; with 0.1 the autoencoder ends in NaN, whose factorizations take other time


class Worker:
    """A model's K-FAC step on one batch: `scale_by_kfac` and a rate, no more, and what it is asked for."""

    def __init__(self, model: str):
        name, changes = CONFIGS[model]
        config = load_config(str(Path(__file__).parents[1] / "configs" / f"{name}.py"))
        config.update_from_flattened_dict(changes)
        dataset = load(config)
        task = make_task(config, dataset)
        key = jax.random.key(0)
        batch = jax.tree.map(jnp.asarray, make_batches(config, dataset, 0)(0))
        params, statistics = jax.jit(task.init)(jax.random.fold_in(key, 1), batch["image"])
        layers = kfe.find_layers(task.loss_fn, params, batch, statistics, key, has_aux=task.has_state)
        tx = optax.chain(kfe.scale_by_kfac(layers, 0.1), optax.scale(-RATE))
        differentiate = kfe.value_grad_and_taps(task.loss_fn, layers, has_aux=task.has_state)

        def step(params, opt_state, statistics, batch, count):
            own = jax.random.fold_in(key, count)
            found, grads, taps = differentiate(params, batch, statistics, own, key=own)
            loss, statistics = found if task.has_state else (found, statistics)
            updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
            return optax.apply_updates(params, updates), opt_state, statistics, loss

        self._step, self._batch, self._count = step, batch, 0
        self._state = params, jax.jit(tx.init)(params), statistics
        self._traced: Any = None
        self.compiled: Any = None

    def trace(self) -> float:
        """Seconds."""
        jax.clear_caches()
        jitted = jax.jit(self._step, donate_argnums=(0, 1, 2))
        clock = time.perf_counter()
        self._traced = jitted.trace(*self._state, self._batch, jnp.asarray(0, jnp.int32))
        return time.perf_counter() - clock

    def compile(self) -> dict[str, Any]:
        """The program that was traced last."""
        self.compiled = self._traced.lower().compile()
        return {
            "text": self.compiled.as_text(),
            "bytes": self.compiled.memory_analysis().temp_size_in_bytes,
        }

    def run(self, steps: int) -> dict[str, float]:
        """Milliseconds of a step; the steps go on where the last request ended, refreshes among them."""
        loss = None
        clock = time.perf_counter()
        for _ in range(steps):
            count = jnp.asarray(self._count, jnp.int32)
            *self._state, loss = self.compiled(*self._state, self._batch, count)
            self._count += 1
        jax.block_until_ready(self._state)
        return {"milliseconds": 1000 * (time.perf_counter() - clock) / steps, "loss": float(loss)}


def main() -> None:
    model, checkout = sys.argv[1:]
    if Path(checkout) not in Path(kfe.__file__).resolve().parents:
        raise SystemExit(f"kfe_optax was imported from {kfe.__file__}, not from {checkout}.")
    worker = Worker(model)
    answers = {"trace": worker.trace, "compile": worker.compile, "run": worker.run}
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(answers[what](*arguments)), flush=True)


if __name__ == "__main__":
    main()
