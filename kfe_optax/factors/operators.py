"""Z(F) of one layer as a linear map, never formed: in matrices, or in coefficients of the batch's own rank-1 matrices.

Z(F) is F rearranged so that Z(A⊗B) = vec(A) vec(B)ᵀ: it takes a matrix V on the output side to E[M V Mᵀ] on the input side, its
transpose U to E[Mᵀ U M] (Koroko et al. 2022, section 3). With one position an example, E[M V Mᵀ] = E[(gᵀVg) āāᵀ]: everything
that Z(F) yields is Σ_n c_n ā_n ā_nᵀ, and a product with Z(F) costs N² in the coefficients c instead of N d².
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._layers.layer import Layer
from kfe_optax._linalg import kronecker
from kfe_optax.factors import base
from kfe_optax.factors.base import Source, Term

# Above this many examples (or twice the layer's larger side) the N × N products cost more than the matrices.
_MOST_COEFFICIENTS = 2048

Map = Callable[[jax.Array], jax.Array]


class Operator(NamedTuple):
    """A linear map from vectors v of the output side to vectors u of the input side.

    Attributes:
      forward: v → u.
      adjoint: u → v, the transpose under the two inner products.
      metric_in: u → the array m with ⟨u, u'⟩ = Σ m u'; `metric_out` likewise.
      first: V (*stack, d_out, d_out), or its diagonal → a vector u, Z(F) V: where an iteration starts.
      to_input: u → its matrix (*stack, d_in, d_in), or its diagonal; `to_output` likewise.
      axes_in: over how many last axes ⟨u, u'⟩ sums; `axes_out` likewise.
    """

    forward: Map
    adjoint: Map
    metric_in: Map
    metric_out: Map
    first: Map
    to_input: Map
    to_output: Map
    axes_in: int
    axes_out: int

    def dot_in(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """⟨x, y⟩ of vectors of the input side; x may have further leading axes."""
        return _dot(x, self.metric_in(y), self.axes_in)

    def dot_out(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """⟨x, y⟩ of vectors of the output side; x may have further leading axes."""
        return _dot(x, self.metric_out(y), self.axes_out)


def _dot(x: jax.Array, y: jax.Array, axes: int) -> jax.Array:
    return jnp.sum(x * jnp.expand_dims(y, range(x.ndim - y.ndim)), tuple(range(-axes, 0)))


def times(scalar: jax.Array, vector: jax.Array) -> jax.Array:
    """A vector times a number (*stack,)."""
    return vector * scalar.reshape(scalar.shape + (1,) * (vector.ndim - scalar.ndim))


def fisher_operator(
    source: Source, layer: Layer, like: Term, *, weight: jax.Array | float = 1.0, plus: Sequence[Term] = ()
) -> Operator:
    """weight Z(F) + Σ vec(A) vec(B)ᵀ over the terms in `plus`; `like` says which sides are diagonals."""
    pulled = source.pulled
    assert pulled is not None
    diagonal = base.is_diagonal(layer, like)
    rows = pulled.rows(layer.name)
    if rows is not None and rows[0].shape[-2] <= max(_MOST_COEFFICIENTS, 2 * max(layer.sides)):
        return _in_coefficients(*rows, diagonal, weight, plus)
    return _in_matrices(source, layer, diagonal, weight, plus)


def _in_matrices(source, layer, diagonal, weight, plus) -> Operator:
    pulled, name, stacked = source.pulled, layer.name, len(layer.stack_shape)

    def forward(v):
        u = weight * pulled.reduce(lambda s: s[name].contract_output(v, diagonal[0]))
        return sum((times(kronecker.dot(term.output, v, stacked), term.input) for term in plus), u)

    def adjoint(u):
        v = weight * pulled.reduce(lambda s: s[name].contract_input(u, diagonal[1]))
        return sum((times(kronecker.dot(term.input, u, stacked), term.output) for term in plus), v)

    def same(x):
        return x

    axes_in, axes_out = (1 if d else 2 for d in diagonal)
    return Operator(forward, adjoint, same, same, forward, same, same, axes_in, axes_out)


def _in_coefficients(a, g, diagonal, weight, plus) -> Operator:
    """Vectors are coefficients (*stack, n + k) of the n matrices ā_n ā_nᵀ (or g_n g_nᵀ) and of the k terms in `plus`."""
    n = a.shape[-2]
    sides = [_Atoms(rows, [term[side] for term in plus], diagonal[side]) for side, rows in enumerate((a, g))]
    inputs, outputs = sides
    gram_in, gram_out = inputs.gram(), outputs.gram()
    # Of the terms of Z = Σ w vec(x) vec(y)ᵀ.
    weights = jnp.concatenate([jnp.full(n, weight / n, a.dtype), jnp.ones(len(plus), a.dtype)])
    weights = jnp.expand_dims(weights, range(a.ndim - 2))

    def metric_in(c):
        return jnp.einsum("...nm,...m->...n", gram_in, c)

    def metric_out(c):
        return jnp.einsum("...nm,...m->...n", gram_out, c)

    return Operator(
        lambda c: weights * metric_out(c),
        lambda c: weights * metric_in(c),
        metric_in,
        metric_out,
        lambda v: weights * outputs.products(v),
        inputs.combine,
        outputs.combine,
        1,
        1,
    )


class _Atoms(NamedTuple):
    """The matrices x_n x_nᵀ of rows x (*stack, n, d), followed by further matrices; diagonals of all on a diagonal side."""

    rows: jax.Array
    more: list[jax.Array]
    diagonal: bool

    def products(self, matrix: jax.Array) -> jax.Array:
        """⟨atom, matrix⟩ for every atom, (*stack, n + k)."""
        x = self.rows
        own = jnp.einsum("...nd,...d->...n", x * x, matrix) if self.diagonal else jnp.sum(x @ matrix * x, -1)
        stacked = x.ndim - 2
        return jnp.concatenate(
            [own, *(kronecker.dot(other, matrix, stacked)[..., None] for other in self.more)], -1
        )

    def gram(self) -> jax.Array:
        """(*stack, n + k, n + k) inner products of the atoms."""
        x = self.rows * self.rows if self.diagonal else self.rows
        own = x @ x.mT
        own = own if self.diagonal else jnp.square(own)
        if not self.more:
            return own
        columns = jnp.stack([self.products(other) for other in self.more], -1)
        n = x.shape[-2]
        left = jnp.concatenate([own, columns[..., :n, :].mT], -2)
        return jnp.concatenate([left, columns], -1)

    def combine(self, c: jax.Array) -> jax.Array:
        """Σ c_n atom_n, (*stack, d, d) or its diagonal."""
        x, n = self.rows, self.rows.shape[-2]
        total = (
            jnp.einsum("...n,...nd->...d", c[..., :n], x * x)
            if self.diagonal
            else (x * c[..., :n, None]).mT @ x
        )
        for i, other in enumerate(self.more):
            total = total + times(c[..., n + i], other)
        return total


def without(operator: Operator, u: jax.Array) -> Operator:
    """(I − u uᵀ) operator for a unit vector u of the input side: the operator deflated by a singular vector."""

    def project(x):
        return x - times(operator.dot_in(u, x), u)

    return operator._replace(
        forward=lambda v: project(operator.forward(v)),
        adjoint=lambda x: operator.adjoint(project(x)),
        first=lambda v: project(operator.first(v)),
    )
