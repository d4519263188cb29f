"""SOAP (Vyas et al. 2024, algorithm 3) for matrices as a plain float64 loop; nothing here imports the library."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def power_step(covariance, basis):
    """(U_new, order): columns sorted by Rayleigh quotient, largest first, then one power step and QR."""
    order = np.argsort(-np.einsum("ik,ij,jk->k", basis, covariance, basis), kind="stable")
    return np.linalg.qr(covariance @ basis[:, order])[0], order


@dataclasses.dataclass
class Matrix:
    """What SOAP remembers of one parameter matrix (d_in, d_out)."""

    left: Any  # L, the average of G Gᵀ
    right: Any  # R, the average of Gᵀ G
    first: Any  # m, in the parameters' own coordinates
    second: Any  # v, in the eigenbasis
    basis: Any = None  # (U_L, U_R)


@dataclasses.dataclass
class Soap:
    """One `update(gradients)` a step: lists of matrices in, the lists of preconditioned matrices (no learning rate) out.

    Step t = 0, 1, …: average L and R, refresh the bases when t % period == 0, project gradient and momentum, Adam, project
    back. With `refresh_after` (the authors' code) the update comes first, in the old basis, and then the averages and the
    refresh; the first gradient only starts L, R and the basis: its update is zero and Adam does not see it.

    What rounding decides: the first gradient is diagonal in its own basis, and Adam divides the rounding errors beside the
    diagonal by eps, so a comparison to 1e-10 needs eps ≥ 1e-4 or so. L or R of a matrix with unequal sides is singular at first
    and its null space has no basis of its own: with "qr", `refresh_after` or a period > 1 that arbitrary choice enters every
    later update, so compare on square matrices (unequal sides only with "eigh" and period 1).

    Attributes:
      b1, b2, eps: Adam's, with bias corrections and eps outside the root.
      beta: decay of L and R.
      debiased: True for weights ρ_k = min(1 − 1/k, beta) at the k-th average, False for a plain average from zero. The bases
        of "eigh" and "qr" are blind to the scale of L and R, so only the relative weights of the gradients differ.
      period: steps between refreshes.
      refresh: "eigh" every time, or "qr": eigh first, then `power_step`.
      second_moment: on a basis change, "keep": v stays with its column and follows the columns' order (SOAP); "rotate":
        v ← (R_L∘R_L) v (R_R∘R_R)ᵀ with R = U_newᵀ U_old.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    beta: float = 0.95
    debiased: bool = True
    period: int = 1
    refresh: str = "eigh"
    second_moment: str = "keep"
    refresh_after: bool = False

    def __post_init__(self):
        if self.refresh not in ("eigh", "qr") or self.second_moment not in ("keep", "rotate"):
            raise ValueError((self.refresh, self.second_moment))
        self.step = 0
        self.count = 0  # of Adam's updates
        self.matrices: list[Matrix] = []

    def update(self, gradients):
        gradients = [np.asarray(g, np.float64) for g in gradients]
        if not self.matrices:
            self.matrices = [
                Matrix(
                    np.zeros((len(g),) * 2), np.zeros((g.shape[1],) * 2), np.zeros_like(g), np.zeros_like(g)
                )
                for g in gradients
            ]
        pairs = list(zip(self.matrices, gradients, strict=True))
        if self.refresh_after and self.step == 0:
            new = [np.zeros_like(g) for g in gradients]
            self._curvature(pairs)
        elif self.refresh_after:
            new = self._adam(pairs)
            self._curvature(pairs)
        else:
            self._curvature(pairs)
            new = self._adam(pairs)
        self.step += 1
        return new

    def _curvature(self, pairs):
        k = self.step + 1
        rho = min(1 - 1 / k, self.beta) if self.debiased else self.beta
        for own, g in pairs:
            own.left = rho * own.left + (1 - rho) * g @ g.T
            own.right = rho * own.right + (1 - rho) * g.T @ g
            if self.step % self.period == 0:
                self._refresh(own)

    def _refresh(self, own):
        if own.basis is None:  # v is still zero
            own.basis = np.linalg.eigh(own.left)[1], np.linalg.eigh(own.right)[1]
            return
        if self.refresh == "qr":
            (u_l, order_l), (u_r, order_r) = (
                power_step(own.left, own.basis[0]),
                power_step(own.right, own.basis[1]),
            )
        else:  # ascending eigenvalues each time
            u_l, u_r = np.linalg.eigh(own.left)[1], np.linalg.eigh(own.right)[1]
            order_l, order_r = np.arange(len(u_l)), np.arange(len(u_r))
        if self.second_moment == "keep":
            own.second = own.second[np.ix_(order_l, order_r)]
        else:  # R contains the order
            own.second = (u_l.T @ own.basis[0]) ** 2 @ own.second @ ((u_r.T @ own.basis[1]) ** 2).T
        own.basis = u_l, u_r

    def _adam(self, pairs):
        self.count += 1
        new = []
        for own, g in pairs:
            u_l, u_r = own.basis
            own.first = self.b1 * own.first + (1 - self.b1) * g
            own.second = self.b2 * own.second + (1 - self.b2) * (u_l.T @ g @ u_r) ** 2
            first = u_l.T @ own.first @ u_r / (1 - self.b1**self.count)
            second = own.second / (1 - self.b2**self.count)
            new.append(u_l @ (first / (np.sqrt(second) + self.eps)) @ u_r.T)
        return new


def soap(sequence, **options):
    """The preconditioned updates for a sequence of lists of gradients."""
    state = Soap(**options)
    return [state.update(gradients) for gradients in sequence]
