"""Independent dense computations in float64 that the library is compared with; nothing here imports it.

A network is a list of (W, b) with tanh between the layers, a loss is a function of the outputs Z (n, C). Curvature is built
from explicit Jacobians, Hessians and Kronecker products.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def relative_error(actual, expected) -> float:
    """‖actual − expected‖ / ‖expected‖, the absolute norm when nothing is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (size or 1))


def assert_close(actual, expected, tolerance: float = 1e-10):
    """Trees agree to a relative tolerance leaf by leaf."""
    jax.tree.map(lambda a, e: np.testing.assert_array_less(relative_error(a, e), tolerance), actual, expected)


def homogeneous(a):
    return jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)


def forward(weights, x, shifts=None):
    """(outputs, [ā of every layer]); weights are W̄ matrices, `shifts` are added to the pre-activations."""
    inputs = []
    for i, w in enumerate(weights):
        inputs.append(homogeneous(x))
        x = inputs[-1] @ w
        if shifts is not None:
            x = x + shifts[i]
        if i + 1 < len(weights):
            x = jnp.tanh(x)
    return x, inputs


def gauss_newton(outputs, loss, parameters):
    """JᵀHJ of loss(outputs(θ)) for a flat parameter vector θ: Jacobian and Hessian in full."""

    @jax.jit
    def compute(parameters):
        z = outputs(parameters)
        jacobian = jax.jacobian(lambda p: outputs(p).ravel())(parameters)
        hessian = jax.hessian(lambda flat: loss(flat.reshape(z.shape)))(z.ravel())
        return jacobian.T @ hessian @ jacobian

    return compute(parameters)


@functools.partial(jax.jit, static_argnums=(2, 3))
def layer_fisher(weights, x, loss, index):
    """The Gauss–Newton block of one layer over its row-major vec(W̄)."""

    def outputs(flat):
        own = [*weights]
        own[index] = flat.reshape(weights[index].shape)
        return forward(own, x)[0]

    return gauss_newton(outputs, loss, weights[index].ravel())


def kfac_factors(weights, x, loss):
    """[(A, G)] of every layer: A = mean āāᵀ, G = Σ_n of the Gauss–Newton blocks of the pre-activations."""
    return [(np.asarray(a), np.asarray(g)) for a, g in _kfac_factors(list(weights), x, loss)]


@functools.partial(jax.jit, static_argnums=2)
def _kfac_factors(weights, x, loss):
    n = x.shape[0]
    shifts = [jnp.zeros((n, w.shape[1])) for w in weights]
    z, inputs = forward(weights, x, shifts)
    hessian = jax.hessian(lambda flat: loss(flat.reshape(z.shape)))(z.ravel())
    jacobians = jax.jacobian(lambda s: forward(weights, x, s)[0].ravel())(shifts)
    pairs = []
    for a, jacobian in zip(inputs, jacobians, strict=True):
        a_factor = a.T @ a / n
        curvature = jnp.einsum("pni,pq,qnj->nij", jacobian, hessian, jacobian)
        pairs.append((a_factor, curvature.sum(0)))
    return pairs


def gradients(weights, x, loss):
    return [np.asarray(g) for g in _gradients(list(weights), x, loss)]


@functools.partial(jax.jit, static_argnums=2)
def _gradients(weights, x, loss):
    return jax.grad(lambda w: loss(forward(w, x)[0]))(weights)


def pi(a, g):
    """sqrt of the ratio of the mean eigenvalues."""
    return np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))


def kfac_factored(a, g, v, damping):
    """(A + π√λ I)⁻¹ V (G + √λ/π I)⁻¹ with explicit inverses."""
    ratio = pi(a, g)
    a = a + ratio * np.sqrt(damping) * np.eye(len(a))
    g = g + np.sqrt(damping) / ratio * np.eye(len(g))
    return np.linalg.inv(a) @ v @ np.linalg.inv(g)


def kfac_exact(a, g, v, damping):
    """(A⊗G + λI)⁻¹ vec(V) with an explicit Kronecker product."""
    matrix = np.kron(a, g) + damping * np.eye(v.size)
    return np.linalg.solve(matrix, v.ravel()).reshape(v.shape)


def kronecker_basis(a, g):
    """The eigenvectors of A⊗G as U_A⊗U_G, and the eigenvalues of both sides."""
    s_a, u_a = np.linalg.eigh(a)
    s_g, u_g = np.linalg.eigh(g)
    return np.kron(u_a, u_g), s_a, s_g


def diagonal_in(fisher, basis):
    """The diagonal of UᵀFU."""
    return np.einsum("pi,pq,qi->i", basis, fisher, basis)


def plain_weights(sizes, seed=0):
    """Random W̄ matrices."""
    generator = np.random.default_rng(seed)
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return [jnp.asarray(generator.normal(size=(d + 1, d_out)) / np.sqrt(d)) for d, d_out in pairs]
