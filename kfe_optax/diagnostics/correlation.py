"""How correlated the coordinates of the gradient are: in parameter space, or in a Kronecker-factored eigenbasis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from kfe_optax._layers.layer import Layer
from kfe_optax.diagnostics import examples as examples_lib
from kfe_optax.diagnostics.examples import MAX_SIZE, check_size, layer_of, precise

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@precise
def gradient_correlation(
    tap: Any, basis: Any = (None, None), *, indices: Any = None, max_size: int = MAX_SIZE
) -> jax.Array:
    """Correlations of the coordinates of U_Aᵀ M U_G, M a per-example gradient, (*stack, k, k) (George et al. 2018, figure 3).

    A diagonal scale is right where this matrix is the identity: George et al. find it far closer to that in the
    Kronecker-factored eigenbasis than in parameter space. The gradients are those of the taps' targets. Under the
    model's own targets ("sampled", "exact") their mean is zero for every example, and the matrix is
    F_ij / sqrt(F_ii F_jj) in that basis; "empirical" gradients have a mean, which is subtracted.

    Args:
      tap: `taps[name]`.
      basis: (input side, output side), as in `state.basis[name]`: each an `Eigenbasis`, a matrix (*stack, d, d), or None for
        parameter space.
      indices: which k coordinates, as integers into row-major vec (i d_out + j); all d_in d_out by default.
      max_size: the largest k; memory is n k numbers for the coordinates of one draw and a few times k².

    Returns:
      Correlations in [−1, 1], one on the diagonal. A coordinate without variance (a standard deviation below 100 times the
      dtype's precision of the largest: rounding) has zeros in its row and column, the diagonal included.

    Raises:
      ValueError: more than `max_size` coordinates, indices out of range or not integers, a basis of another shape; the
        layer keeps no per-example gradients.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()
      >>> params, x = {"w": {"kernel": jnp.ones((2, 1))}}, jnp.array([[1.0, 1.0], [1.0, 0.0]])
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> correlation = kfe.diagnostics.gradient_correlation(taps["w"])
      >>> print(correlation.round(2))
      [[1.   0.71]
       [0.71 1.  ]]
      >>> vectors = jnp.linalg.eigh(taps["w"].covariances()[0])[1]
      >>> correlation = kfe.diagnostics.gradient_correlation(taps["w"], (vectors, None))
      >>> bool(kfe.diagnostics.mean_absolute_correlation(correlation) < 1e-5)
      True
    """
    layer = layer_of(tap)
    basis = examples_lib.check_basis(layer, basis)
    d = math.prod(layer.sides)
    if indices is not None:
        indices = _check_indices(indices, d)
    size = d if indices is None else indices.shape[0]
    check_size("The correlation matrix", size, max_size, "Choose some of the coordinates with indices")
    return _correlation(tap, basis, indices)


@jax.jit
def _correlation(tap: Any, basis: Any, indices: Any) -> jax.Array:
    layer, pulled = layer_of(tap), tap.taps.pulled()

    def coordinates(statistics):
        return _coordinates(layer, statistics[tap.name], basis, indices)

    mean = None
    if tap.taps.plan.fisher == "empirical":
        mean = pulled.reduce(lambda s: coordinates(s).mean(-2, keepdims=True))

    def moment(statistics):
        found = coordinates(statistics)
        found = found if mean is None else found - mean
        return found.mT @ found / found.shape[-2]

    covariance = pulled.reduce(moment)
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    deviation = jnp.sqrt(jnp.maximum(variance, 0))
    threshold = 100 * jnp.finfo(variance.dtype).eps * deviation.max(-1, keepdims=True)
    alive = deviation > threshold
    inverse = jnp.where(alive, 1 / jnp.where(alive, deviation, 1), 0)
    correlation = covariance * inverse[..., :, None] * inverse[..., None, :]
    return jnp.clip(correlation, -1, 1)


def _coordinates(layer: Layer, statistics: Any, basis: Any, indices: Any) -> jax.Array:
    """The chosen entries of U_Aᵀ M U_G of every example, (*stack, n, k)."""
    u_in, u_out = basis
    if not layer.has_rows:
        gradients = statistics.example_gradients()
        if u_in is not None:
            gradients = jnp.einsum("...ac,...nab->...ncb", u_in, gradients)
        if u_out is not None:
            gradients = jnp.einsum("...nab,...bc->...nac", gradients, u_out)
        flat = gradients.reshape(*gradients.shape[:-2], -1)
        return flat if indices is None else flat[..., indices]
    a, g = statistics.rows()
    a = a if u_in is None else a @ u_in[..., None, :, :]
    g = g if u_out is None else g @ u_out[..., None, :, :]
    if indices is None:
        gradients = jnp.einsum("...nta,...ntb->...nab", a, g)
        return gradients.reshape(*gradients.shape[:-2], -1)
    d_out = layer.sides[1]
    a, g = (jnp.moveaxis(v, -2, 0) for v in (a, g))

    # One position at a time: k coordinates of every position would be t times as much.
    def add(total, rows):
        a, g = rows
        return total + a[..., indices // d_out] * g[..., indices % d_out], None

    zeros = jnp.zeros((*a.shape[1:-1], indices.shape[0]), a.dtype)
    return jax.lax.scan(add, zeros, (a, g))[0]


def mean_absolute_correlation(correlation: Float[Array, "*stacked size size"]) -> Float[Array, "*stacked"]:
    """The mean of |correlation| off the diagonal, (*stack,): 0 when coordinates are uncorrelated, 1 when they move as one.

    Args:
      correlation: (*stack, k, k), as from `gradient_correlation`. Coordinates without variance (a zero on the diagonal) are
        left out.

    Returns:
      The mean; 0 when fewer than two coordinates vary.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.mean_absolute_correlation(jnp.array([[1.0, -0.5], [-0.5, 1.0]])))
      0.5
    """
    alive = jnp.diagonal(correlation, axis1=-2, axis2=-1) > 0
    count = alive.sum(-1)
    different = jnp.expand_dims(~jnp.eye(correlation.shape[-1], dtype=bool), range(correlation.ndim - 2))
    pairs = alive[..., :, None] & alive[..., None, :] & different
    total = jnp.sum(jnp.where(pairs, jnp.abs(correlation), 0), (-2, -1))
    return total / jnp.maximum(count * (count - 1), 1)


def _check_indices(indices: Any, d: int) -> Any:
    if isinstance(indices, core.Tracer):
        integer, ndim = jnp.issubdtype(indices.dtype, jnp.integer), indices.ndim
    else:
        indices = np.asarray(indices)
        integer, ndim = np.issubdtype(indices.dtype, np.integer), indices.ndim
        if integer and indices.size and (indices.min() < 0 or indices.max() >= d):
            raise ValueError(f"indices must lie in 0..{d - 1}, the coordinates of the layer's row-major vec.")
    if not integer or ndim != 1 or not indices.shape[0]:
        raise ValueError(
            "indices must be a list of integers, i d_out + j for the entry (i, j) of the gradient."
        )
    return indices
