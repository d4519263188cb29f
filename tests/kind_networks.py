"""Networks of one layer of each kind side by side, what their taps answer, and the same from `dense_kinds`.

z = Σ over the layers of tanh(y) H with a cross-entropy, so that every layer's g is known in closed form.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfe_optax as kfe
from kfe_optax._jax import chunks

from . import dense_kinds as dk

N, CLASSES = 5, 3


@dataclasses.dataclass(frozen=True)
class Branch:
    """A layer beside others: its input, and its rows by `dense_kinds`.

    Attributes:
      apply: (params, x) → y (n, ...).
      params: as Flax keeps them.
      x: the input.
      rows: g (c, n, *y's shape) → `dense_kinds.Rows`.
      configure: for `Layers.configure`.
      factors: Rows → (A, G) where the definition is another than "expand"'s.
      plain: whether M is the gradient of an example's own loss (not with rows masked, or a norm over the batch).
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    x: Any
    rows: Callable[[np.ndarray], dk.Rows]
    configure: dict[str, Any] | None = None
    factors: Callable[[dk.Rows], tuple[np.ndarray, np.ndarray]] = dk.Rows.expand
    plain: bool = True


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def parameters(module, x, seed=1, **kwargs):
    """Random parameters in the shapes that the module has."""
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), x)["params"]
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda s: generator.normal(size=s.shape) / 2, shapes)


def of_module(module, x, rows, **fields):
    """A branch of one Linen module that holds the parameters itself."""
    own = lambda params, x: module.apply({"params": params}, x)
    return Branch(own, parameters(module, x), x, rows, **fields)


