"""The ``diagnose`` command: train, and watch every factorization of one layer's Fisher block."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

import kfe_optax as kfe
from kfe_optax.experiments.batches import Batch
from kfe_optax.experiments.data import load
from kfe_optax.experiments.diagnose_measure import Measure, MeasureState, make_measure
from kfe_optax.experiments.diagnose_plan import Plan, find_layer, make_plan
from kfe_optax.experiments.diagnose_plot import plot_correlations, plot_errors
from kfe_optax.experiments.diagnose_records import DiagnoseRecorder, Series
from kfe_optax.experiments.diagnose_report import (
    Check,
    checks,
    checks_table,
    correlation_sentence,
    means_table,
)
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.growth import refuse_growth
from kfe_optax.experiments.interruption import Interruption
from kfe_optax.experiments.job import Job, find_layers, make_job
from kfe_optax.experiments.parallel import refuse_devices
from kfe_optax.experiments.progress import ProgressDisplay
from kfe_optax.experiments.train import check_positive
from kfe_optax.experiments.workdirs import claimed


class Diagnosis(NamedTuple):
    """The measurements, the claims checked on them, the last correlation matrices, and how it ended."""

    series: Series
    checks: list[Check]
    correlations: dict[str, np.ndarray]  # "parameters" and "kfe"
    interrupted: bool


def diagnose(config: ConfigDict, workdir: str | Path, *, console: Console | None = None) -> Diagnosis:
    """Trains ``config.diagnose.optimizer`` and measures one layer as ``config.diagnose`` says.

    The training is the first ``steps`` steps of the config's own run. The folder receives
    ``diagnose.csv`` as the measurements come, and at the end ``diagnose.png`` and ``correlation.png``;
    earlier ones are replaced. Ctrl-C ends the run after the current step, with the pictures of what was
    measured.

    Example::

        config.diagnose.steps = 100
        found = diagnose(config, "runs/diagnose")
        print(found.series.of("error", "kpsvd").mean())
    """
    console = console or Console()
    plan = make_plan(config)
    check_positive(config, "batch_size")
    refuse_growth(config, "diagnose")
    refuse_devices(config, "diagnose")
    dataset = load(config)
    _say(console, "data", dataset.summary())
    with claimed(workdir, "diagnose", ("diagnose.csv", "diagnose.png", "correlation.png")) as folder:
        job = make_job(config, plan.optimizer, dataset, max(config.steps, plan.steps))
        with jax.enable_x64(True):
            first = (_double(job.state.params), _double(job.state.model_state), _double(job.batches(0)))
            layers = find_layers(job.task, *first)
        plan = plan._replace(layer=find_layer(layers, plan.layer))
        d_in, d_out = layers[plan.layer].sides
        measure, state, seconds = _compiled(plan, job, layers)
        _say(
            console,
            "layer",
            f"{plan.layer}, {d_in} x {d_out}, F has {d_in * d_out} rows; compiled in {seconds + job.compile_seconds:.1f} s",
        )
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        series, correlations, interrupted = _run(plan, job, measure, state, key, folder, console)
        found = checks(series, plan.basis_update_period)
        title = f"{config.title}\n{plan.layer}, {d_in} x {d_out}, while {plan.optimizer} trains"
        plot_errors(series, folder / "diagnose.png", title, plan.basis_update_period)
        plot_correlations(correlations, folder / "correlation.png", f"{title}, step {series.steps[-1]}")
        console.print(means_table(series, plan.basis_update_period, title))
        console.print(checks_table(found))
        _say(console, "gradient", correlation_sentence(series))
        for name in ("diagnose.csv", "diagnose.png", "correlation.png"):
            _say(console, "written", str(folder / name))
    return Diagnosis(series, found, correlations, interrupted)


def _compiled(plan: Plan, job: Job, layers: kfe.Layers) -> tuple[Measure, MeasureState, float]:
    """The measurement in float64, its first state, and the seconds that compiling took."""
    started = time.perf_counter()
    params, batch = _double(job.state.params), _examples(job.batches(0), plan.examples)
    model_state = _double(job.state.model_state)
    with jax.enable_x64(True):
        measure, state = make_measure(plan, job.task, layers, params, batch, model_state)
        arguments = (state, params, batch, jax.random.key(0), np.array(True), model_state)
        compiled = jax.jit(measure).lower(*arguments).compile()
    return compiled, state, time.perf_counter() - started


def _run(
    plan: Plan,
    job: Job,
    measure: Measure,
    state: MeasureState,
    key: jax.Array,
    folder: Path,
    console: Console,
) -> tuple[Series, dict[str, np.ndarray], bool]:
    """Trains and measures; returns the series, the last correlations, and whether it was interrupted before the end."""
    series, train, correlations = Series(), job.state, {}
    clock = time.perf_counter()
    with (
        DiagnoseRecorder(folder) as recorder,
        Interruption() as interruption,
        ProgressDisplay(f"diagnose {plan.layer}", plan.steps, console) as display,
    ):
        for step in range(plan.steps + 1):
            batch = job.batches(step)
            if step % plan.every == 0:
                refresh = np.array(step % plan.basis_update_period == 0)
                params, examples = _double(train.params), _examples(batch, plan.examples)
                now = jax.random.fold_in(key, step)
                with jax.enable_x64(True):
                    state, found = measure(state, params, examples, now, refresh, _double(train.model_state))
                    values, correlations = jax.device_get((found.values, found.correlations))
                loss = float(values["loss"][plan.optimizer])
                if not math.isfinite(loss):
                    raise ExperimentError(
                        f"The training diverged before step {step}; lower config.{plan.optimizer}.learning_rate."
                    )
                recorder.write(step, values)
                series.append(step, values)
                display.show(step, loss, (step + 1) / (time.perf_counter() - clock))
            if interruption.requested and step < plan.steps:
                return series, correlations, True
            if step < plan.steps:
                train, _ = job.step(train, batch)
    return series, correlations, False


def _examples(batch: Batch, count: int) -> Batch:
    return {name: _double(array[:count]) for name, array in batch.items()}


def _double(tree: Any) -> Any:
    """Floats as float64: small differences of large norms are measured, of which float32 would lose the digits."""
    arrays = jax.device_get(tree)
    return jax.tree.map(lambda v: v.astype(np.float64) if np.issubdtype(v.dtype, np.floating) else v, arrays)


def _say(console: Console, label: str, text: str) -> None:
    console.print(f"{label:<10} {text}", highlight=False, soft_wrap=True)
