"""The statistics of one layer from one Fisher draw: factors, second moments, per-example gradients.

Row statistics hold ā (..., n, t, d_in) and g (..., n, t, d_out), additive statistics hold sums. Both answer the same questions;
`...` are stacked layers. F = (1/N) Σ_n vec(M_n) vec(M_n)ᵀ with M_n = Σ_t ā_{n,t} g_{n,t}ᵀ, g carrying √N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from kfe_optax.layers import Layer

# Whether TKFAC weights each position with its own traces, or each example with those of its whole gradient.
Pairing = Literal["position", "example"]


class Statistics(Protocol):
    layer: Layer

    def rows(self) -> tuple[jax.Array, jax.Array]:
        """ā (..., n, t, d_in), g (..., n, t, d_out)."""

    def input_factor(self, diagonal: bool = False) -> jax.Array:
        """A = E[mean_t ā āᵀ], (..., d_in, d_in), or its diagonal (..., d_in)."""

    def output_factor(self, diagonal: bool = False) -> jax.Array:
        """G = E[Σ_t g gᵀ], (..., d_out, d_out), or its diagonal (..., d_out)."""

    def second_moment_in(self, basis_in: Any, basis_out: Any) -> jax.Array | None:
        """S* = E[(U_Aᵀ M U_G)²], (..., d_in, d_out); a basis None is the identity. None when unknown."""

    def contract_output(self, v: jax.Array, diagonal: bool = False) -> jax.Array:
        """MAT(Z(F) v) = E[M V Mᵀ], (..., d_in, d_in), or its diagonal; V (..., d_out, d_out) or a diagonal (..., d_out)."""

    def contract_input(self, u: jax.Array, diagonal: bool = False) -> jax.Array:
        """MAT(Z(F)ᵀ u) = E[Mᵀ U M], (..., d_out, d_out), or its diagonal; U (..., d_in, d_in) or a diagonal (..., d_in)."""

    def traced_factors(
        self, pairing: Pairing, diagonal: tuple[bool, bool]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """σ (...,), σΦ and σΨ of TKFAC (see `factors.tkfac`), or their diagonals."""

    def example_gradients(self) -> jax.Array:
        """M_n, (..., n, d_in, d_out)."""


def make_statistics(layer: Layer, rider: Mapping[str, jax.Array], empirical: bool) -> Statistics:
    """The statistics in a layer's rider.

    An empirical draw is the gradient itself, in which each example has its weight 1/N; rows are N times that. Fisher draws
    carry the root of the weight, and rows √N times that.
    """
    n = layer.examples
    scale = float(n) if empirical else math.sqrt(n)
    dtype = layer.factor_dtype
    if layer.shared:
        return _Sums(layer, rider, scale)
    a, g = layer.split_rows(rider)
    return _Rows(layer, a.astype(dtype), g.astype(dtype) * jnp.asarray(scale, dtype))


def _project(rows: jax.Array, basis: Any) -> jax.Array:
    return rows if basis is None else rows @ basis


def _over_stack(function: Any, stacked: int) -> Any:
    return functools.reduce(lambda f, _: jax.vmap(f), range(stacked), function)


class _Rows:
    def __init__(self, layer: Layer, a: jax.Array, g: jax.Array):
        self.layer = layer
        self._a = a
        self._g = g

    def rows(self):
        return self._a, self._g

    def input_factor(self, diagonal=False):
        count = self._a.shape[-3] * self._a.shape[-2]
        return _gram(self._a, diagonal) / count

    def output_factor(self, diagonal=False):
        return _gram(self._g, diagonal) / self._g.shape[-3]

    def second_moment_in(self, basis_in, basis_out):
        bases = {name: b for name, b in (("in", basis_in), ("out", basis_out)) if b is not None}

        def one(a, g, bases):
            return _second_moment(_project(a, bases.get("in")), _project(g, bases.get("out")))

        return _over_stack(one, len(self.layer.stack_shape))(self._a, self._g, bases)

    def contract_output(self, v, diagonal=False):
        return self._contract(self._g, self._a, v, diagonal)

    def contract_input(self, u, diagonal=False):
        return self._contract(self._a, self._g, u, diagonal)

    def _contract(self, inner, outer, matrix, diagonal):
        function = functools.partial(_contract, diagonal=diagonal)
        return _over_stack(function, len(self.layer.stack_shape))(inner, outer, matrix)

    def traced_factors(self, pairing, diagonal):
        function = _traced_positions if pairing == "position" else _traced_examples
        function = functools.partial(function, diagonal=diagonal)
        return _over_stack(function, len(self.layer.stack_shape))(self._a, self._g)

    def example_gradients(self):
        return jnp.einsum("...nta,...ntb->...nab", self._a, self._g)


def _gram(rows: jax.Array, diagonal: bool) -> jax.Array:
    flat = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    return jnp.sum(flat * flat, -2) if diagonal else flat.mT @ flat


def _second_moment(a: jax.Array, g: jax.Array) -> jax.Array:
    """(1/n) Σ_n (Σ_t a_{n,t} g_{n,t}ᵀ)² elementwise, for a (n, t, d_in), g (n, t, d_out)."""
    n, t, _ = a.shape
    if t == 1:
        return jnp.square(a[:, 0]).T @ jnp.square(g[:, 0]) / n

    # One example at a time: the n gradients are never all in memory.
    def add(total, rows):
        a, g = rows
        return total + jnp.square(a.T @ g), None

    zeros = jnp.zeros((a.shape[-1], g.shape[-1]), a.dtype)
    return jax.lax.scan(add, zeros, (a, g))[0] / n


def _contract(inner: jax.Array, outer: jax.Array, matrix: jax.Array, diagonal: bool) -> jax.Array:
    """(1/n) Σ_n Σ_{t,t'} (x_tᵀ K x_t') y_t y_t'ᵀ for inner x (n, t, d), outer y (n, t, e) and K (d, d) or its diagonal."""
    n, t, _ = inner.shape
    mapped = inner * matrix if matrix.ndim == 1 else inner @ matrix
    if t == 1:
        rows = outer[:, 0]
        weights = jnp.sum(mapped * inner, -1) / n
        weighted = weights * rows
        return jnp.sum(weighted * rows, 0) if diagonal else weighted.T @ rows

    # One example at a time: of the (t, t) products only one is in memory.
    def add(total, example):
        inner, mapped, outer = example
        weighted = mapped @ (inner.T @ outer) if t > outer.shape[-1] else (mapped @ inner.T) @ outer
        return total + (jnp.sum(weighted * outer, 0) if diagonal else outer.T @ weighted), None

    zeros = jnp.zeros(outer.shape[-1:] * (1 if diagonal else 2), outer.dtype)
    return jax.lax.scan(add, zeros, (inner, mapped, outer))[0] / n