class Network:
    """Branches side by side; `pieces` examples at a time where that is not None; everything is asked of those in `thorough`."""

    def __init__(self, cases: dict[str, Callable[[], Branch]], thorough=(), pieces: int | None = None):
        self.thorough = frozenset(thorough)
        branches = {name: make() for name, make in cases.items()}
        self.branches, self.pieces = branches, pieces
        self.params = jax.tree.map(jnp.asarray, {name: b.params for name, b in branches.items()})
        self.x = {name: jax.tree.map(jnp.asarray, b.x) for name, b in branches.items()}
        self.labels = np.arange(N) % CLASSES
        each = jax.jit(
            lambda params, x: {name: b.apply(params[name], x[name]) for name, b in branches.items()}
        )
        self.y = jax.tree.map(np.asarray, each(self.params, self.x))
        self.heads = {
            name: random(i, y.size // N, CLASSES) / np.sqrt(y.size // N)
            for i, (name, y) in enumerate(self.y.items())
        }
        self.layers = kfe.find_layers(self.loss_fn, self.params, self.x, self.labels)
        assert set(self.layers) == set(branches), set(self.layers) ^ set(branches)
        for name, branch in branches.items():
            if branch.configure:
                self.layers = self.layers.configure(name, **branch.configure)

    def outputs(self, params, x):
        """z (n, classes)."""
        z = jnp.zeros((N, CLASSES))
        for name, branch in self.branches.items():
            y = branch.apply(params[name], x[name])
            z = z + jnp.tanh(y).reshape(N, -1) @ self.heads[name]
        return z

    def loss_fn(self, params, x, labels):
        z = self.outputs(params, x)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    @functools.cached_property
    def z(self):
        return sum(np.tanh(y).reshape(N, -1) @ self.heads[name] for name, y in self.y.items())

    def rows(self, name, fisher) -> dk.Rows:
        """The layer's rows by definition, of the gradient's own targets ("empirical") or of all columns ("exact")."""
        outer = dk.columns(self.z) if fisher == "exact" else dk.residual(self.z, self.labels)
        return self.branches[name].rows(dk.through_head(self.y[name], self.heads[name], outer))

    def taps(self, fisher):
        """(gradient, taps)."""
        with in_pieces(self.pieces):
            collect = kfe.value_grad_and_taps(self.loss_fn, self.layers, fisher=fisher)
            return collect(self.params, self.x, self.labels)[1:]

    @functools.cached_property
    def questions(self):
        """{layer: random bases, symmetric and indefinite V and U, and their diagonals}."""
        generator, found = np.random.default_rng(9), {}
        for name, layer in self.layers.items():
            (d_in, d_out), stack = layer.sides, layer.stack_shape
            orthogonal = lambda d, side, own=layer: np.linalg.qr(
                generator.normal(size=(*own.side_stack(side), d, d))
            )[0]
            square = lambda d, stack=stack: generator.normal(size=(*stack, d, d))
            v, u = square(d_out), square(d_in)
            given = {"in": orthogonal(d_in, 0), "out": orthogonal(d_out, 1)}
            given |= {"v": v + v.swapaxes(-1, -2), "u": u + u.swapaxes(-1, -2)}
            found[name] = given
        return found

    @functools.cached_property
    def exact(self):
        """{layer: G from the taps of all columns}."""
        own, (_, taps) = self.layers, self.taps("exact")

        @jax.jit
        def read(taps):
            return taps.pulled().reduce(lambda s: {name: s[name].output_factor() for name in own})

        with in_pieces(self.pieces):
            return jax.tree.map(np.asarray, read(taps))

    @functools.cached_property
    def empirical(self):
        """({layer: mean gradient}, {layer: everything that its taps answer})."""
        grads, taps = self.taps("empirical")

        @jax.jit
        def read(taps, questions):
            drawn = taps.draw(0)
            return {
                name: answers(layer, drawn[name], questions[name], name in self.thorough)
                for name, layer in self.layers.items()
            }

        with in_pieces(self.pieces):
            found = jax.tree.map(np.asarray, read(taps, self.questions))
        return jax.tree.map(np.asarray, jax.jit(self.matrices)(grads)), found

    @functools.cached_property
    def example_gradients(self):
        """{layer: the gradient of each example's own loss (n, *W̄'s shape)}, by plain differentiation."""

        def one(params, i):
            z = self.outputs(params, self.x)
            return -jax.nn.log_softmax(z[i])[jnp.asarray(self.labels)[i]]

        @jax.jit
        def matrices(params, i):
            return self.matrices(jax.grad(one)(params, i))

        found = [matrices(self.params, i) for i in range(N)]
        return {name: np.stack([np.asarray(own[name]) for own in found]) for name in self.layers}

    def matrices(self, tree):
        return {name: layer.to_matrix(tree) for name, layer in self.layers.items()}

    @functools.cached_property
    def round_trip(self):
        """The parameters from their matrices."""

        @jax.jit
        def back(params):
            matrices = self.matrices(params)
            return {name: layer.from_matrix(matrices[name]) for name, layer in self.layers.items()}

        return back(self.params)


def diagonal(matrix):
    return matrix.diagonal(axis1=-2, axis2=-1)


def answers(layer, own, given, thorough):
    """Everything that a layer's statistics answer, by name; with a diagonal A in its own forms."""
    v, u = given["v"], given["u"]
    tokens = layer.kind.diagonal[0]
    basis = None if tokens else given["in"]
    found = {
        "A": own.input_factor(),
        "G": own.output_factor(),
        "examples": own.example_gradients(),
        "moment": own.second_moment_in(basis, given["out"]),
    }
    if layer.has_rows:
        found["rows"] = own.rows()
    if not thorough:
        return found
    if not tokens:
        found["A diagonal"] = own.input_factor(True)
    found |= {
        "G diagonal": own.output_factor(True),
        "moment, identity": own.second_moment_in(None, None),
        "contract output": own.contract_output(v, tokens),
        "contract output, diagonals": own.contract_output(diagonal(v), True),
        "contract input": own.contract_input(diagonal(u) if tokens else u),
        "contract input, diagonals": own.contract_input(diagonal(u), True),
        "traced examples": own.traced_factors("example", (tokens, False)),
        "traced examples, diagonals": own.traced_factors("example", (True, True)),
    }
    if layer.has_rows:
        found["traced positions"] = own.traced_factors("position", (tokens, False))
        found["traced positions, diagonals"] = own.traced_factors("position", (True, True))
    return found


def expected_answers(network, name, fisher):
    """The same by definition ("examples" and "rows" of the first column)."""
    layer, branch, given = network.layers[name], network.branches[name], network.questions[name]
    rows = network.rows(name, fisher)
    v, u, tokens = given["v"], given["u"], layer.kind.diagonal[0]
    narrow = diagonal if tokens else lambda matrix: matrix
    only = lambda matrix: np.eye(matrix.shape[-1]) * matrix  # the diagonal as a matrix
    a, g = branch.factors(rows)
    eye_in, eye_out = (np.broadcast_to(np.eye(d), (*layer.stack_shape, d, d)) for d in layer.sides)
    found = {
        "A": narrow(a),
        "A diagonal": diagonal(a),
        "G": g,
        "examples": rows.gradients()[..., 0, :, :, :],
        "rows": (rows.a, rows.g[..., 0, :, :, :]),
        "G diagonal": diagonal(g),
        "moment": rows.second_moment(eye_in if tokens else given["in"], given["out"]),
        "moment, identity": rows.second_moment(eye_in, eye_out),
        "contract output": narrow(rows.contract_output(v)),
        "contract output, diagonals": diagonal(rows.contract_output(only(v))),
        "contract input": rows.contract_input(only(u) if tokens else u),
        "contract input, diagonals": diagonal(rows.contract_input(only(u))),
    }
    for pairing in ("example", "position"):
        sigma, left, right = rows.traced(pairing)
        found[f"traced {pairing}s"] = sigma, narrow(left), right
        found[f"traced {pairing}s, diagonals"] = sigma, diagonal(left), diagonal(right)
    return found


@contextlib.contextmanager
def in_pieces(pieces: int | None) -> Iterator[None]:
    """Sums over examples in pieces of this many, the last one shorter."""
    size = chunks.size
    if pieces:
        chunks.size = lambda examples, per_example: min(size(examples, per_example), pieces)
    try:
        yield
    finally:
        chunks.size = size
