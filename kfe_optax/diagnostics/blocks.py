"""A layer's exact Fisher block and its approximations as dense matrices, for layers small enough."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.layer import Layer
from kfe_optax._layers.paths import key_path
from kfe_optax._linalg import kronecker
from kfe_optax._tracing import adapters
from kfe_optax.diagnostics import examples as examples_lib
from kfe_optax.diagnostics.examples import BUDGET, MAX_SIZE, check_size, layer_of, precise

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@precise
def fisher_block(
    tap: Any, *, max_size: int = MAX_SIZE, chunk_size: int | None = None
) -> Float[Array, "*stacked size size"]:
    """F = (1/N) Σ_n vec(M_n) vec(M_n)ᵀ, (*stack, d, d) with d = d_in d_out, over row-major vec.

    Exact columns are summed, samples averaged, one draw after another; M_n = Σ_t ā_{n,t} g_{n,t}ᵀ.

    Args:
      tap: `taps[name]`.
      max_size: the largest d; the block takes d² numbers, and as many again while draws are added up.
      chunk_size: how many examples' gradients (d numbers each, times the stack) are in memory at once; by default 64 MiB
        of float32.

    Returns:
      The block; inside `pmap` the mean over devices.

    Raises:
      ValueError: d is above `max_size`; `chunk_size` is not positive; the layer keeps no per-example gradients.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()
      >>> params, x = {"w": {"kernel": jnp.ones((2, 1))}}, jnp.array([[1.0, 1.0], [1.0, -2.0]])
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> print(kfe.diagnostics.fisher_block(taps["w"]).round(3))
      [[ 1.  -0.5]
       [-0.5  2.5]]
    """
    layer = layer_of(tap)
    d = math.prod(layer.sides)
    check_size(
        f"The block of layer {layer.name!r}",
        d,
        max_size,
        "Use the matrix-free fisher_norm and kronecker_error",
    )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size counts examples and must be positive, not {chunk_size}.")
    return _fisher_block(tap, chunk_size or max(1, BUDGET // (d * math.prod(layer.stack_shape))))


@functools.partial(jax.jit, static_argnums=1)
def _fisher_block(tap: Any, chunk: int) -> jax.Array:
    layer = layer_of(tap)
    return tap.taps.pulled().reduce(lambda s: _block(layer, s[tap.name], chunk))


def _block(layer: Layer, statistics: Any, chunk: int) -> jax.Array:
    if not layer.has_rows:
        return _outer(statistics.example_gradients()) / layer.examples
    a, g = statistics.rows()
    stacked = len(layer.stack_shape)
    n = a.shape[stacked]
    if n <= chunk:
        return _outer(jnp.einsum("...nta,...ntb->...nab", a, g)) / n
    count = -(-n // chunk)

    def cut(v):
        v = jnp.pad(v, [(0, count * chunk - n if axis == stacked else 0) for axis in range(v.ndim)])
        return jnp.moveaxis(v.reshape(*v.shape[:stacked], count, chunk, *v.shape[stacked + 1 :]), stacked, 0)

    def add(total, rows):
        return total + _outer(jnp.einsum("...nta,...ntb->...nab", *rows)), None

    d = math.prod(layer.sides)
    zeros = jnp.zeros((*layer.stack_shape, d, d), a.dtype)
    return jax.lax.scan(add, zeros, (cut(a), cut(g)))[0] / n


def _outer(gradients: jax.Array) -> jax.Array:
    flat = gradients.reshape(*gradients.shape[:-2], -1)
    return flat.mT @ flat


@precise
def gauss_newton_block(
    outputs_fn: Callable[[Any], jax.Array],
    loss_fn: Callable[[jax.Array], jax.Array],
    params: Any,
    layer: Layer,
    *,
    max_size: int = MAX_SIZE,
    chunk_size: int = 64,
) -> jax.Array:
    """JᵀHJ, (*stack, d, d) with d = d_in d_out: a layer's Gauss–Newton block by plain differentiation, without taps.

    J is the Jacobian of the model's outputs z with respect to the layer's W̄, H the Hessian of the loss with respect to z. For
    the losses of `kfe.losses` this is the exact Fisher block. Nothing is assumed of the layer: weights that are used many
    times, and layers that keep no per-example gradients, have their exact block too. One column costs a forward-mode
    and a reverse-mode pass.

    Args:
      outputs_fn: params → z of any shape, over the batch of interest.
      loss_fn: z → the scalar loss, such as `lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()`.
      params: the parameters, or the `nnx.Module`.
      layer: `layers[name]`.
      max_size: the largest d.
      chunk_size: how many columns are computed at once; each holds the tangents of the whole model.

    Returns:
      The block in the layer's factor dtype.

    Raises:
      ValueError: d is above `max_size`; the parameters lack the layer's; the loss is not a scalar.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> x = jnp.array([[1.0, 1.0], [1.0, -2.0]])
      >>> def outputs_fn(params):
      ...     return kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])
      >>> def loss_fn(params):
      ...     return kfe.losses.l2_loss(outputs_fn(params)).sum(-1).mean()
      >>> params = {"w": {"kernel": jnp.ones((2, 1))}}
      >>> layers = kfe.find_layers(loss_fn, params)
      >>> plain_loss = lambda z: optax.losses.l2_loss(z).sum(-1).mean()
      >>> print(kfe.diagnostics.gauss_newton_block(outputs_fn, plain_loss, params, layers["w"]))
      [[ 1.  -0.5]
       [-0.5  2.5]]
    """
    d = math.prod(layer.sides)
    check_size(
        f"The block of layer {layer.name!r}",
        d,
        max_size,
        "Use the matrix-free fisher_norm and kronecker_error",
    )
    parameters, given, rebuild, _ = adapters.partition(params)

    def outputs(matrix):
        own = layer.from_matrix(matrix)
        leaves, structure = jax.tree_util.tree_flatten_with_path(parameters)
        new = [own[key_path(p)].astype(v.dtype) if key_path(p) in own else v for p, v in leaves]
        return outputs_fn(rebuild(jax.tree.unflatten(structure, new), given).params)

    z, push = jax.linearize(outputs, layer.to_matrix(parameters).astype(layer.factor_dtype))
    if jnp.shape(jax.eval_shape(loss_fn, z)) != ():
        raise ValueError("loss_fn must map the outputs to a scalar, as in training; take its mean.")
    _, curve = jax.linearize(jax.grad(loss_fn), z)
    pull = jax.linear_transpose(push, jax.ShapeDtypeStruct(layer.shape, layer.factor_dtype))
    stack = math.prod(layer.stack_shape)

    def column(index):
        # One column of the block of one stacked layer.
        unit = jnp.zeros((stack, d), layer.factor_dtype).at[index // d, index % d].set(1)
        (product,) = pull(curve(push(unit.reshape(layer.shape))))
        return product.reshape(stack, d)[index // d]

    columns = jax.lax.map(column, jnp.arange(stack * d), batch_size=min(chunk_size, stack * d))
    return columns.reshape(*layer.stack_shape, d, d)


@precise
def kronecker_matrix(
    terms: Any, *, stacked: int = 0, max_size: int = MAX_SIZE
) -> Float[Array, "*stacked size size"]:
    """A⊗B + C⊗D + ... as a dense matrix (*stack, d_in d_out, d_in d_out).

    Args:
      terms: ((A, B), (C, D), ...); each side a matrix (*stack, d, d) or a diagonal (*stack, d).
      stacked: the number of stacked axes, which shapes alone do not tell.
      max_size: the largest d_in d_out.

    Returns:
      The matrix.

    Raises:
      ValueError: terms that are not pairs, or a matrix above `max_size`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.kronecker_matrix(((jnp.array([1.0, 2.0]), jnp.ones((1, 1))),)))
      [[1. 0.]
       [0. 2.]]
    """
    pairs = examples_lib.check_pairs(terms)
    d_in, d_out = (side.shape[-1] for side in pairs[0])
    check_size("The matrix", d_in * d_out, max_size, "Use the matrix-free kronecker_error")

    def dense(side):
        if side.ndim != stacked + 1:
            return side
        identity = jnp.eye(side.shape[-1], dtype=side.dtype)
        return side[..., None] * jnp.expand_dims(identity, range(stacked))

    total = sum(jnp.einsum("...ab,...cd->...acbd", dense(a), dense(b)) for a, b in pairs)
    return jnp.asarray(total).reshape(*pairs[0][0].shape[:stacked], d_in * d_out, d_in * d_out)


@precise
def eigenbasis_matrix(
    basis: Any, scale: Float[Array, "*stack d_in d_out"], *, max_size: int = MAX_SIZE
) -> Float[Array, "*stacked size size"]:
    """(U_A⊗U_G) diag(vec S) (U_A⊗U_G)ᵀ as a dense matrix (*stack, d_in d_out, d_in d_out).

    Args:
      basis: (input side, output side), each an `Eigenbasis`, a matrix (*stack, d, d), or None for the identity.
      scale: S (*stack, d_in, d_out).
      max_size: the largest d_in d_out.

    Returns:
      The matrix.

    Raises:
      ValueError: a matrix above `max_size`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.eigenbasis_matrix((None, None), jnp.array([[1.0, 2.0]])))
      [[1. 0.]
       [0. 2.]]
    """
    d_in, d_out = scale.shape[-2:]
    check_size("The matrix", d_in * d_out, max_size, "Use the matrix-free eigenbasis_error")
    stacked = scale.ndim - 2
    units = jnp.eye(d_in * d_out, dtype=scale.dtype).reshape(*(1,) * stacked, -1, d_in, d_out)
    left, right = (None if v is None else v[..., None, :, :] for v in map(examples_lib.vectors, basis))
    # Column by column, F̂ of a unit matrix: rotate, scale, rotate back.
    rotated = kronecker.right(kronecker.left(left, units, stacked + 1, transpose=True), right, stacked + 1)
    scaled = rotated * scale[..., None, :, :]
    columns = kronecker.right(kronecker.left(left, scaled, stacked + 1), right, stacked + 1, transpose=True)
    return columns.reshape(*scale.shape[:-2], d_in * d_out, d_in * d_out)
