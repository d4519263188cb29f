"""kfac-jax's fully adaptive optimizer on this project's autoencoders, in turn with Adam.

Learning rate, momentum and damping come from the quadratic model and the reduction ratio, as in section 6 of Martens and Grosse
(2015); what is left is the initial damping. Both optimizers start from the same parameters and take their steps in turn, on the
same batches in one process, so that a noisy machine slows both alike: read the ratio of the seconds, not the seconds. Compilation
and evaluation are not timed; every refresh is.

It runs in an environment of its own, without this package and without Flax, since kfac-jax needs an older JAX:

    pip install kfac-jax==0.0.8 jax==0.9.1 jaxlib==0.9.1         # Python 3.11, CPU

kfac-jax 0.0.8, its newest release on PyPI, asks for `jax>=0.4.27` and runs on 0.9.0.1 and 0.9.1. On 0.9.2, 0.10.0 and 0.10.2 its
first step fails with `ValueError: too many values to unpack (expected 2)`: it takes the result of `Primitive.get_bind_params`
for a pair, and newer releases of JAX return one dictionary.

The data comes from this package's own loader, in this package's environment:

    import numpy as np
    from kfe_optax.experiments.config_files import load_config
    from kfe_optax.experiments.data import load

    config = load_config("configs/curves_autoencoder.py")        # for the full MNIST: config.data_dir = "..."
    np.savez("curves.npz", train_images=load(config).train_images)

and then, in the other one:

    python benchmarks/against_kfac_jax.py curves --data curves.npz --damping 3 30 150 --steps 50
    python benchmarks/against_kfac_jax.py curves --data curves.npz --damping 3

Several dampings, or floors of it, are several kfac-jax runs in turn, beside one of Adam. With `--seconds 45` every run of
kfac-jax instead takes as many steps as that time allows, one run after the other and without Adam: what
`kfe-optax compare --config.compare.budget="45 seconds"` does with this package's optimizers. The printed losses are the mean
over the pixels of all training images, at the parameters and at their running average, which `kfe_optax.kfac_adaptive` keeps too.
Networks, losses, batch sizes and Adam's learning rates are those of `configs/*_autoencoder.py`.

With kfac-jax's own floor, 1e-8, the damping goes from 3 to that floor within 200 steps on CURVES, and the parameters
are NaN before step 600; hence the floor here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

# As `kfe-optax` does: OpenBLAS's threads spin against XLA's. Set before NumPy loads it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import optax

Optimizer = Any  # Adam or KfacJax

EVALUATION_BATCH = 1000
WARMUP = 50  # of Adam's learning rate, in steps
DAMPING_PERIOD = 5  # steps between adaptations of kfac-jax's damping, its default


AVERAGING = 0.99  # decay of the averaged parameters, that of kfe_optax.kfac_adaptive


@dataclasses.dataclass(frozen=True)
class Network:
    """What a config says of an autoencoder: ReLU between its layers, but for the code and the output, which are linear."""

    sizes: tuple[int, ...]
    batch_size: int
    steps: int
    adam: float  # the learning rate, falling linearly to zero
    squared: bool = False  # the squared error instead of the Bernoulli cross-entropy


NETWORKS = {
    "mnist": Network((784, 1000, 500, 250, 30, 250, 500, 1000, 784), 512, 980, 4e-3),
    "curves": Network((784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784), 512, 1000, 6e-3),
    "faces": Network((625, 2000, 1000, 500, 30, 500, 1000, 2000, 625), 450, 500, 1e-3, squared=True),
}


def initial_params(sizes: tuple[int, ...], key: jax.Array) -> list[dict[str, jax.Array]]:
    initializer = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": initializer(key, sides), "b": jnp.zeros(sides[1])}
        for key, sides in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def loss_of(network: Network, register: bool) -> Callable[[Any, jax.Array], jax.Array]:
    """The mean over the images of the sum over their pixels; with `register` also told to kfac-jax."""
    code = network.sizes.index(min(network.sizes))

    def loss(params: Any, images: jax.Array) -> jax.Array:
        hidden = images
        for index, layer in enumerate(params, start=1):
            hidden = hidden @ layer["w"] + layer["b"]
            if index not in (code, len(params)):
                hidden = jax.nn.relu(hidden)
        if network.squared:
            if register:
                kfac_jax.register_squared_error_loss(hidden, images)
            pixels = (hidden - images) ** 2
        else:
            if register:
                kfac_jax.register_multi_bernoulli_predictive_distribution(hidden, images)
            pixels = optax.losses.sigmoid_binary_cross_entropy(hidden, images)
        return pixels.sum(axis=1).mean()

    return loss


class Adam:
    """optax.adam with the config's schedule."""

    def __init__(self, network: Network, steps: int, key: jax.Array):
        self.name, self.seconds = "Adam", 0.0
        rise = optax.linear_schedule(network.adam / WARMUP, network.adam, WARMUP - 1)
        fall = optax.linear_schedule(network.adam, 0.0, max(steps - WARMUP, 1))
        tx = optax.adam(optax.join_schedules([rise, fall], [WARMUP]))
        value_and_grad = jax.value_and_grad(loss_of(network, register=False))

        def update(params: Any, state: Any, images: jax.Array) -> tuple[Any, Any]:
            _, gradient = value_and_grad(params, images)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self._update = jax.jit(update, donate_argnums=(0, 1))
        self.params = initial_params(network.sizes, key)
        self.state = tx.init(self.params)

    def step(self, step: int, images: np.ndarray) -> None:
        self.params, self.state = self._update(self.params, self.state, images)

    def note(self) -> str:
        return ""


