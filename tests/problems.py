"""One small network as a Linen model, an NNX model and plain JAX, from the same W̄ matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import kfe_optax as kfe

from . import dense

SIZES = (3, 4, 2)
EXAMPLES = 8
FRAMEWORKS = ("linen", "nnx", "plain")
KINDS = ("softmax", "gaussian", "pixels", "counts")


@dataclasses.dataclass(frozen=True)
class Problem:
    """loss_fn(params, x, y) and, for the dense computation, W̄ matrices and loss(Z)."""

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    names: tuple[str, ...]
    weights: list[Any]
    loss: Callable[[Any], Any]

    def layers(self) -> kfe.Layers:
        layers = kfe.find_layers(self.loss_fn, self.params, *self.args)
        assert tuple(layers) == self.names
        return layers


def losses(kind: str, targets):
    """(the library's loss, the same loss in plain Optax) as functions of the outputs and targets."""

    def softmax(module, z, y):
        return module.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def gaussian(module, z, y):
        return module.losses.l2_loss(z, y).sum(-1).mean()

    def pixels(module, z, y):
        return module.losses.sigmoid_binary_cross_entropy(z, y).mean()

    def counts(module, z, y):
        # What Optax has not is a formula here.
        loss = kfe.losses.poisson_nll_loss(z, y) if module is kfe else jnp.exp(z) - y * z
        return loss.sum(-1).mean()

    chosen = {"softmax": softmax, "gaussian": gaussian, "pixels": pixels, "counts": counts}[kind]
    return (lambda z, y: chosen(kfe, z, y)), (lambda z: chosen(optax, z, targets))


class LinenNet(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"dense_{i}")(x)
            x = nn.tanh(x) if i + 1 < len(self.widths) else x
        return x


class NnxNet(nnx.Module):
    def __init__(self, weights):
        rngs = nnx.Rngs(0)
        self.dense = nnx.List([nnx.Linear(w.shape[0] - 1, w.shape[1], rngs=rngs) for w in weights])
        for layer, w in zip(self.dense, weights, strict=True):
            layer.kernel = nnx.Param(w[:-1])
            layer.bias = nnx.Param(w[-1])

    def __call__(self, x):
        for i, layer in enumerate(self.dense):
            x = layer(x)
            x = jnp.tanh(x) if i + 1 < len(self.dense) else x
        return x


def plain_forward(params, x):
    for i, layer in enumerate(params):
        x = kfe.tag_dense(x, x @ layer["kernel"] + layer["bias"], layer)
        x = jnp.tanh(x) if i + 1 < len(params) else x
    return x


def barrier():
    """(params, loss_fn, layers) of one weight from 2 toward 1/2, whose loss is no number below 0.9, with a finite gradient."""
    # Of no weak type, with which a step would be compiled twice.
    params, x = {"kernel": 2 * jnp.ones((1, 1))}, jnp.ones((4, 1))

    def loss_fn(params):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z, jnp.full_like(z, 0.5)).mean() + 0 * jnp.log(params["kernel"] - 0.9).sum()

    return params, loss_fn, kfe.find_layers(loss_fn, params)


def tuned_step(tx: optax.GradientTransformation, loss_fn, layers: kfe.Layers):
    """(params, state) → (params, state, loss at the old ones), compiled, for an optimizer with a quadratic model."""
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact", quadratic_model=True)

    @jax.jit
    def step(params, state):
        loss, grads, taps = differentiate(params)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    return step


def make(framework: str, kind: str = "softmax", sizes=SIZES, examples=EXAMPLES, seed=0) -> Problem:
    """A problem in the precision that is switched on."""
    generator = np.random.default_rng(seed)
    weights = dense.plain_weights(sizes, seed)
    x = jnp.asarray(generator.normal(size=(examples, sizes[0])))
    targets = {
        "softmax": generator.integers(0, sizes[-1], examples),
        "gaussian": generator.normal(size=(examples, sizes[-1])),
        "pixels": generator.uniform(size=(examples, sizes[-1])),
        "counts": generator.integers(0, 2, (examples, sizes[-1])),  # log 0! = log 1! = 0
    }[kind]
    targets = jnp.asarray(targets)
    ours, plain = losses(kind, targets)
    leaves = [{"kernel": w[:-1], "bias": w[-1]} for w in weights]
    if framework == "linen":
        model = LinenNet(sizes[1:])
        params = {f"dense_{i}": layer for i, layer in enumerate(leaves)}
        names = tuple(params)
        loss_fn = lambda params, x, y: ours(model.apply({"params": params}, x), y)
    elif framework == "nnx":
        params = NnxNet(weights)
        names = tuple(f"dense/{i}" for i in range(len(weights)))
        loss_fn = lambda model, x, y: ours(model(x), y)
    else:
        params, names = leaves, tuple(str(i) for i in range(len(weights)))
        loss_fn = lambda params, x, y: ours(plain_forward(params, x), y)
    return Problem(loss_fn, params, (x, targets), names, weights, plain)


def assert_gradients_and_rows(loss_fn, layers: kfe.Layers, params, *args, tolerance: float = 1e-10):
    """The gradient is JAX's, and Σ_t ā gᵀ over the rows that of each example.

    One program for all of it. A layer whose rows are not those of the examples has nothing to compare.
    """

    @jax.jit
    def pairs(params, *args):
        *found, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, *args)
        known = {name: layer for name, layer in layers.items() if layer.per_example}
        rows = {name: taps[name].example_gradients().mean(-3) for name in known}
        matrices = {name: layer.to_matrix(found[1]) for name, layer in known.items()}
        return (found, rows), ([*jax.value_and_grad(loss_fn)(params, *args)], matrices)

    dense.assert_close(*pairs(params, *args), tolerance)


def state_of(params: Any) -> Any:
    """What Optax sees: the parameter tree, or an NNX model's `nnx.Param` state."""
    return nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params


def run(problem: Problem, layers: kfe.Layers, tx: optax.GradientTransformation, steps: int, fisher="exact"):
    """The W̄ matrices after each of `steps` steps, and the final optimizer state."""
    differentiate = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher=fisher)
    params = problem.params
    parameters = state_of(params)
    opt_state, trajectory = tx.init(parameters), []
    update = jax.jit(tx.update)
    for step in range(steps):
        key = jax.random.key(step) if fisher == "sampled" else None
        _, grads, taps = differentiate(params, *problem.args, key=key)
        updates, opt_state = update(grads, opt_state, parameters, taps=taps)
        parameters = optax.apply_updates(parameters, updates)
        if isinstance(params, nnx.Module):
            nnx.update(params, parameters)
        else:
            params = parameters
        trajectory.append([np.asarray(layer.to_matrix(parameters)) for layer in layers.values()])
    return trajectory, opt_state
