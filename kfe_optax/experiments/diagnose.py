"""The ``diagnose`` command: train, and watch every factorization of one layer's Fisher block."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

import kfe_optax as kfe
from kfe_optax.experiments.data import load
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.diagnose_measure import make_measure
from kfe_optax.experiments.diagnose_report import means_table, plot_diagnosis, theory
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import find_layers, make_job
from kfe_optax.experiments.optimizers import optimizer_settings, refusals
from kfe_optax.experiments.parallel import refuse_processes
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.ranges import check_positive
from kfe_optax.experiments.task import Task
from kfe_optax.experiments.workdirs import claimed

DIAGNOSE_HELP = """\
diagnose
  Trains and measures, every few steps, how far each Kronecker factorization is from the exact Fisher block F of one
  layer, on the step's own batch and in float64. Writes diagnose.csv (step, quantity, method, value) and diagnose.png
  to --workdir and prints the means over training, and whether the theory's inequalities hold at every step.

  --config.diagnose.layer=5          the layer: its number, from 1, or its name; empty: the fifth, or
                                     in a smaller network the one after the middle
  --config.diagnose.optimizer=adam   what trains the network; it follows the config's own schedule
  --config.kfac.fisher=empirical     which F: that of config.diagnose.optimizer where it has one, or else of config.kfac
  --config.diagnose.steps=150        training steps
  --config.diagnose.every=5          steps between two measurements
  --config.diagnose.basis_update_period=50
                                     steps between refreshes of K-FAC's factors, and of EKFAC's basis, in stale_error

quantities in diagnose.csv
  error, spectrum_error              of an estimate from this batch: |F - F'| / |F| in the Frobenius norm, and the
                                     same of the sorted eigenvalues (of a sum of two terms up to 1500 rows of F)
  stale_error                        of the factors of the last refresh (kfac), and of this batch's best
                                     diagonal in their eigenbasis (ekfac)
  correlation                        mean |correlation| between coordinates of the gradient
  loss                               the training loss

example
  kfe-optax diagnose --config=configs/mnist_autoencoder.py --config.data_dir=data/mnist \\
      --config.diagnose.steps=100 --workdir=runs/diagnose