class KfacJax:
    """kfac_jax.Optimizer with everything adaptive; `burnin` are the batches its first factors come from."""

    def __init__(
        self,
        network: Network,
        damping: float,
        floor: float,
        burnin: list[np.ndarray],
        options: argparse.Namespace,
        key: jax.Array,
    ):
        self.name, self.seconds = f"kfac-jax, damping from {damping:g}, at least {floor:g}", 0.0
        self._optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss_of(network, register=True)),
            l2_reg=0.0,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            initial_damping=damping,
            min_damping=floor,
            damping_adaptation_interval=DAMPING_PERIOD,
            damping_adaptation_decay=options.damping_decay,
            curvature_update_period=options.factor_period,
            inverse_update_period=options.inverse_period,
            estimation_mode=options.mode,
            num_burnin_steps=len(burnin),
        )
        self._key, self._burnin = key, burnin
        self.params = initial_params(network.sizes, key)
        example = np.zeros((network.batch_size, network.sizes[0]), np.float32)
        self.state = self._optimizer.init(self.params, key, example)
        self._stats: dict[str, Any] = {}

    def step(self, step: int, images: np.ndarray) -> None:
        self.params, self.state, self._stats = self._optimizer.step(
            self.params,
            self.state,
            jax.random.fold_in(self._key, step),
            data_iterator=iter([*self._burnin, images] if step == 0 else [images]),
            global_step_int=step,
        )

    def note(self) -> str:
        shown = {"λ": "damping", "α": "learning_rate", "μ": "momentum"}
        return ", ".join(f"{letter} {float(self._stats[name]):.3g}" for letter, name in shown.items())


