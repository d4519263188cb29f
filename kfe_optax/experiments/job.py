"""One optimizer on one task, compiled: what ``train`` and ``compare`` both drive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.batches import Batch, Batches, make_batches
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.layer_options import configured
from kfe_optax.experiments.optimizers import (
    find_method,
    make_optimizer,
    optimizer_settings,
    refusals,
    tap_options,
)
from kfe_optax.experiments.parallel import Devices, check_divisible, distribution, make_devices
from kfe_optax.experiments.task import Params, State, Task, make_task


class TrainState(NamedTuple):
    """All that changes during training; with the seed it determines the rest of a run."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    model_state: State  # the running statistics of batch norm; {} for most models

    @property
    def evaluated(self) -> Params:
        """The parameters to evaluate: their average over the steps where the optimizer keeps one."""
        return kfe.averaged_parameters(self.opt_state, self.params)


class Job(NamedTuple):
    """A compiled training step with its initial state and its batches.

    ``step(state, batch)`` returns the next state and the loss as it is reported. It consumes
    ``state``: its buffers are donated, so that a factored optimizer's state exists once. The state is
    one that ``devices`` has placed; ``devices.local(state)`` and ``devices.whole(state)`` are for reading it.
    """

    task: Task
    batches: Batches
    state: TrainState
    step: Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]
    compile_seconds: float
    devices: Devices


def make_job(config: ConfigDict, optimizer: str, dataset: Dataset, run_steps: int) -> Job:
    """Builds and compiles the training step of ``optimizer`` on the config's task.

    Everything random comes from ``config.seed``: the parameters, the order of the batches, and the
    key of step t, which is ``fold_in(key, t)``. ``config.devices`` says where the step runs.

    Example::

        job = make_job(config, "ekfac", dataset, run_steps=100)
        state = job.state
        for step in range(100):
            state, loss = job.step(state, job.batches(step))
    """
    return make_jobs(config, optimizer, dataset, run_steps)(config.seed)


def make_jobs(config: ConfigDict, optimizer: str, dataset: Dataset, run_steps: int) -> Callable[[int], Job]:
    """``make_job`` for any number of seeds with one compilation: ``jobs(seed)``.

    Example::

        jobs = make_jobs(config, "ekfac", dataset, run_steps=100)
        curves = [run(jobs(seed)) for seed in range(5)]
    """
    task = make_task(config, dataset)
    devices = make_devices(config)
    batches = make_batches(config, dataset, share=devices.share)
    check_divisible(devices, [batches.batch_size(first) for first in batches.first_steps(run_steps)])
    batch = batches(0)
    init = jax.jit(task.init)
    params, model_state = init(jax.random.key(config.seed), batch["image"])
    settings = optimizer_settings(config, optimizer)
    with refusals(optimizer, settings):
        layers = find_layers(task, params, model_state, batch) if find_method(optimizer).curvature else None
        transform = make_optimizer(optimizer, settings, run_steps, layers, distribution(config))
        update = make_update(task, optimizer, settings, layers, devices.axis_name)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, jax.Array]:
        params, opt_state, model_state, loss = update(
            transform,
            state.params,
            state.opt_state,
            state.model_state,
            batch,
            jax.random.fold_in(jax.random.wrap_key_data(key), state.step),
        )
        return TrainState(params, opt_state, state.step + 1, model_state), loss * task.loss_scale

    @jax.jit
    def start(params: Params, model_state: State) -> TrainState:
        return TrainState(params, transform.init(params), jnp.zeros((), jnp.int32), model_state)

    # Compiled ahead of the first step, so that no clock below ever contains a compilation.
    started = time.perf_counter()
    with refusals(optimizer, settings):
        shapes = jax.eval_shape(start, params, model_state)
        # A growing batch has several sizes, and each of them its own program.
        compiled = {
            batches.batch_size(first): devices.compile(
                step, shapes, batches(first), _key_data(jax.random.key(0))
            )
            for first in batches.first_steps(run_steps)
        }
    seconds = time.perf_counter() - started

    def job(seed: int) -> Job:
        init_key, step_key = jax.random.split(jax.random.key(seed))
        state = devices.place(start(*init(init_key, batch["image"])))
        key = _key_data(step_key)
        batches = make_batches(config, dataset, seed, share=devices.share)
        programs = {devices.share.count(size): program for size, program in compiled.items()}

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
            return programs[len(batch["label"])](state, batch, key)

        return Job(task, batches, state, step, seconds, devices)

    return job


