"""The ``diagnose`` command: train, and watch how far every factorization is from one layer's Fisher block."""

from __future__ import annotations

import csv
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.console import Console

import kfe_optax as kfe
from kfe_optax import diagnostics
from kfe_optax.experiments.data import load
from kfe_optax.experiments.errors import require
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import find_layers, make_job
from kfe_optax.experiments.optimizers import optimizer_settings, refusals
from kfe_optax.experiments.parallel import refuse_processes
from kfe_optax.experiments.progress import plain_table, say
from kfe_optax.experiments.task import Task
from kfe_optax.experiments.workdirs import claimed

# Streaming factors are Lanczos's on a single batch.
_METHODS = {
    name: make for name, make in kfe.factors.FACTORS.items() if make().needs_taps and name != "streaming"
}
# Of iterations.
_LIMITS = {"decay": 0.0, "tolerance": 1e-5, "max_iterations": 500, "subspace": 8, "max_restarts": 60}
_SPECTRUM_LIMIT = 1500  # rows of a sum of terms, which is decomposed as a dense matrix
_EIGENBASES = {"ekfac": "kfac", "tekfac": "tkfac"}  # best diagonals, and from whose factors their bases are

Errors = dict[str, dict[str, Any]]  # {quantity: {method: number}}


class Diagnosis(NamedTuple):
    """The measured steps, {quantity: {method: values}}, and whether it was cut short."""

    steps: list[int]
    values: dict[str, dict[str, np.ndarray]]
    interrupted: bool