def batches(images: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Every image once an epoch, in a new order; the last partial batch is dropped."""
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for start in range(0, len(images) - size + 1, size):
            yield images[order[start : start + size]]


@jax.jit
def averaged(average: Any, params: Any, step: int) -> Any:
    """The running average with the decay min(1 − 1/t, AVERAGING), t the steps taken."""
    decay = jnp.minimum(1 - 1 / (step + 1), AVERAGING)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)


def evaluator(network: Network) -> Callable[[Any, np.ndarray], float]:
    """The mean over the pixels of all images."""
    loss = jax.jit(loss_of(network, register=False))

    def evaluate(params: Any, images: np.ndarray) -> float:
        parts = np.array_split(images, -(-len(images) // EVALUATION_BATCH))
        total = sum(len(part) * float(loss(params, part)) for part in parts)
        return total / images.size

    return evaluate


def compile_steps(optimizer: Optimizer, images: np.ndarray, steps: int) -> None:
    """Takes so many steps, which compiles them, and goes back to the start."""
    initial = jax.tree.map(jnp.copy, (optimizer.params, optimizer.state))
    for step in range(steps):
        optimizer.step(step, images)
    jax.block_until_ready(optimizer.params)
    optimizer.params, optimizer.state = initial


def run(
    network: Network,
    optimizers: list[Optimizer],
    source: Iterator[np.ndarray],
    images: np.ndarray,
    options: argparse.Namespace,
) -> None:
    """Trains all of them, Adam first, in turn and prints a row for each at the steps asked for."""
    evaluate = evaluator(network)
    averages = [jax.tree.map(jnp.zeros_like, optimizer.params) for optimizer in optimizers]
    shown = set(options.at) | {options.steps}
    print(
        "| optimizer | step | seconds | times Adam's | training loss | averaged | |\n|---|---|---|---|---|---|---|"
    )
    for step in range(options.steps):
        batch = next(source)
        for index, optimizer in enumerate(optimizers):
            start = time.perf_counter()
            optimizer.step(step, batch)
            jax.block_until_ready(optimizer.params)
            optimizer.seconds += time.perf_counter() - start
            averages[index] = averaged(averages[index], optimizer.params, step)
        if step + 1 not in shown:
            continue
        for optimizer, average in zip(optimizers, averages, strict=True):
            spent, ratio = f"{optimizer.seconds:.1f}", f"{optimizer.seconds / optimizers[0].seconds:.2f}"
            losses = [f"{evaluate(params, images):.5f}" for params in (optimizer.params, average)]
            cells = (optimizer.name, str(step + 1), spent, ratio, *losses, optimizer.note())
            print("| " + " | ".join(cells) + " |", flush=True)


def run_for(
    seconds: float,
    network: Network,
    optimizers: list[Optimizer],
    images: np.ndarray,
    options: argparse.Namespace,
) -> None:
    """Trains each of them for its own `seconds`, evaluation not counted, and prints a row for each."""
    evaluate = evaluator(network)
    print("| optimizer | steps | seconds | training loss | averaged | |\n|---|---|---|---|---|---|")
    for optimizer in optimizers:
        # From the batch that follows those of the burn-in.
        source = itertools.islice(batches(images, network.batch_size, options.seed), options.burnin, None)
        average, step = jax.tree.map(jnp.zeros_like, optimizer.params), 0
        while optimizer.seconds < seconds:
            start = time.perf_counter()
            optimizer.step(step, next(source))
            average = averaged(average, optimizer.params, step)
            jax.block_until_ready(average)
            optimizer.seconds += time.perf_counter() - start
            step += 1
        losses = [f"{evaluate(params, images):.5f}" for params in (optimizer.params, average)]
        cells = (optimizer.name, str(step), f"{optimizer.seconds:.1f}", *losses, optimizer.note())
        print("| " + " | ".join(cells) + " |", flush=True)


def read_images(path: str, network: Network) -> np.ndarray:
    with np.load(path) as archive:
        images = archive["train_images"].astype(np.float32)
    pixels = network.sizes[0]
    if images.ndim != 2 or images.shape[1] != pixels:
        raise SystemExit(f"train_images in '{path}' is {images.shape}; this network takes (n, {pixels}).")
    if len(images) < network.batch_size:
        raise SystemExit(f"'{path}' has {len(images)} images, fewer than a batch of {network.batch_size}.")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data", required=True, help="an .npz file with train_images, (n, pixels) in [0, 1]")
    parser.add_argument("--damping", nargs="+", type=float, default=[3.0], help="initial; one run each")
    parser.add_argument("--min-damping", nargs="+", type=float, default=[0.1], help="its floor; one run each")
    parser.add_argument("--damping-decay", type=float, default=0.9, help="a step's factor on the damping")
    parser.add_argument("--steps", type=int, default=0, help="0: the config's own")
    parser.add_argument("--seconds", type=float, default=0.0, help="of each kfac-jax run, instead of steps")
    parser.add_argument("--at", nargs="*", type=int, default=[], help="steps at which losses are printed")
    parser.add_argument("--factor-period", type=int, default=1, help="steps between updates of the factors")
    parser.add_argument("--inverse-period", type=int, default=5, help="steps between inversions")
    parser.add_argument(
        "--burnin", type=int, default=10, help="batches for the factors before the first step"
    )
    parser.add_argument("--mode", default=None, help="kfac-jax's estimation_mode, as fisher_gradients")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    network = NETWORKS[options.network]
    options.steps = options.steps or network.steps
    images = read_images(options.data, network)
    key = jax.random.key(options.seed)
    source = batches(images, network.batch_size, options.seed)
    # Extra batches: every optimizer trains on the same ones after them.
    burnin = list(itertools.islice(source, options.burnin))
    optimizers: list[Optimizer] = [] if options.seconds else [Adam(network, options.steps, key)]
    optimizers += [
        KfacJax(network, *dampings, burnin, options, key)
        for dampings in itertools.product(options.damping, options.min_damping)
    ]
    # kfac-jax compiles a program for every combination of what a step updates; so many steps have them all.
    for optimizer in optimizers:
        compile_steps(optimizer, images[: network.batch_size], DAMPING_PERIOD * options.factor_period)
    size = network.batch_size
    print(
        f"{options.network}: {len(images):,} images, batches of {size}, JAX {jax.__version__}\n", flush=True
    )
    if options.seconds:
        run_for(options.seconds, network, optimizers, images, options)
    else:
        run(network, optimizers, source, images, options)


if __name__ == "__main__":
    main()
