"""One optimizer on one task, compiled: what the commands drive."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.batches import Batch, Batches, make_batches
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.optimizers import (
    config_of,
    find_method,
    make_optimizer,
    optimizer_settings,
    refusals,
    tap_options,
)
from kfe_optax.experiments.options import configured
from kfe_optax.experiments.parallel import Devices, check_divisible, make_devices
from kfe_optax.experiments.task import Params, State, Task, make_task


class TrainState(NamedTuple):
    """All that changes during training; with the seed it determines the rest of a run."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    model_state: State  # the running statistics of batch norm; {} for most models

    @property
    def evaluated(self) -> Params:
        """The parameters to evaluate: their average over the steps where there is one."""
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

    Everything random comes from ``config.seed``: the parameters, the key of step t, which is ``fold_in(key, t)``,
    and where there is no ``config.data_seed`` the order of the batches. ``config.devices`` says where the step runs.
    """
    return make_jobs(config, optimizer, dataset, run_steps)(config.seed)


def make_jobs(config: ConfigDict, optimizer: str, dataset: Dataset, run_steps: int) -> Callable[[int], Job]:
    """``make_job`` for any number of seeds with one compilation: ``jobs(seed)``."""
    config = config_of(config, optimizer)
    task, devices = make_task(config, dataset), make_devices(config)
    batches = make_batches(config, dataset, share=devices.share)
    check_divisible(devices, batches.batch_size)
    batch, key = batches(0), jax.random.key(config.seed)
    init = jax.jit(task.init)
    params, model_state = init(key, batch["image"])
    settings = optimizer_settings(config, optimizer)
    with refusals(optimizer, settings):
        layers = find_layers(task, params, model_state, batch) if find_method(optimizer).curvature else None
        distribute = config.get("devices", {}).get("distribute", "none")
        transform = make_optimizer(optimizer, settings, run_steps, layers, distribute)
        if config.get("averaging") and not find_method(optimizer).self_tuning:
            transform = optax.chain(kfe.average_iterates(config.averaging), transform)
        update = make_update(task, optimizer, settings, layers, devices.axis_name)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, jax.Array]:
        own_key = jax.random.fold_in(jax.random.wrap_key_data(key), state.step)
        moving = state.params, state.opt_state, state.model_state
        params, opt_state, model_state, loss = update(transform, *moving, batch, own_key)
        return TrainState(params, opt_state, state.step + 1, model_state), loss * task.loss_scale

    @jax.jit
    def start(params: Params, model_state: State) -> TrainState:
        return TrainState(params, transform.init(params), jnp.zeros((), jnp.int32), model_state)

    # Compiled ahead of the first step, so that no clock ever contains a compilation. A key goes as numbers of the host,
    # which the programs of all modes take.
    started, data = time.perf_counter(), np.asarray(jax.random.key_data(key))
    with refusals(optimizer, settings):
        shapes = jax.eval_shape(start, params, model_state)
        compiled = devices.compile(step, shapes, batch, data)
    seconds = time.perf_counter() - started

    def job(seed: int) -> Job:
        init_key, step_key = jax.random.split(jax.random.key(seed))
        state = devices.place(start(*init(init_key, batch["image"])))
        data = np.asarray(jax.random.key_data(step_key))
        data_seed = seed if config.get("data_seed") is None else config.data_seed
        batches = make_batches(config, dataset, data_seed, share=devices.share)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
            return compiled(state, batch, data)

        return Job(task, batches, state, step, seconds, devices)

    return job


def make_update(
    task: Task, optimizer: str, settings: ConfigDict, layers: Any, axis_name: str | None = None
) -> Callable[..., Any]:
    """One step of training, ``update(transform, params, opt_state, model_state, batch, key)``.

    It returns the new parameters, the new optimizer and model state and the loss. Without
    ``layers`` the gradient is a plain one. With ``axis_name``, of a ``pmap`` or a ``shard_map``, the batch is
    a device's own, and loss, gradient and model state are averaged over the devices.
    """
    differentiate: Any = jax.value_and_grad(task.loss_fn, has_aux=task.has_state)
    if layers is not None:
        options = tap_options(optimizer, settings)
        differentiate = kfe.value_grad_and_taps(
            task.loss_fn, layers, has_aux=task.has_state, axis_name=axis_name, batch_arguments=1, **options
        )

    def update(
        transform: Any, params: Params, opt_state: Any, model_state: State, batch: Any, key: Any
    ) -> tuple[Params, Any, State, jax.Array]:
        own_key, own_params, taps = key, params, {}
        if axis_name is not None:
            place = jax.lax.axis_index(axis_name)
            # Devices that drop the same units of all their examples would be one device.
            own_key = jax.random.fold_in(key, place)
            # As the batch is, so that a plain gradient is this device's own.
            own_params = jax.tree.map(lambda leaf: leaf + (0 * place).astype(leaf.dtype), params)
        if layers is None:
            found, grads = differentiate(own_params, batch, model_state, own_key)
        else:
            found, grads, taps["taps"] = differentiate(params, batch, model_state, own_key, key=key)
        loss, model_state = found if task.has_state else (found, model_state)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
            model_state = jax.lax.pmean(model_state, axis_name) if task.has_state else model_state
        updates, opt_state = transform.update(grads, opt_state, params, **taps)
        return optax.apply_updates(params, updates), opt_state, model_state, loss

    return update


def find_layers(task: Task, params: Params, model_state: State, batch: Batch) -> kfe.Layers:
    """The layers that the library finds in the task's loss, as ``config.layers`` has them."""
    key = jax.random.key(0)
    found = kfe.find_layers(task.loss_fn, params, batch, model_state, key, has_aux=task.has_state)
    return configured(found, task.layers)


def make_layers(config: ConfigDict, dataset: Dataset) -> kfe.Layers:
    """The layers that the library finds in the config's model, as a printable table."""
    task, batch = make_task(config, dataset), make_batches(config, dataset)(0)
    params, model_state = jax.eval_shape(task.init, jax.random.key(0), batch["image"])
    return find_layers(task, params, model_state, batch)


def check_optimizers(config: ConfigDict, run_steps: Mapping[str, int], dataset: Dataset) -> None:
    """Builds each optimizer for its steps, and its differentiation, and so refuses what cannot be, before a run of any."""
    task, curvature = make_task(config, dataset), [name for name in run_steps if find_method(name).curvature]
    layers = make_layers(config, dataset) if curvature else None
    for name, steps in run_steps.items():
        settings, own = optimizer_settings(config, name), layers if name in curvature else None
        with refusals(name, settings):
            make_optimizer(name, settings, steps, own)
            make_update(task, name, settings, own)