def _key_data(key: jax.Array) -> np.ndarray:
    """A key as numbers of the host, which the programs of all modes and processes take."""
    return np.asarray(jax.random.key_data(key))


def make_update(
    task: Task, optimizer: str, settings: ConfigDict, layers: Any, axis_name: str | None = None
) -> Callable[..., Any]:
    """One step of training, ``update(transform, params, opt_state, model_state, batch, key)``.

    It returns the new parameters, the new optimizer and model state and the loss. Without
    ``layers`` the gradient is a plain one. With ``axis_name``, of a ``pmap`` or a ``shard_map``, the batch is
    a device's own, and loss, gradient and model state are averaged over the devices.
    """
    if layers is not None:
        collect = kfe.value_grad_and_taps(
            task.loss_fn,
            layers,
            has_aux=task.has_state,
            axis_name=axis_name,
            **tap_options(optimizer, settings),
        )

    def over_devices(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def update(
        transform: optax.GradientTransformationExtraArgs,
        params: Params,
        opt_state: Any,
        model_state: State,
        batch: Any,
        key: Any,
    ) -> tuple[Params, Any, State, jax.Array]:
        # Devices that drop the same units of all their examples would be one device.
        own_key = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if layers is None:
            differentiate = jax.value_and_grad(task.loss_fn, has_aux=task.has_state)
            # As the batch is, so that the gradient is this device's own.
            found, grads = differentiate(_varying(params, axis_name), batch, model_state, own_key)
            taps = {}
        else:
            found, grads, found_taps = collect(params, batch, model_state, own_key, key=key)
            taps = {"taps": found_taps}
        loss, model_state = found if task.has_state else (found, model_state)
        loss, grads = over_devices((loss, grads))
        if task.has_state:
            model_state = over_devices(model_state)
        updates, opt_state = transform.update(grads, opt_state, params, **taps)
        return optax.apply_updates(params, updates), opt_state, model_state, loss

    return update


def _varying(tree: Any, axis_name: str | None) -> Any:
    """The tree, each device's own as far as types tell."""
    if axis_name is None:
        return tree
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


def find_layers(task: Task, params: Params, model_state: State, batch: Batch) -> kfe.Layers:
    """The layers that the library finds in the task's loss, as ``config.layers`` has them."""
    key = jax.random.key(0)
    found = kfe.find_layers(task.loss_fn, params, batch, model_state, key, has_aux=task.has_state)
    return configured(found, task.layers)


def check_optimizers(config: ConfigDict, names: Sequence[str], dataset: Dataset, run_steps: int) -> None:
    """Builds each optimizer and its differentiation, and so refuses settings that cannot be, before a run of any."""
    task, layers = make_task(config, dataset), None
    if any(find_method(name).curvature for name in names):
        layers = make_layers(config, dataset)
    for name in names:
        settings, own = optimizer_settings(config, name), layers if find_method(name).curvature else None
        with refusals(name, settings):
            make_optimizer(name, settings, run_steps, own)
            make_update(task, name, settings, own)


def make_layers(config: ConfigDict, dataset: Dataset) -> kfe.Layers:
    """The layers that the library finds in the config's model, as a printable table."""
    task = make_task(config, dataset)
    batch = make_batches(config, dataset)(0)
    params, model_state = jax.eval_shape(task.init, jax.random.key(0), batch["image"])
    return find_layers(task, params, model_state, batch)
