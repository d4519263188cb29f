"""The block-tridiagonal inverse of K-FAC as explicit matrices in NumPy; nothing here imports the library."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import dense


def factors(weights, x, loss):
    """A[i][j] = mean ā_i ā_jᵀ and G[i][j] = Σ_n of the Gauss–Newton blocks of two layers' pre-activations."""
    a, g = _factors(list(weights), x, loss)
    return [[np.asarray(b) for b in row] for row in a], [[np.asarray(b) for b in row] for row in g]


@functools.partial(jax.jit, static_argnums=2)
def _factors(weights, x, loss):
    n = x.shape[0]
    shifts = [jnp.zeros((n, w.shape[1])) for w in weights]
    z, inputs = dense.forward(weights, x, shifts)
    hessian = jax.hessian(lambda flat: loss(flat.reshape(z.shape)))(z.ravel())
    jacobians = jax.jacobian(lambda s: dense.forward(weights, x, s)[0].ravel())(shifts)
    a = [[left.T @ right / n for right in inputs] for left in inputs]
    g = [
        [jnp.einsum("pni,pq,qnj->nij", left, hessian, right).sum(0) for right in jacobians]
        for left in jacobians
    ]
    return a, g


def damped(a, g, damping):
    """Factored damping of the diagonal blocks; the others as they are."""
    a, g = [list(row) for row in a], [list(row) for row in g]
    for i in range(len(a)):
        ratio = dense.pi(a[i][i], g[i][i])
        a[i][i] = a[i][i] + ratio * np.sqrt(damping) * np.eye(len(a[i][i]))
        g[i][i] = g[i][i] + np.sqrt(damping) / ratio * np.eye(len(g[i][i]))
    return a, g


def inverse(a, g):
    """F̂⁻¹ = Ξᵀ Λ Ξ over the row-major vecs of all W̄, from blocks that are damped already."""
    layers = range(len(a))
    places = np.cumsum([0, *(len(a[i][i]) * len(g[i][i]) for i in layers)])
    block = lambda i: slice(places[i], places[i + 1])
    xi, middle = np.eye(places[-1]), np.zeros((places[-1], places[-1]))
    for i in layers:
        own = np.kron(a[i][i], g[i][i])
        if i + 1 < len(a):
            psi_a = a[i][i + 1] @ np.linalg.inv(a[i + 1][i + 1])
            psi_g = g[i][i + 1] @ np.linalg.inv(g[i + 1][i + 1])
            xi[block(i), block(i + 1)] = -np.kron(psi_a, psi_g)
            own = own - np.kron(psi_a @ a[i + 1][i + 1] @ psi_a.T, psi_g @ g[i + 1][i + 1] @ psi_g.T)
        middle[block(i), block(i)] = np.linalg.inv(own)
    return xi.T @ middle @ xi


def whole(a, g):
    """F̃: the matrix of all blocks A_ij⊗G_ij."""
    layers = range(len(a))
    return np.block([[np.kron(a[i][j], g[i][j]) for j in layers] for i in layers])


def flat(matrices):
    return np.concatenate([np.asarray(m).ravel() for m in matrices])


def unflat(vector, like):
    parts = np.split(vector, np.cumsum([np.size(m) for m in like])[:-1])
    return [part.reshape(np.shape(m)) for part, m in zip(parts, like, strict=True)]