def _traced_positions(a: jax.Array, g: jax.Array, diagonal: tuple[bool, bool]) -> tuple[jax.Array, ...]:
    """σ = E Σ_t ‖a_t‖²‖g_t‖², σΦ = E Σ_t ‖g_t‖² a_t a_tᵀ, σΨ = E Σ_t ‖a_t‖² g_t g_tᵀ."""
    trace_in, trace_out = (jnp.sum(v * v, -1, keepdims=True) for v in (a, g))
    n = a.shape[0]
    return (
        jnp.sum(trace_in * trace_out) / n,
        _gram(a * jnp.sqrt(trace_out), diagonal[0]) / n,
        _gram(g * jnp.sqrt(trace_in), diagonal[1]) / n,
    )


def _traced_examples(a: jax.Array, g: jax.Array, diagonal: tuple[bool, bool]) -> tuple[jax.Array, ...]:
    """σ = E‖M‖², σΦ = E[M Mᵀ], σΨ = E[Mᵀ M] with M = Σ_t a_t g_tᵀ."""
    unit_in, unit_out = (jnp.ones(v.shape[-1:], v.dtype) for v in (a, g))
    inputs = _contract(g, a, unit_out, diagonal[0])
    outputs = _contract(a, g, unit_in, diagonal[1])
    return (jnp.sum(inputs) if diagonal[0] else jnp.trace(inputs)), inputs, outputs


class _Sums:
    def __init__(self, layer: Layer, rider: Mapping[str, jax.Array], scale: float):
        self.layer = layer
        self._rider = rider
        self._scale = scale

    def rows(self):
        raise ValueError(f"Layer {self.layer.name!r} uses its parameters more than once and has no rows.")

    def _factors(self):
        return self.layer.additive_factors(self._rider)

    def input_factor(self, diagonal=False):
        factor = self._factors()[0]
        return jnp.diagonal(factor, axis1=-2, axis2=-1) if diagonal else factor

    def output_factor(self, diagonal=False):
        factor = self._factors()[1] * (self._scale**2 / self.layer.examples)
        return jnp.diagonal(factor, axis1=-2, axis2=-1) if diagonal else factor

    def second_moment_in(self, basis_in, basis_out):
        if not self.layer.per_example:
            return None
        gradients = self.example_gradients()
        if basis_in is not None:
            gradients = jnp.einsum("...ac,...nab->...ncb", basis_in, gradients)
        if basis_out is not None:
            gradients = jnp.einsum("...nab,...bc->...nac", gradients, basis_out)
        return jnp.mean(jnp.square(gradients), -3)

    def contract_output(self, v, diagonal=False):
        gradients = self.example_gradients()
        mapped = gradients * v[..., None, None, :] if self._diagonal(v) else gradients @ v[..., None, :, :]
        form = "...nab,...nab->...a" if diagonal else "...nab,...ncb->...ac"
        return jnp.einsum(form, mapped, gradients) / self.layer.examples

    def contract_input(self, u, diagonal=False):
        gradients = self.example_gradients()
        mapped = gradients * u[..., None, :, None] if self._diagonal(u) else u[..., None, :, :] @ gradients
        form = "...nab,...nab->...b" if diagonal else "...nab,...nac->...bc"
        return jnp.einsum(form, gradients, mapped) / self.layer.examples

    def _diagonal(self, factor):
        return factor.ndim == len(self.layer.stack_shape) + 1

    def traced_factors(self, pairing, diagonal):
        if pairing == "position":
            raise ValueError(
                f"Layer {self.layer.name!r} uses its parameters more than once, so the traces of its single positions are not "
                "known: choose tkfac's pairing='example'."
            )
        d_in, d_out = self.layer.sides
        stack = self.layer.stack_shape
        inputs = self.contract_output(jnp.ones((*stack, d_out), self.layer.factor_dtype), diagonal[0])
        outputs = self.contract_input(jnp.ones((*stack, d_in), self.layer.factor_dtype), diagonal[1])
        sigma = outputs.sum(-1) if diagonal[1] else jnp.trace(outputs, axis1=-2, axis2=-1)
        return sigma, inputs, outputs

    def example_gradients(self):
        if not self.layer.per_example:
            raise ValueError(
                f"Layer {self.layer.name!r} is applied to one example at a time (vmap) or to batches of different sizes, so its "
                "per-example gradients are not kept; call the model on the whole batch."
            )
        return self.layer.example_gradients(self._rider) * self._scale
