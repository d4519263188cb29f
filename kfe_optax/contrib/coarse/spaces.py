"""The coarse spaces: how every layer's coarse vectors come about, and when they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax._jax import failures
from kfe_optax._jax.failures import Failure
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Devices
from kfe_optax._linalg.kronecker import Eigenbasis
from kfe_optax._statistics.statistics import Statistics
from kfe_optax._taps.taps import Pulled
from kfe_optax.contrib.coarse.vectors import Full, RankOne
from kfe_optax.factors.base import Source
from kfe_optax.factors.kfac import Kfac


class Given(NamedTuple):
    """What a coarse space may look at when it makes its vectors.

    Attributes:
      layers: {name: layer}, those that have coarse vectors.
      all_layers: the layers of the optimizer.
      pulled: the statistics of the step.
      gradients: {layer: mean gradient (*stack, d_in, d_out)}.
      fine: {layer: the fine preconditioner's update of it}.
      damping: λ of the coarse level.
      count: int32, the step.
      refresh: whether new vectors are wanted in this step, or only statistics.
      devices: who shares factorizations.
    """

    layers: Mapping[str, Layer]
    all_layers: Layers
    pulled: Pulled
    gradients: Mapping[str, jax.Array]
    fine: Mapping[str, jax.Array]
    damping: jax.Array
    count: jax.Array
    refresh: jax.Array
    devices: Devices


class Space(Protocol):
    """One way to choose the coarse vectors of a layer (see `two_level`); hashable."""

    @property
    def moves(self) -> bool:
        """Whether the vectors change in training, and with them what their Fisher matrix is an average of."""

    @property
    def rank_one(self) -> bool:
        """Whether they are of rank one, as the factored form needs."""

    def size(self, layer: Layer) -> int:
        """How many coarse vectors one layer of a stack has."""

    def init(self, layers: Sequence[Layer]) -> SpaceState:
        """The state before the first step."""

    def vectors(self, state: SpaceState, layers: Sequence[Layer]) -> Any:
        """{layer: its coarse vectors}."""

    def update(self, state: SpaceState, given: Given) -> tuple[SpaceState, jax.Array]:
        """The state after a step that measures, and how many estimates and factorizations failed."""


class SpaceState(NamedTuple):
    """State of a space that moves; both fields are empty where it does not.

    Attributes:
      factors: the state of K-FAC's factors ("eigenvectors").
      vectors: {layer: coarse vectors}.
    """

    factors: Any = ()
    vectors: Any = ()


class Groups(NamedTuple):
    """All-ones matrices, cut into groups of output units: p = 1, q = 1 on the units of one group."""

    groups: int

    moves = False
    rank_one = True

    def size(self, layer):
        return min(self.groups, layer.sides[1])

    def init(self, layers):
        del layers
        return SpaceState()

    def vectors(self, state, layers):
        del state
        return {layer.name: self._of_layer(layer) for layer in layers}

    def _of_layer(self, layer: Layer) -> RankOne:
        d_in, d_out = layer.sides
        v = self.size(layer)
        group = np.arange(d_out) * v // d_out
        member = jnp.asarray(np.arange(v)[:, None] == group, layer.factor_dtype)
        return RankOne(
            jnp.ones((*layer.stack_shape, v, d_in), layer.factor_dtype),
            jnp.broadcast_to(member, (*layer.stack_shape, v, d_out)),
        )

    def update(self, state, given):
        del given
        return state, failures.none()


class Residual(NamedTuple):
    """One matrix a layer: its part of what the fine update Δ leaves of the equation (F + λI)Δ = ∇, normalized.

    r = ∇ − (F + λI)Δ with F of the current batch and over all layers, so that it sees what a block-diagonal fine level cannot:
    along r the fine update is wrong by construction.
    """

    moves = True
    rank_one = False

    def size(self, layer):
        del layer
        return 1

    def init(self, layers):
        return SpaceState(
            (), {layer.name: Full(jnp.zeros(layer.shape, layer.factor_dtype)) for layer in layers}
        )

    def vectors(self, state, layers):
        del layers
        return state.vectors

    def update(self, state, given):
        vectors = jax.lax.cond(given.refresh, lambda: _residuals(given), lambda: state.vectors)
        return state._replace(vectors=vectors), failures.none()


def _residuals(given: Given) -> dict[str, Full]:
    fine = {name: given.fine[name].astype(layer.factor_dtype) for name, layer in given.layers.items()}
    product = given.pulled.reduce(lambda s: _fisher_product(s, fine, given.layers))
    found = {}
    for name, layer in given.layers.items():
        damped = product[name] + given.damping.astype(layer.factor_dtype) * fine[name]
        residual = given.gradients[name].astype(layer.factor_dtype) - damped
        axes = tuple(range(len(layer.stacked), residual.ndim))
        # Of its largest entry first: the squares of large entries would overflow.
        residual = _divided(residual, jnp.max(jnp.abs(residual), axes, keepdims=True))
        found[name] = Full(_divided(residual, jnp.sqrt(jnp.sum(jnp.square(residual), axes, keepdims=True))))
    return found


def _divided(values: jax.Array, by: jax.Array) -> jax.Array:
    return values / jnp.where(by > 0, by, 1)


def _fisher_product(
    statistics: Mapping[str, Statistics], vectors: Mapping[str, jax.Array], layers: Mapping[str, Layer]
) -> dict[str, jax.Array]:
    """F Δ over all layers, cross-layer blocks included: E[⟨M_n, Δ⟩ M_n], M_n the whole gradient of an example."""
    products = [statistics[name].inner(vectors[name]) for name in layers]
    inner = jnp.stack([p.reshape(-1, p.shape[-1]).sum(0) for p in products]).sum(0)
    return {name: statistics[name].weighted_gradient(inner) / inner.size for name in layers}


class Eigenvectors(NamedTuple):
    """The eigenvectors of a layer's A⊗G with the `count` largest eigenvalues, p qᵀ with p one of A and q one of G."""

    count: int
    factors: Kfac
    max_dim: int | None

    moves = True
    rank_one = True

    def size(self, layer):
        whole = int(np.prod(layer.shape[len(layer.stacked) :]))
        return min(self.count, whole)

    def init(self, layers):
        vectors = {}
        for layer in layers:
            shapes = [(*layer.stack_shape, self.size(layer), d) for d in layer.sides]
            vectors[layer.name] = RankOne(*(jnp.zeros(shape, layer.factor_dtype) for shape in shapes))
        return SpaceState(self.factors.init(layers, self.max_dim), vectors)

    def vectors(self, state, layers):
        del layers
        return state.vectors

    def update(self, state, given):
        source = Source(given.all_layers, given.pulled, {})
        factors = self.factors.update(state.factors, source, given.count)
        vectors, failed = jax.lax.cond(
            given.refresh,
            lambda: self._leading(factors, state.vectors, given),
            lambda: (state.vectors, jnp.zeros((), jnp.int32)),
        )
        more = failures.of(Failure.FACTORIZATION, failed)
        return SpaceState(factors, vectors), more + factors.failures - state.factors.failures

    def _leading(self, factors: Any, old: Any, given: Given) -> tuple[dict[str, RankOne], jax.Array]:
        terms = self.factors.terms(factors, given.all_layers)
        sides = {(name, side): terms[name][0][side] for name in given.layers for side in (0, 1)}
        stacked = {name: len(layer.stack_shape) for name, layer in given.layers.items()}
        full = {k: v for k, v in sides.items() if not kronecker.is_diagonal(v, stacked[k[0]])}
        with jax.default_matmul_precision("highest"):
            bases = kronecker.by_shape(kronecker.eigh, full, given.devices)
        found, failed = {}, jnp.zeros((), jnp.int32)
        for name, layer in given.layers.items():
            pair, finite = [], jnp.ones((), bool)
            for side in (0, 1):
                factor = sides[name, side]
                basis, good = bases.get((name, side), (Eigenbasis(factor, None), jnp.isfinite(factor)))
                pair.append(basis)
                finite &= good.all()
                failed = failed + jnp.sum(~good, dtype=jnp.int32)
            new = _largest(layer, pair, self.size(layer))
            found[name] = jax.tree.map(lambda n, o, ok=finite: jnp.where(ok, n, o), new, old[name])
        return found, failed


def _largest(layer: Layer, bases: Sequence[Eigenbasis], count: int) -> RankOne:
    """The eigenvectors of the `count` largest products s_A s_G among all blocks of a layer, for every layer of a stack."""
    lead, rank = layer.stacked, len(layer.stacked)
    blocks = int(np.prod(layer.stack_shape[rank:]))

    def flat(leaf, own):
        # Blocks that share a factor have its eigenvectors each.
        whole = jnp.broadcast_to(leaf, (*layer.stack_shape, *leaf.shape[leaf.ndim - own :]))
        return whole.reshape(-1, blocks, *whole.shape[len(layer.stack_shape) :])

    values = [flat(basis.values, 1) for basis in bases]
    vectors = [None if basis.vectors is None else flat(basis.vectors, 2) for basis in bases]
    products = kronecker.outer(*values)
    _, index = jax.lax.top_k(products.reshape(products.shape[0], -1), count)
    block, *columns = jnp.unravel_index(index, products.shape[1:])
    own = jax.nn.one_hot(block, blocks, axis=1, dtype=layer.factor_dtype)[..., None]
    sides = []
    for side in (0, 1):
        if vectors[side] is None:
            chosen = jax.nn.one_hot(columns[side], layer.sides[side], dtype=layer.factor_dtype)
        else:
            chosen = jax.vmap(lambda u, b, i: u[b, :, i])(vectors[side], block, columns[side])
        sides.append((own * chosen[:, None]).reshape(*lead, *layer.stack_shape[rank:], count, -1))
    if layer.kind.per_example:
        # Where the row ā is 1 in every block, q alone tells the blocks apart (see `Rows.project_inputs`).
        sides = [jnp.ones_like(sides[0]), sides[0] * sides[1]]
    return RankOne(*sides)