"""


class Diagnosis(NamedTuple):
    """The measured steps, {quantity: {method: values}}, the last correlation matrices, and whether it was cut short."""

    steps: list[int]
    values: dict[str, dict[str, np.ndarray]]
    correlations: dict[str, np.ndarray]  # "parameters" and "kfe"
    interrupted: bool


def diagnose(config: ConfigDict, workdir: str | Path, *, console: Console | None = None) -> Diagnosis:
    """Trains ``config.diagnose.optimizer`` and measures one layer as ``config.diagnose`` says.

    The training is the first ``steps`` steps of the config's own run. The folder receives ``diagnose.csv`` as the
    measurements come, and at the end ``diagnose.png``; earlier ones are replaced. Ctrl-C ends the run after the current
    step, with the picture of what was measured.

    Example::

        config.diagnose.steps = 100
        found = diagnose(config, "runs/diagnose")
        print(found.values["error"]["kpsvd"].mean())
    """
    console = console or Console()
    _check(config)
    dataset = load(config)
    _say(console, "data", dataset.summary())
    with claimed(workdir, "diagnose", ("diagnose.csv", "diagnose.png")) as folder:
        found, layer = _measured(config, dataset, folder / "diagnose.csv", console)
        title = f"{config.title}\n{layer}, while {config.diagnose.optimizer} trains"
        plot_diagnosis(found.steps, found.values, found.correlations, folder / "diagnose.png", title)
        between = np.array(found.steps) % config.diagnose.basis_update_period >= config.diagnose.every
        console.print(means_table(found.values, between, title))
        for sentence in theory(found.values["error"]):
            _say(console, "theory", sentence)
        means = {space: f"{values.mean():.3f}" for space, values in found.values["correlation"].items()}
        words = f"{means['parameters']} in parameter space, {means['kfe']} in the KFE"
        _say(console, "gradient", f"mean |correlation| of its coordinates: {words}")
        _say(console, "written", f"{folder / 'diagnose.csv'}, {folder / 'diagnose.png'}")
    return found


def _measured(config: ConfigDict, dataset: Dataset, path: Path, console: Console) -> tuple[Diagnosis, str]:
    """Trains and measures; also the layer in words."""
    own, steps, history = config.diagnose, [], []
    job = make_job(config, own.optimizer, dataset, max(config.steps, own.steps))
    train, old, clock = job.state, None, time.perf_counter()
    with (
        path.open("w", newline="", encoding="utf-8") as file,
        Interruption() as interruption,
        ProgressDisplay("diagnose", own.steps, console) as display,
    ):
        rows = csv.writer(file)
        rows.writerow(("step", "quantity", "method", "value"))
        for step in range(own.steps + 1):
            batch = job.batches(step)
            if step % own.every == 0:
                now = job.devices.local(train)
                # A batch that grows is measured by its first examples.
                first = jax.tree.map(lambda rows: rows[: config.batch_size], batch)
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), step)
                with jax.enable_x64(True):
                    seen = _double((now.params, first, now.model_state))
                    if old is None:
                        measure, old, layer = _compiled(config, job.task, *seen)
                        _say(console, "layer", layer)
                    refresh = np.array(step % own.basis_update_period < own.every)
                    found, correlations, old = measure(*seen, key, old, refresh)
                    found, correlations = jax.device_get((found, correlations))
                loss = float(found["loss"]["loss"])
                if not math.isfinite(loss):
                    raise ExperimentError(
                        f"The training diverged before step {step}; lower config.{own.optimizer}.learning_rate."
                    )
                steps.append(step)
                history.append(found)
                for quantity, methods in found.items():
                    rows.writerows((step, quantity, method, f"{v:.9g}") for method, v in methods.items())
                file.flush()
                display.show(step, loss, (step + 1) / (time.perf_counter() - clock))
            if interruption.requested or step == own.steps:
                break
            train, _ = job.step(train, batch)
    values = jax.tree.map(lambda *found: np.array(found), *history)
    return Diagnosis(steps, values, correlations, step < own.steps), layer


def _compiled(config: ConfigDict, task: Task, *seen: Any) -> tuple[Callable[..., Any], Any, str]:
    """The measurement in float64, terms to begin with, and the layer in words."""
    settings = [config.get(name, {}) for name in (config.diagnose.optimizer, "kfac")]
    options = next(
        ({field: own[field] for field in ("fisher", "num_samples")} for own in settings if "fisher" in own),
        {},
    )
    params, batch, model_state = seen
    with refusals("kfac", ConfigDict(options)):
        layers = find_layers(task, params, model_state, batch)
        name = find_layer(layers, config.diagnose.layer)
        d_in, d_out = layers[name].sides
        old = (kfe.factors.Term(jnp.eye(d_in), jnp.eye(d_out)),)
        measure = jax.jit(make_measure(task, layers, name, **options))
    return measure, old, f"{name}, {d_in} x {d_out}, F has {d_in * d_out} rows"


def _check(config: ConfigDict) -> None:
    """Refuses what cannot be measured."""
    if "diagnose" not in config:
        raise ExperimentError(
            "The config has no 'diagnose'; let its file start from settings.base_config(...)."
        )
    refuse_processes(config, "diagnose")
    check_positive(config, "batch_size", "diagnose.steps", "diagnose.every", "diagnose.basis_update_period")
    optimizer_settings(config, config.diagnose.optimizer)


def find_layer(layers: kfe.Layers, wanted: str) -> str:
    """The name of the layer that ``config.diagnose.layer`` means.

    Example::

        find_layer(layers, "2")                         # the second layer of the forward pass
    """
    names = list(layers)
    if not wanted:
        return names[min(5, len(names) // 2 + 1, len(names)) - 1]
    if wanted in names:
        return wanted
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return names[int(wanted) - 1]
    raise ExperimentError(
        f"config.diagnose.layer is '{wanted}'; give a number from 1 to {len(names)}, or one of {', '.join(names)}."
    )


def _double(tree: Any) -> Any:
    """Floats as float64: small differences of large norms are measured, of which float32 would lose the digits."""
    arrays = jax.device_get(tree)
    return jax.tree.map(lambda v: v.astype(np.float64) if np.issubdtype(v.dtype, np.floating) else v, arrays)


def _say(console: Console, label: str, text: str) -> None:
    console.print(f"{label:<10} {text}", highlight=False, soft_wrap=True)