def diagnose(config: ConfigDict, workdir: str | Path, *, console: Console | None = None) -> Diagnosis:
    """Trains, and measures every few steps how far each factorization F' is from the Fisher block F of one layer.

    F is that of the step's own batch, in float64; error is |F - F'| / |F| in the Frobenius norm, and spectrum_error the
    same of the sorted eigenvalues (of a sum of two terms up to 1500 rows of F). The folder receives ``diagnose.csv`` as
    the measurements come, and at the end ``diagnose.png``. Ctrl-C ends the run after the current step, with the picture
    of what was measured. The fields of ``config.diagnose``:

      layer: its name; "": the fifth, or in a smaller network the one after the middle.
      optimizer: what trains the network; it follows the config's own schedule. Its ``fisher`` says which F, or that of
          config.kfac where it has none.
      steps: of training.
      every: steps between two measurements.

    Example::

        config.diagnose.steps = 100
        found = diagnose(config, "runs/diagnose")
        print(found.values["error"]["kpsvd"].mean())
    """
    console = console or Console()
    words = "The config has no 'diagnose'; let its file start from settings.base_config(...)."
    require("diagnose" in config, words)
    refuse_processes(config, "diagnose")
    own, dataset = config.diagnose, load(config)
    options = {
        field: settings[field]
        for settings in (config.get("kfac", {}), optimizer_settings(config, own.optimizer))
        for field in ("fisher", "num_samples")
        if field in settings
    }
    say(console, f"data       {dataset.summary()}")
    with (
        claimed(workdir, "diagnose") as folder,
        (folder / "diagnose.csv").open("w", newline="", encoding="utf-8") as file,
        Interruption() as interruption,
    ):
        job = make_job(config, own.optimizer, dataset, max(config.steps, own.steps))
        rows, state, history = csv.writer(file), job.state, []
        rows.writerow(("step", "method", "error", "spectrum_error"))
        for step in range(own.steps + 1):
            batch = job.batches(step)
            if step % own.every == 0:
                now = job.devices.local(state)
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), step)
                with jax.enable_x64(True):
                    seen = _double((now.params, batch, now.model_state))
                    if not history:
                        with refusals("kfac", ConfigDict(options)):
                            layers = find_layers(job.task, seen[0], seen[2], seen[1])
                            names = list(layers)
                            name = own.layer or names[min(5, len(names) // 2 + 1, len(names)) - 1]
                            words = f"config.diagnose.layer is '{name}'; give one of {', '.join(names)}."
                            require(name in names, words)
                            measure = jax.jit(make_measure(job.task, layers, name, **options))
                        d_in, d_out = layers[name].sides
                        say(console, f"layer      {name}, {d_in} x {d_out}, F has {d_in * d_out} rows")
                    found = jax.device_get(measure(*seen, key))
                words = (
                    f"The training diverged before step {step}; lower config.{own.optimizer}.learning_rate."
                )
                require(np.isfinite(list(found["error"].values())).all(), words)
                history.append(found)
                for method, error in found["error"].items():
                    rows.writerow((step, method, error, found["spectrum_error"].get(method, "")))
                file.flush()
                say(console, f"step {step:<5} error of K-FAC {found['error']['kfac']:.4f}")
            if interruption.requested or step == own.steps:
                break
            state, _ = job.step(state, batch)
        values = jax.tree.map(lambda *found: np.array(found), *history)
        title = f"{config.title}\n{name}, while {own.optimizer} trains"
        steps = list(range(0, step + 1, own.every))
        _plot(steps, values, folder / "diagnose.png", title)
        means = [
            [method, *(f"{of[method].mean():.4f}" if method in of else "" for of in values.values())]
            for method in values["error"]
        ]
        caption = "Means over training of relative errors."
        console.print(plain_table(title, caption, ("method", "error", "spectrum error"), means))
        say(console, f"written    {folder / 'diagnose.csv'}, {folder / 'diagnose.png'}")
    return Diagnosis(steps, values, step < own.steps)


def make_measure(task: Task, layers: kfe.Layers, name: str, **options: Any) -> Callable[..., Errors]:
    """``measure(params, batch, model_state, key)`` for the layer ``name``, to be compiled.

    All methods see the same draw of the targets; ``options`` are those of ``kfe.value_grad_and_taps``.

    Example::

        measure = jax.jit(make_measure(task, layers, "dense_5", fisher="empirical"))
        measure(params, batch, {}, key)["error"]["kpsvd"]
    """
    differentiate = kfe.value_grad_and_taps(task.loss_fn, layers, has_aux=task.has_state, **options)
    estimators = {
        method: make(**{key: _LIMITS[key] for key in inspect.signature(make).parameters if key in _LIMITS})
        for method, make in _METHODS.items()
    }
    max_dim = max(layers[name].sides)

    @jax.default_matmul_precision("highest")
    def measure(params: Any, batch: Any, model_state: Any, key: Any) -> Errors:
        taps = differentiate(params, batch, model_state, key, key=key)[2]
        tap = taps[name]
        norm, spectrum = diagnostics.fisher_norm(tap), diagnostics.fisher_spectrum(tap)
        errors, spectra, terms = {}, {}, {}
        for method, factors in estimators.items():
            found = terms[method] = kfe.factors.estimate(factors, taps, [name], max_dim=max_dim)[name]
            errors[method] = diagnostics.kronecker_error(tap, found, norm=norm)
            if len(found) == 1 or spectrum.size <= _SPECTRUM_LIMIT:
                spectra[method] = diagnostics.kronecker_spectrum(found, max_size=spectrum.size)
        for method, factors in _EIGENBASES.items():
            basis = tuple(jnp.linalg.eigh(side)[1] for side in terms[factors][0])
            scale = tap.second_moment_in(*basis)
            errors[method] = diagnostics.eigenbasis_error(tap, basis, scale, norm=norm)
            spectra[method] = diagnostics.eigenbasis_spectrum(scale)
        found = {method: diagnostics.spectrum_error(spectrum, own) for method, own in spectra.items()}
        return {"error": errors, "spectrum_error": found}

    return measure


def _double(tree: Any) -> Any:
    """Floats as float64: small differences of large norms are measured, of which float32 would lose the digits."""
    arrays = jax.device_get(tree)
    return jax.tree.map(lambda v: v.astype(np.float64) if np.issubdtype(v.dtype, np.floating) else v, arrays)


def _plot(steps: list[int], values: Errors, path: Path, title: str) -> None:
    figure = Figure(figsize=(12, 4.8), dpi=120, layout="constrained")
    for (quantity, methods), axes in zip(values.items(), figure.subplots(1, len(values)), strict=True):
        for (method, found), marker in zip(methods.items(), itertools.cycle("osv^DXP*"), strict=False):
            axes.plot(steps, found, marker=marker, markevery=max(1, len(steps) // 8), label=method)
        axes.set(yscale="log", xlabel="training step", ylabel=quantity.replace("_", " "))
        axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path)
