"""Many trials in one compiled program: hyper-parameters and seeds are arguments, not constants."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import kfe_optax as kfe
from kfe_optax.experiments.batches import Batches, make_batches
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import find_layers, make_update
from kfe_optax.experiments.optimizers import find_method, make_optimizer, optimizer_settings, refusals
from kfe_optax.experiments.sweep_space import Trial, with_values
from kfe_optax.experiments.task import Params, State, Task, make_task

_EVALUATION_BATCH = 1000  # at most; a task may want fewer
_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Losses(NamedTuple):
    """What a trial is judged by: mean losses over the fixed images, not finite where it diverged."""

    start_loss: float  # of the training images before the first step
    train_loss: float
    test_loss: float


Variables = tuple[Params, State]
Sets = dict[str, dict[str, jax.Array]]
Sums = tuple[jax.Array, jax.Array, jax.Array]  # of Losses' fields, a number an evaluation batch


class Program(NamedTuple):
    """The compiled program: ``run(trials)`` trains up to ``chunk`` trials from start to end."""

    run: Callable[[Sequence[Trial]], list[Losses]]
    compile_seconds: float


def make_program(
    config: ConfigDict, fields: Sequence[str], dataset: Dataset, steps: int, chunk: int
) -> Program:
    """Compiles whole trials of ``config.optimizer``: start, ``steps`` steps, evaluation.

    A trial is a ``lax.scan`` over its steps and the trials are a ``lax.map``, one after the other:
    under ``vmap`` a refresh whose condition depends on the trial (its gradient was finite, its
    period) would be computed in every step of all trials. A trial takes the steps of the same
    setting under ``make_job``, to rounding: the same start, batches and keys from its seed. The
    images lie on the device as a whole.

    Args:
      config: its optimizer's settings hold for every field that does not vary.
      fields: the dotted names of the fields that a trial's values stand for.
      dataset: the images.
      steps: steps a trial, over which the schedules span.
      chunk: trials a call; a smaller group is filled up, so that one compilation serves all.

    Raises:
      ExperimentError: a field cannot vary within one program, because it fixes shapes.
    """
    task = make_task(config, dataset)
    settings = optimizer_settings(config, config.optimizer)
    with refusals(config.optimizer, settings):
        train = _trainer(config, fields, dataset, task, steps)
    examples = min(config.sweep.examples or len(dataset.train_images), len(dataset.train_images))
    sets = jax.device_put(
        {
            "train": {"image": dataset.train_images, "label": dataset.train_labels},
            "fixed": {"image": dataset.train_images[:examples], "label": dataset.train_labels[:examples]},
            "test": {"image": dataset.test_images, "label": dataset.test_labels},
        }
    )

    def trial(sets: Sets, setting: dict[str, jax.Array]) -> Sums:
        init_key, step_key = jax.random.split(jax.random.key(setting["seed"]))
        start = task.init(init_key, sets["train"]["image"][:1])
        end = train(start, step_key, sets["train"], setting)
        return (
            _loss_sums(task, start, sets["fixed"]),
            _loss_sums(task, end, sets["fixed"]),
            _loss_sums(task, end, sets["test"]),
        )

    def trials_in_turn(sets: Sets, settings: dict[str, jax.Array]) -> Sums:
        return jax.lax.map(lambda setting: trial(sets, setting), settings)

    arguments = _Arguments(config, dataset, steps, chunk)
    started = time.perf_counter()
    try:
        # The values of this call do not matter: only their shapes do.
        probe = arguments([Trial(0, (1.0,) * len(fields), config.seed)])
        with refusals(config.optimizer, settings):
            compiled = jax.jit(trials_in_turn).lower(sets, probe).compile()
    except _NOT_TRACEABLE as error:
        raise ExperimentError(
            f"One of the fields {', '.join(fields)} fixes the form of the program and cannot vary within it; "
            "take it out of config.sweep.others and run a sweep for each of its values."
        ) from error
    compile_seconds = time.perf_counter() - started

    def run(trials: Sequence[Trial]) -> list[Losses]:
        sums = jax.device_get(compiled(sets, arguments(trials)))
        counts = (examples, examples, len(dataset.test_images))
        # In float64: 50,000 images summed in float32 would lose the fifth digit.
        means = [found.sum(-1, dtype=np.float64) / count for found, count in zip(sums, counts, strict=True)]
        return [Losses(*(float(mean[index]) for mean in means)) for index in range(len(trials))]

    return Program(run, compile_seconds)


class _Arguments:
    """What the program takes for a group of trials, filled up to the size it was compiled for."""

    def __init__(self, config: ConfigDict, dataset: Dataset, steps: int, chunk: int):
        self._config = config
        self._dataset = dataset
        self._steps = steps
        self._chunk = chunk
        self._orders: dict[int, np.ndarray] = {}  # (steps, batch) image indices by seed

    def __call__(self, trials: Sequence[Trial]) -> dict[str, np.ndarray]:
        filled = [*trials, *[trials[-1]] * (self._chunk - len(trials))]
        return {
            "values": np.array([trial.values for trial in filled], jnp.result_type(float)),
            "seed": np.array([trial.seed for trial in filled], np.int32),
            "order": np.stack([self._order(trial.seed) for trial in filled]),
        }

    def _order(self, seed: int) -> np.ndarray:
        if seed not in self._orders:
            data = self._dataset
            batches = Batches(data.train_images, data.train_labels, self._config.batch_size, seed=seed)
            rows = [batches.indices(step) for step in range(self._steps)]
            self._orders[seed] = np.stack(rows).astype(np.int32)
        return self._orders[seed]


def _trainer(
    config: ConfigDict, fields: Sequence[str], dataset: Dataset, task: Task, steps: int
) -> Callable[[Variables, jax.Array, dict[str, jax.Array], dict[str, jax.Array]], Variables]:
    """The function from a trial's start to its end; the optimizer is built inside, of traced values."""
    name, settings = config.optimizer, optimizer_settings(config, config.optimizer)
    layers: Any = None
    if find_method(name).curvature:
        batch = make_batches(config, dataset)(0)
        layers = find_layers(task, *jax.eval_shape(task.init, jax.random.key(0), batch["image"]), batch)
    update = make_update(task, name, settings, layers)

    def train(
        variables: Variables, key: jax.Array, images: dict[str, jax.Array], setting: dict[str, jax.Array]
    ) -> Variables:
        values = {field: setting["values"][index] for index, field in enumerate(fields)}
        transform = make_optimizer(name, with_values(settings, values), steps, layers)

        def step(carry: tuple[Params, Any, State], at: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            count, rows = at
            batch = jax.tree.map(lambda array: array[rows], images)
            *new, _ = update(transform, *carry, batch, jax.random.fold_in(key, count))
            return tuple(new), None

        counts = jnp.arange(steps, dtype=jnp.int32)
        params, state = variables
        start = params, transform.init(params), state
        (params, opt_state, state), _ = jax.lax.scan(step, start, (counts, setting["order"]))
        return kfe.averaged_parameters(opt_state, params), state

    return train


def _loss_sums(task: Task, variables: Variables, images: dict[str, jax.Array]) -> jax.Array:
    """The loss summed over the images of each evaluation batch; every image counts once."""
    count = len(images["image"])
    size = min(_EVALUATION_BATCH, task.evaluation_batch, count)
    params, state = variables

    def of_batch(start: jax.Array) -> jax.Array:
        rows = start + jnp.arange(size)
        batch = jax.tree.map(lambda array: array[jnp.minimum(rows, count - 1)], images)
        return task.measure(params, batch, (rows < count).astype(jnp.float32), state)["loss"]

    return jax.lax.map(of_batch, jnp.arange(0, count, size))
