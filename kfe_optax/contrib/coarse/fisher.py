"""The Fisher matrix between coarse vectors, from per-example projections: factored as K-FAC's blocks are, or exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax._jax import chunks
from kfe_optax._layers.layer import Layer
from kfe_optax._statistics.statistics import Statistics
from kfe_optax._taps.taps import Pulled
from kfe_optax.contrib.coarse.grids import Choice, grid_of, resamplings
from kfe_optax.contrib.coarse.spaces import Space

LARGEST = 8192
"""The largest number of rows of a coarse Fisher matrix."""

Averages = tuple[jax.Array, ...]
Present = Mapping[str, Layer]


class Form(Protocol):
    """One way to estimate the coarse Fisher matrix."""

    def init(self, space: Space, layers: Present, dtype: Any) -> Averages:
        """Zeros for what is averaged; raises ValueError for a layer that the form cannot serve."""

    def measure(self, pulled: Pulled, vectors: Mapping[str, Any], layers: Present, dtype: Any) -> Averages:
        """What is averaged, of one batch."""

    def matrix(self, averages: Averages, space: Space, layers: Present) -> jax.Array:
        """F_c (v, v) without damping, of all coarse vectors in the order of the layers and of their stacks."""


class Exact(NamedTuple):
    """Z F Zᵀ = E[ζ ζᵀ], ζ_k = ⟨Z_k, M_n⟩, with the gradient M_n of a whole example over all layers."""

    def init(self, space, layers, dtype):
        size = sum(_count(space, layer) for layer in layers.values())
        _check_size(size, "choose fewer groups or a smaller count")
        return (jnp.zeros((size, size), dtype),)

    def measure(self, pulled, vectors, layers, dtype):
        def square(statistics: Mapping[str, Statistics]) -> jax.Array:
            _check_examples(statistics, layers)
            parts = [
                _rows(vectors[name].gradients(statistics[name]), layer, 1).astype(dtype)
                for name, layer in layers.items()
            ]
            zeta = jnp.concatenate(parts, 1)
            return zeta.T @ zeta / zeta.shape[0]

        return (pulled.reduce(square),)

    def matrix(self, averages, space, layers):
        del space, layers
        return averages[0]


class Factored(NamedTuple):
    """[F_c]_kl = E[mean_t α_k α_l] · E[Σ_t γ_k γ_l] with α = pᵀā, γ = qᵀg: Z F̃ Zᵀ for F̃_ij = A_ij⊗G_ij.

    Two Gram matrices, so that their elementwise product is positive semi-definite (Schur): positions are those of one grid for
    all layers. The blocks of a layer (feature groups) are rows of their own, whose products are added.
    """

    grid: Choice

    def init(self, space, layers, dtype):
        for layer in layers.values():
            if not layer.has_rows:
                raise ValueError(
                    f"Layer {layer.name!r} {layer.why_sums}, so the sums of its single rows, of which the factored coarse Fisher "
                    "consists, are not known: choose form='exact'."
                )
        size = sum(_count(space, layer) * _blocks(layer) for layer in layers.values())
        _check_size(
            size, "choose form='exact', where a layer's blocks (feature groups) are one, or fewer vectors"
        )
        return jnp.zeros((size, size), dtype), jnp.zeros((size, size), dtype)

    def measure(self, pulled, vectors, layers, dtype):
        def inputs(statistics):
            _check_examples(statistics, layers)
            return self._gram(
                {name: statistics[name].project_inputs(vectors[name].inputs) for name in layers},
                statistics,
                layers,
                dtype,
            )

        def outputs(statistics):
            return self._gram(
                {name: statistics[name].project_outputs(vectors[name].outputs) for name in layers},
                statistics,
                layers,
                dtype,
            )

        return pulled.both(inputs, outputs)

    def _gram(self, projections: Any, statistics: Any, layers: Present, dtype: Any) -> jax.Array:
        """Σ over examples and common positions of the outer products of all rows."""
        # The batch, and with it the positions, may be another than that of find_layers.
        grids = [grid_of(statistics[name].layer) for name in layers]
        maps, positions = resamplings(grids, self.grid)
        rows = [
            _rows(jnp.moveaxis(projections[name], len(layer.stacked) + 1, -1), layer, 3).astype(dtype)
            for name, layer in layers.items()
        ]

        def square(pieces: list[jax.Array]) -> jax.Array:
            resampled = [resample(piece) for resample, piece in zip(maps, pieces, strict=True)]
            flat = jnp.concatenate(resampled, 1).swapaxes(0, 1)
            flat = flat.reshape(flat.shape[0], -1)
            return flat @ flat.T

        size = sum(row.shape[1] for row in rows)
        chunk = chunks.size(rows[0].shape[0], 2 * size * positions * dtype.itemsize)
        return chunks.fold(square, rows, chunk)

    def matrix(self, averages, space, layers):
        # The mean of a product is not the product of the means: each side has its average.
        product = averages[0] * averages[1]
        ids = []
        for layer in layers.values():
            first = ids[-1][-1] + 1 if ids else 0
            ids.append(first + np.arange(_count(space, layer)).repeat(_blocks(layer)))
        rows = np.concatenate(ids)
        if len(rows) == rows[-1] + 1:
            return product
        whole = jax.ops.segment_sum(product, rows, rows[-1] + 1, indices_are_sorted=True)
        return jax.ops.segment_sum(whole.T, rows, rows[-1] + 1, indices_are_sorted=True)


def _count(space: Space, layer: Layer) -> int:
    """The coarse vectors of all layers of a stack."""
    return math.prod(layer.stacked) * space.size(layer)


def _blocks(layer: Layer) -> int:
    """Rows of the factored form that one coarse vector has; a norm's features are one, their ā is 1."""
    return 1 if layer.kind.per_example else math.prod(layer.stack_shape[len(layer.stacked) :])


def _rows(values: jax.Array, layer: Layer, own: int) -> jax.Array:
    """(*stacked, n, ...) → (n, rows) for own = 1, (*stacked, n, v, blocks, t) → (n, rows, t) for own = 3."""
    lead = len(layer.stacked)
    values = jnp.moveaxis(values, lead, 0)
    tail = values.shape[-1:] if own == 3 else ()
    return values.reshape(values.shape[0], -1, *tail)


def _check_size(size: int, advice: str) -> None:
    if size > LARGEST:
        raise ValueError(f"The coarse Fisher matrix would have {size} rows, more than {LARGEST}: {advice}.")


def _check_examples(statistics: Mapping[str, Statistics], layers: Present) -> None:
    """Raises ValueError unless all layers see the same examples."""
    counts = {name: statistics[name].layer.examples for name in layers}
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first]:
            raise ValueError(
                f"Layer {name!r} sees {count} examples and layer {first!r} {counts[first]}, so their gradients cannot be paired "
                "example by example: call the model on the whole batch."
            )
