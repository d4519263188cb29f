"""K-FAC and EKFAC as dense float64 loops, written from the papers; nothing here imports the library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from . import dense


def due(step: int, period: int, first: int, per_doubling: int = 0) -> bool:
    if per_doubling:
        power = 1
        while 2 * power * per_doubling <= step:
            power *= 2
        period = min(period, max(power, period // 5))
    return step % period == 0 or step < first


@dataclasses.dataclass
class Average:
    """The paper's running average: ρ = min(1 − 1/k, decay) at the k-th update."""

    decay: float
    value: Any = 0.0
    updates: int = 0

    def add(self, new):
        self.updates += 1
        rho = min(1 - 1 / self.updates, self.decay)
        self.value = rho * self.value + (1 - rho) * new


@dataclasses.dataclass
class Kfac:
    damping: Callable[[int], float]
    damping_type: str = "factored"
    decay: float = 0.95
    factor_update_period: int = 1
    inverse_update_period: int = 1
    initial_refreshes: int = 1
    refreshes_per_doubling: int = 0

    def start(self, layers: int):
        self.a = [Average(self.decay) for _ in range(layers)]
        self.g = [Average(self.decay) for _ in range(layers)]
        self.frozen: list[Any] = [None] * layers

    def precondition(self, step, weights, x, loss):
        early = self.initial_refreshes, self.refreshes_per_doubling
        if due(step, self.factor_update_period, *early):
            for i, (a, g) in enumerate(dense.kfac_factors(weights, x, loss)):
                self.a[i].add(a)
                self.g[i].add(g)
        if due(step, self.inverse_update_period, *early):
            self.frozen = [
                (a.value, g.value, self.damping(step)) for a, g in zip(self.a, self.g, strict=True)
            ]
        new = []
        for v, (a, g, damping) in zip(dense.gradients(weights, x, loss), self.frozen, strict=True):
            if self.damping_type == "factored":
                new.append(dense.kfac_factored(a, g, v, damping))
            else:  # the current damping acts at once
                new.append(dense.kfac_exact(a, g, v, self.damping(step)))
        return new


@dataclasses.dataclass
class Ekfac:
    damping: Callable[[int], float]
    scale: str = "batch"
    damping_type: str = "plain"
    on_refresh: str = "carry"
    decay: float = 0.95
    scale_decay: float = 0.95
    factor_update_period: int = 1
    basis_update_period: int = 1
    scale_update_period: int = 1
    initial_refreshes: int = 1
    weight: float = 1.0  # N, for the running scale

    def start(self, layers: int):
        self.a = [Average(self.decay) for _ in range(layers)]
        self.g = [Average(self.decay) for _ in range(layers)]
        self.basis: list[Any] = [None] * layers
        self.diagonal: list[Any] = [None] * layers

    def precondition(self, step, weights, x, loss):
        if due(step, self.factor_update_period, self.initial_refreshes):
            for i, (a, g) in enumerate(dense.kfac_factors(weights, x, loss)):
                self.a[i].add(a)
                self.g[i].add(g)
        if due(step, self.basis_update_period, self.initial_refreshes):
            for i in range(len(weights)):
                self._refresh(i)
        new = []
        for i, v in enumerate(dense.gradients(weights, x, loss)):
            basis, s_a, s_g = self.basis[i]
            rotated = basis.T @ v.ravel()
            if step % self.scale_update_period == 0:
                self._measure(i, step, rotated, weights, x, loss)
            denominator = self.diagonal[i] + self.damping(step)
            if self.damping_type in ("factored", "appendix_c"):
                root, ratio = np.sqrt(self.damping(step)), dense.pi(np.diag(s_a), np.diag(s_g))
                ratio = ratio if self.damping_type == "factored" else 1.0
                denominator = denominator + np.add.outer(root / ratio * s_a, root * ratio * s_g).ravel()
            new.append((basis @ (rotated / denominator)).reshape(v.shape))
        return new

    def _refresh(self, i):
        basis = dense.kronecker_basis(self.a[i].value, self.g[i].value)
        if self.basis[i] is None or self.on_refresh == "restart":
            self.diagonal[i] = np.kron(basis[1], basis[2])
        else:
            self.diagonal[i] = (basis[0].T @ self.basis[i][0]) ** 2 @ self.diagonal[i]
        self.basis[i] = basis

    def _measure(self, i, step, rotated, weights, x, loss):
        if self.scale == "batch":
            fisher = np.asarray(dense.layer_fisher(list(weights), x, loss, i))
            new = dense.diagonal_in(fisher, self.basis[i][0])
            rho = self.scale_decay if step else 0.0
        else:
            new, rho = self.weight * rotated**2, self.scale_decay
        self.diagonal[i] = rho * self.diagonal[i] + (1 - rho) * new


def kl_factor(new, gradients, learning_rate, max_kl):
    size = learning_rate**2 * sum(np.abs(np.sum(d * g)) for d, g in zip(new, gradients, strict=True))
    return min(1.0, np.sqrt(max_kl / size))
