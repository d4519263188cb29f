"""The memory of a training step on VGG11 beside Adam's: optimizer state, and what the step needs for its duration.

Transient memory is what XLA's buffer assignment reserves beyond arguments and results: activations, gradients, workspace; `--run`
also takes a step of each optimizer in a process of its own and reports the highest resident memory that the system saw. Run
`python benchmarks/memory.py --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import kfe_optax as kfe
from kfe_optax._layers.table import align, quantity
from kfe_optax.experiments.models import VGG

NAMES = ("Adam", "K-FAC", "EKFAC, running scale", "EKFAC, batch scale", "TEKFAC")


@dataclasses.dataclass
class Problem:
    """VGG11 with batch norm on random images of 32 × 32 × 3."""

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


def make_problem(batch: int) -> Problem:
    model = VGG(image_shape=(32, 32, 3), depth=11, batch_norm=True)
    images, labels = jnp.zeros((batch, 32 * 32 * 3)), jnp.zeros(batch, int)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss_fn(params, statistics, images, labels):
        logits, moved = model.apply(
            {"params": params, "batch_stats": statistics}, images, train=True, mutable=["batch_stats"]
        )
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

    return Problem(loss_fn, variables["params"], (variables["batch_stats"], images, labels))


def make_step(problem: Problem, name: str, max_dim: int) -> tuple[Callable[..., Any], Any]:
    """A training step and its optimizer."""
    if name == "Adam":
        plain = optax.adam(1e-3)

        def adam_step(params, opt_state, key, *args):
            del key
            (loss, moved), grads = jax.value_and_grad(problem.loss_fn, has_aux=True)(params, *args)
            updates, opt_state = plain.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss, moved

        return adam_step, plain
    layers = kfe.find_layers(problem.loss_fn, problem.params, *problem.args, has_aux=True)
    makers = {
        "K-FAC": lambda: kfe.kfac(0.15, layers, max_dim=max_dim),
        "EKFAC, running scale": lambda: kfe.ekfac(0.15, layers, scale="running", max_dim=max_dim),
        "EKFAC, batch scale": lambda: kfe.ekfac(
            0.1, layers, scale="batch", scale_update_period=1, max_dim=max_dim
        ),
        "TEKFAC": lambda: kfe.tekfac(0.15, layers, max_dim=max_dim),
    }
    transform = makers[name]()

    def step(params, opt_state, key, *args):
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, has_aux=True)
        (loss, moved), grads, taps = differentiate(params, *args, key=key)
        updates, opt_state = transform.update(grads, opt_state, params, taps=taps)
        return optax.apply_updates(params, updates), opt_state, loss, moved

    return step, transform


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled(problem: Problem, name: str, max_dim: int) -> tuple[Any, Any]:
    """The compiled step, its parameters and state donated, and the shapes of the state."""
    step, transform = make_step(problem, name, max_dim)
    state = jax.eval_shape(transform.init, problem.params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        problem.params, state, jax.random.key(0), *problem.args
    )
    return lowered.compile(), state


def take_a_step(name: str, batch: int, max_dim: int) -> None:
    """One step on zeros (which refreshes everything), and the process's highest resident memory."""
    problem = make_problem(batch)
    program, state = compiled(problem, name, max_dim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (problem.params, state))
    args = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), problem.args)
    jax.block_until_ready(program(*zeros, jax.random.key(0), *args))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def measured(name: str, batch: int, max_dim: int) -> int:
    """Bytes of resident memory that a step of this optimizer added, in a process of its own."""
    command = [sys.executable, __file__, f"--batch={batch}", f"--max_dim={max_dim}", f"--step={name}"]
    return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--max_dim", type=int, default=2048, help="sides larger than this are diagonal")
    parser.add_argument("--run", action="store_true", help="also take a step and read the resident memory")
    parser.add_argument("--step", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        take_a_step(options.step, options.batch, options.max_dim)
        return
    problem = make_problem(options.batch)

    def linearize(params, *args):
        return jax.vjp(lambda p: problem.loss_fn(p, *args)[0], params)[1]

    pull = jax.eval_shape(linearize, problem.params, *problem.args)
    activations = bytes_of(pull) - bytes_of(problem.params)
    rows, adam = [], 0
    for name in NAMES:
        program, state = compiled(problem, name, options.max_dim)
        transient = program.memory_analysis().temp_size_in_bytes
        adam = adam or transient
        row = [name, quantity(bytes_of(state), "B"), quantity(transient, "B")]
        row += [quantity(transient - adam, "B"), f"{(transient - adam) / activations:.2f}"]
        row += [quantity(measured(name, options.batch, options.max_dim), "B")] if options.run else []
        rows.append(row)
        print(name, "done", file=sys.stderr)
    header = ["step", "state", "transient", "beyond Adam", "/ activations"]
    header += ["resident, added by a step"] if options.run else []
    print(
        f"VGG11 with batch norm, batch {options.batch}, max_dim {options.max_dim}; JAX {jax.__version__} on "
        f"{jax.devices()[0].platform} ({platform.machine()}); activations that Adam's step keeps: "
        f"{quantity(activations, 'B')}\n"
    )
    print(align(header, rows, right=range(1, len(header))))


if __name__ == "__main__":
    main()
