"""The two-level correction by its definition: Zᵀ(Z F Zᵀ + λI)⁻¹Z∇ with every matrix in full, over all layers' parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import dense
from .dense_optimizers import Average, due


class Curvature(NamedTuple):
    """Of one batch: A_ij and G_ij of every pair of layers, F over all parameters, the gradient as one vector."""

    a: np.ndarray
    g: np.ndarray
    fisher: np.ndarray
    gradient: np.ndarray


def curvature(weights, x, loss) -> Curvature:
    """A and G as (all inputs) and (all outputs) square matrices, whose blocks are A_ij and G_ij."""
    return Curvature(*map(np.asarray, _curvature(list(weights), x, loss)))


@functools.partial(jax.jit, static_argnums=2)
def _curvature(weights, x, loss):
    n = x.shape[0]
    shifts = [jnp.zeros((n, w.shape[1])) for w in weights]
    z, inputs = dense.forward(weights, x, shifts)
    hessian = jax.hessian(lambda flat: loss(flat.reshape(z.shape)))(z.ravel())
    jacobians = jax.jacobian(lambda s: dense.forward(weights, x, s)[0].ravel())(shifts)
    a = jnp.concatenate(inputs, -1)
    j = jnp.concatenate(jacobians, -1)
    g = jnp.einsum("pni,pq,qnj->ij", j, hessian, j)
    # vec(W̄) of an example: ā⊗(∂z/∂s), layer after layer.
    columns = [
        jnp.einsum("ni,pno->pio", i, o).reshape(len(o), -1) for i, o in zip(inputs, jacobians, strict=True)
    ]
    whole = jnp.concatenate(columns, -1)
    gradient = jax.grad(lambda w: loss(dense.forward(w, x)[0]))(weights)
    flat = jnp.concatenate([v.ravel() for v in gradient])
    return a.T @ a / n, g, whole.T @ hessian @ whole, flat


def _blocks(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def kronecker(a, g, shapes):
    """F̃ with blocks A_ij⊗G_ij."""
    ins, outs = _blocks([s[0] for s in shapes]), _blocks([s[1] for s in shapes])
    rows = [
        np.concatenate([np.kron(a[i, j], g[o, p]) for j, p in zip(ins, outs, strict=True)], 1)
        for i, o in zip(ins, outs, strict=True)
    ]
    return np.concatenate(rows, 0)


def stack(matrices, shapes):
    """Z from {layer index: [matrix, ...]}, in the order of the layers."""
    owners = _blocks([s[0] * s[1] for s in shapes])
    rows = []
    for index, own in enumerate(matrices):
        for matrix in own:
            row = np.zeros(owners[-1].stop)
            row[owners[index]] = matrix.ravel()
            rows.append(row)
    return np.stack(rows)


def split(vector, shapes):
    owners = _blocks([s[0] * s[1] for s in shapes])
    return [vector[own].reshape(shape) for own, shape in zip(owners, shapes, strict=True)]


def groups(shape, count):
    """Ones on `count` consecutive groups of columns, of nearly equal size."""
    count = min(count, shape[1])
    owner = [column * count // shape[1] for column in range(shape[1])]
    return [np.tile([float(o == k) for o in owner], (shape[0], 1)) for k in range(count)]


def leading(a, g, count):
    """u_A u_Gᵀ of the largest products of eigenvalues."""
    (s_a, u_a), (s_g, u_g) = np.linalg.eigh(a), np.linalg.eigh(g)
    pairs = sorted(((s * t, i, j) for i, s in enumerate(s_a) for j, t in enumerate(s_g)), reverse=True)
    return [np.outer(u_a[:, i], u_g[:, j]) for _, i, j in pairs[:count]]


@dataclasses.dataclass
class Coarse:
    """The coarse level, step by step; `number` is that of the groups or of the eigenvectors."""

    space: str
    form: str
    damping: Callable[[int], float]
    number: int = 1
    decay: float = 0.95
    factor_update_period: int = 1
    inverse_update_period: int = 1
    initial_refreshes: int = 1

    def start(self):
        self.own = [Average(self.decay), Average(self.decay)]  # A and G of which the eigenvectors are
        self.restart()

    def restart(self):
        self.averages = [Average(self.decay) for _ in range(2)]

    def correct(self, step, found: Curvature, shapes, fine: list[Any]) -> list[np.ndarray]:
        """The correction of every layer; `fine` are the fine updates."""
        moves = self.space in ("eigenvectors", "residual")
        refresh = due(step, self.inverse_update_period, self.initial_refreshes)
        measure = due(step, self.factor_update_period, self.initial_refreshes) or (moves and refresh)
        if measure:
            self.own[0].add(found.a)
            self.own[1].add(found.g)
        if refresh:
            self.z = stack(self.vectors(step, found, shapes, fine), shapes)
            if moves:
                self.restart()
        if measure:
            new = (found.fisher,) if self.form == "exact" else (found.a, found.g)
            for average, value in zip(self.averages, new, strict=False):
                average.add(value)
        if refresh:
            values = [average.value for average in self.averages]
            fisher = values[0] if self.form == "exact" else kronecker(*values, shapes)
            self.matrix = self.z @ fisher @ self.z.T
        damped = self.matrix + self.damping(step) * np.eye(len(self.matrix))
        return split(self.z.T @ np.linalg.solve(damped, self.z @ found.gradient), shapes)

    def vectors(self, step, found, shapes, fine):
        if self.space in ("constant", "outputs"):
            return [groups(shape, self.number) for shape in shapes]
        if self.space == "eigenvectors":
            ins, outs = _blocks([s[0] for s in shapes]), _blocks([s[1] for s in shapes])
            a, g = (average.value for average in self.own)
            return [leading(a[i, i], g[o, o], self.number) for i, o in zip(ins, outs, strict=True)]
        flat = np.concatenate([v.ravel() for v in fine])
        residual = found.gradient - found.fisher @ flat - self.damping(step) * flat
        return [[part / np.linalg.norm(part)] for part in split(residual, shapes)]
