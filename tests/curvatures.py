"""Small models whose layers have dense Fisher blocks by plain differentiation: one of every way a layer is used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfe_optax as kfe

from . import dense

CLASSES = 3


@dataclasses.dataclass(frozen=True)
class Model:
    """outputs(params, x) → z (n, CLASSES), and the layer to look at."""

    outputs: Callable[[Any, Any], Any]
    params: Any
    x: Any
    name: str

    def loss_fn(self, params, x, labels):
        z = self.outputs(params, x)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    @property
    def labels(self):
        return jnp.asarray(np.arange(len(self.x)) % CLASSES)

    def plain_loss(self, z):
        return optax.losses.softmax_cross_entropy_with_integer_labels(z, self.labels).mean()

    @functools.cached_property
    def layers(self):
        return kfe.find_layers(self.loss_fn, self.params, self.x, self.labels)

    def taps(self, fisher="exact", num_samples=1, key=None):
        collect = kfe.value_grad_and_taps(self.loss_fn, self.layers, fisher=fisher, num_samples=num_samples)
        return collect(self.params, self.x, self.labels, key=key)[2]

    @functools.cached_property
    def exact(self):
        """The taps of all columns."""
        return self.taps()

    @functools.cached_property
    def fisher(self):
        """Every stacked layer's JᵀHJ, (stacked or 1, d, d), from the Jacobian and Hessian in full."""
        layer = self.layers[self.name]

        def outputs(flat):
            own = layer.from_matrix(flat.reshape(layer.shape))
            leaves, structure = jax.tree_util.tree_flatten_with_path(self.params)
            new = [own.get(tuple(k.key for k in path), leaf) for path, leaf in leaves]
            return self.outputs(jax.tree.unflatten(structure, new), self.x)

        flat = layer.to_matrix(self.params).ravel()
        whole = np.asarray(dense.gauss_newton(outputs, self.plain_loss, flat))
        d = int(np.prod(layer.sides))
        blocks = whole.reshape(-1, d, flat.size // d, d)
        return np.stack([blocks[i, :, i] for i in range(flat.size // d)])

    @functools.cached_property
    def example_gradients(self):
        """The gradient of each example's own loss, (stacked or 1, n, d)."""
        layer = self.layers[self.name]

        def one(x, label):
            return layer.to_matrix(jax.grad(self.loss_fn)(self.params, x[None], label[None]))

        found = np.asarray(jax.jit(jax.vmap(one))(self.x, self.labels))
        return np.moveaxis(found.reshape(len(self.x), -1, int(np.prod(layer.sides))), 0, 1)


def _dense(generator, d_in, d_out):
    return {
        "kernel": jnp.asarray(generator.normal(size=(d_in, d_out))) / np.sqrt(d_in),
        "bias": jnp.asarray(generator.normal(size=d_out)) / 4,
    }


def _apply(params, x):
    return kfe.tag_dense(x, x @ params["kernel"] + params["bias"], params)


def plain():
    """One position an example; more coordinates than gradients."""
    generator = np.random.default_rng(0)
    params = {"first": _dense(generator, 4, 5), "last": _dense(generator, 5, CLASSES)}

    def outputs(params, x):
        return _apply(params["last"], jnp.tanh(_apply(params["first"], x)))

    return Model(outputs, params, jnp.asarray(generator.normal(size=(5, 4))), "first")


def positions():
    """Three shared positions an example; fewer coordinates than gradients."""
    generator = np.random.default_rng(1)
    params = {"shared": _dense(generator, 2, 4), "last": _dense(generator, 4, CLASSES)}

    def outputs(params, x):
        hidden = jnp.tanh(_apply(params["shared"], x)).mean(1)
        return _apply(params["last"], hidden)

    return Model(outputs, params, jnp.asarray(generator.normal(size=(7, 3, 2))), "shared")


def stacked():
    """Two layers under a scan."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4, name="dense")(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = scan(name="blocks")(nn.tanh(nn.Dense(4, name="first")(x)), None)
            return nn.Dense(CLASSES, name="last")(x)

    generator = np.random.default_rng(2)
    x = jnp.asarray(generator.normal(size=(5, 3)))
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(generator.normal(size=s.shape)) / 2, shapes)
    return Model(lambda params, x: Net().apply({"params": params}, x), params, x, "blocks/dense")


def twice():
    """Parameters that are used twice: per-example gradients, but no rows."""
    generator = np.random.default_rng(3)
    params = {"middle": _dense(generator, 4, 4), "last": _dense(generator, 4, CLASSES)}

    def outputs(params, x):
        for _ in range(2):
            x = jnp.tanh(_apply(params["middle"], x))
        return _apply(params["last"], x)

    return Model(outputs, params, jnp.asarray(generator.normal(size=(5, 4))), "middle")


MODELS = {function.__name__: function for function in (plain, positions, stacked, twice)}


def make(name: str) -> Model:
    """A model in the precision that is switched on; the same object each time, with what it has computed."""
    return _make(name, jax.config.jax_enable_x64)


@functools.cache
def _make(name: str, double: bool) -> Model:
    del double
    return MODELS[name]()


def symmetric(generator, *shape):
    root = generator.normal(size=(*shape, shape[-1]))
    return root + np.swapaxes(root, -1, -2)


def approximations(layer):
    """Random Kronecker terms of every form, and a random orthogonal basis with a scale."""
    generator = np.random.default_rng(4)
    stack, (d_in, d_out) = layer.stack_shape, layer.sides
    full = lambda d: symmetric(generator, *stack, d) / 20
    diagonal = lambda d: generator.uniform(size=(*stack, d)) / 5
    orthogonal = lambda d: np.linalg.qr(generator.normal(size=(*stack, d, d)))[0]
    terms = {
        "one": ((full(d_in), full(d_out)),),
        "two": ((full(d_in), full(d_out)), (full(d_in), full(d_out))),
        "diagonal input": ((diagonal(d_in), full(d_out)),),
        "diagonal output": ((full(d_in), diagonal(d_out)),),
        "mixed": ((full(d_in), diagonal(d_out)), (diagonal(d_in), full(d_out))),
    }
    bases = {
        "full": (orthogonal(d_in), orthogonal(d_out)),
        "input only": (orthogonal(d_in), None),
        "identity": (None, None),
    }
    return jax.tree.map(jnp.asarray, (terms, bases, generator.uniform(size=layer.shape) / 10))
