"""F and K-FAC's F̃ over several layers at once, for networks small enough: what a block-diagonal approximation leaves out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfe_optax.diagnostics.examples import MAX_SIZE, check_size, precise

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@precise
def fisher_matrix(
    taps: Any, names: Sequence[str] | None = None, *, max_size: int = MAX_SIZE
) -> Float[Array, "size size"]:
    """F over several layers, blocks F_ij = (1/N) Σ_n vec(M_i,n) vec(M_j,n)ᵀ (Martens & Grosse 2015, section 2).

    Args:
      taps: what `kfe.value_grad_and_taps` returned.
      names: the layers, in this order; all by default.
      max_size: the largest Σ d_in d_out.

    Returns:
      The matrix, exact columns summed and samples averaged; each layer's vec is row-major.

    Raises:
      KeyError: there is no such layer.
      ValueError: a matrix above `max_size`; a stacked layer, or one that keeps no per-example gradients.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(x @ params["first"] @ params["second"]).sum(-1).mean()
      >>> params, x = {"first": jnp.ones((2, 1)), "second": jnp.ones((1, 1))}, jnp.eye(2)
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> print(kfe.diagnostics.fisher_matrix(taps).round(3))
      [[0.5 0.  0.5]
       [0.  0.5 0.5]
       [0.5 0.5 1. ]]
    """
    return _fisher(taps, _checked(taps, names, max_size))


@functools.partial(jax.jit, static_argnums=1)
def _fisher(taps: Any, names: tuple[str, ...]) -> jax.Array:
    def outer(statistics):
        gradients = [statistics[name].example_gradients() for name in names]
        rows = jnp.concatenate([m.reshape(len(m), -1) for m in gradients], -1)
        return rows.mT @ rows / len(rows)

    return taps.pulled().reduce(outer)


@precise
def kfac_matrix(
    taps: Any, names: Sequence[str] | None = None, *, max_size: int = MAX_SIZE
) -> Float[Array, "size size"]:
    """F̃ over several layers, blocks F̃_ij = E[ā_i ā_jᵀ] ⊗ E[g_i g_jᵀ] (Martens & Grosse 2015, section 3; figures 1 and 2).

    Its blocks on the diagonal are what `kfe.kfac` inverts, those beside it are in `kfe.kfac_tridiagonal`.

    Args:
      taps, names, max_size: as `fisher_matrix`.

    Returns:
      The matrix; expectations are those of one batch.

    Raises:
      KeyError: there is no such layer.
      ValueError: as `fisher_matrix`; a layer with shared positions, or that is used more than once.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(x @ params["first"] @ params["second"]).sum(-1).mean()
      >>> params, x = {"first": jnp.ones((2, 1)), "second": jnp.ones((1, 1))}, jnp.eye(2)
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> found = kfe.diagnostics.kfac_matrix(taps)
      >>> print(kfe.diagnostics.mean_absolute_blocks(found, [2, 1]).round(3))
      [[0.25 0.5 ]
       [0.5  1.  ]]
    """
    names = _checked(taps, names, max_size)
    for name in names:
        layer = taps.layers[name]
        if not layer.has_rows or layer.positions > 1:
            raise ValueError(
                f"Layer {name!r} has several positions an example, and which of them belong to those of another layer is not "
                "known: name the layers that have one."
            )
    return _kfac(taps, names)


@functools.partial(jax.jit, static_argnums=1)
def _kfac(taps: Any, names: tuple[str, ...]) -> jax.Array:
    def products(side: int, statistics: Any) -> list[list[jax.Array]]:
        rows = [statistics[name].rows()[side][:, 0] for name in names]
        return [[x.mT @ y / len(x) for y in rows] for x in rows]

    inputs, outputs = taps.pulled().both(functools.partial(products, 0), functools.partial(products, 1))
    return jnp.block(
        [[jnp.kron(a, g) for a, g in zip(*pair, strict=True)] for pair in zip(inputs, outputs, strict=True)]
    )


def mean_absolute_blocks(matrix: Float[Array, "size size"], sizes: Sequence[int]) -> Float[Array, "n n"]:
    """The mean of |entry| in each block, (n, n): of F̃⁻¹ it is nearly tridiagonal (Martens & Grosse 2015, figures 2 and 3).

    Args:
      matrix: of all layers together.
      sizes: d_in d_out of each.

    Raises:
      ValueError: the sizes are not those of the matrix.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.mean_absolute_blocks(jnp.array([[1.0, -3.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 2.0]]), [2, 1]))
      [[1.5 1. ]
       [0.  2. ]]
    """
    if sum(sizes) != len(matrix):
        raise ValueError(
            f"The sizes {list(sizes)} add up to {sum(sizes)}, and the matrix has {len(matrix)} rows."
        )
    member = jnp.repeat(jnp.arange(len(sizes)), jnp.asarray(sizes), total_repeat_length=len(matrix))
    weights = jax.nn.one_hot(member, len(sizes), dtype=matrix.dtype) / jnp.asarray(sizes, matrix.dtype)
    return weights.mT @ jnp.abs(matrix) @ weights


def _checked(taps: Any, names: Sequence[str] | None, max_size: int) -> tuple[str, ...]:
    chosen = tuple(taps.layers if names is None else names)
    layers = [taps.layers[name] for name in chosen]
    stacked = [layer.name for layer in layers if layer.stack_shape]
    if stacked:
        raise ValueError(f"Layer {stacked[0]!r} is a stack, or has blocks: name layers with one matrix each.")
    size = sum(math.prod(layer.sides) for layer in layers)
    check_size("The matrix of these layers", size, max_size, "Name fewer layers")
    return chosen
