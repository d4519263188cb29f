"""Spectra of a layer's Fisher block and of its approximations, and condition numbers."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._linalg import damping as damping_lib
from kfe_optax._linalg import kronecker
from kfe_optax.diagnostics import blocks
from kfe_optax.diagnostics import examples as examples_lib
from kfe_optax.diagnostics.examples import MAX_SIZE, check_size, layer_of, precise

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@precise
def fisher_spectrum(tap: Any, *, max_size: int = MAX_SIZE) -> Float[Array, "*stacked size"]:
    """The eigenvalues of F, ascending, (*stack, d_in d_out).

    They come from the block or, where that is smaller, from the Gram matrix ⟨M, M'⟩/N of all draws' per-example gradients,
    which has the same eigenvalues but for zeros: a large layer is no obstacle on a small batch.

    Args:
      tap: `taps[name]`.
      max_size: the largest number of rows of the smaller of the two.

    Returns:
      The spectrum; rounding may leave eigenvalues a little below zero.

    Raises:
      ValueError: both matrices are above `max_size`; the layer keeps no per-example gradients.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()
      >>> params, x = {"w": {"kernel": jnp.ones((3, 1))}}, jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> print(kfe.diagnostics.fisher_spectrum(taps["w"]).round(3))
      [0.  0.5 2. ]
    """
    layer, plan = layer_of(tap), tap.taps.plan
    d = math.prod(layer.sides)
    devices = 1 if plan.axis_name is None else jax.lax.axis_size(plan.axis_name)
    gradients = layer.examples * plan.draws * devices
    if d <= gradients:
        return _eigenvalues(blocks.fisher_block(tap, max_size=max_size))
    check_size(
        f"The Gram matrix of layer {layer.name!r}", gradients, max_size, "Take a smaller batch or fewer draws"
    )
    return _gram_spectrum(tap)


@jax.jit
def _gram_spectrum(tap: Any) -> jax.Array:
    layer = layer_of(tap)
    examples = examples_lib.collect(tap)
    chunk = examples_lib.chunk_of(examples)
    grams = jax.lax.map(lambda v: examples_lib.whole_gram(*v, chunk), (examples.a, examples.g))
    values = _eigenvalues(grams * examples.weight)
    padding = jnp.zeros((values.shape[0], math.prod(layer.sides) - values.shape[1]), values.dtype)
    return jnp.sort(jnp.concatenate([padding, values], 1)).reshape(*layer.stack_shape, -1)


@precise
def kronecker_spectrum(
    terms: Any, *, stacked: int = 0, max_size: int = MAX_SIZE
) -> Float[Array, "*stacked size"]:
    """The eigenvalues of A⊗B + C⊗D + ..., ascending, (*stack, d_in d_out).

    One term has the products of its factors' eigenvalues, at the cost of two small eigendecompositions; a sum of terms has
    no such rule, and its dense matrix is decomposed.

    Args:
      terms: ((A, B), ...), symmetric; each side a matrix (*stack, d, d) or a diagonal (*stack, d).
      stacked: the number of stacked axes.
      max_size: the largest d_in d_out of a sum of terms.

    Returns:
      The spectrum.

    Raises:
      ValueError: terms that are not pairs, or a sum of terms above `max_size`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.kronecker_spectrum(((jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])),)))
      [1. 2. 3. 6.]
    """
    pairs = examples_lib.check_pairs(terms)
    if len(pairs) > 1:
        return _eigenvalues(blocks.kronecker_matrix(pairs, stacked=stacked, max_size=max_size))
    values = [_side_eigenvalues(side, stacked) for side in pairs[0]]
    return eigenbasis_spectrum(kronecker.outer(*values))


def eigenbasis_spectrum(scale: Float[Array, "*stack d_in d_out"]) -> Float[Array, "*stack size"]:
    """The eigenvalues of (U_A⊗U_G) diag(vec S) (U_A⊗U_G)ᵀ, ascending: S (*stack, d_in, d_out) sorted, (*stack, d_in d_out).

    Args:
      scale: S.

    Returns:
      The spectrum.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.eigenbasis_spectrum(jnp.array([[3.0, 1.0], [2.0, 4.0]])))
      [1. 2. 3. 4.]
    """
    return jnp.sort(scale.reshape(*scale.shape[:-2], -1))


@precise
def squared_gradient_scale(
    tap: Any, gradient: Float[Array, "*stack d_in d_out"], basis: Any
) -> Float[Array, "*stack d_in d_out"]:
    """N (U_Aᵀ ∇̄ U_G)² of one batch, (*stack, d_in, d_out), whose average over batches is the scale of EKFAC-ra.

    Its spectrum is not that of F: it holds the squared mean of the gradient, N times (George et al. 2018, figure 5 c).

    Args:
      tap: `taps[name]`, for N, the weight of the loss's elements (see `taps.gradient_weight`).
      gradient: `layer.to_matrix(grads)`, the mean gradient of the batch.
      basis: as in `eigenbasis_error`.

    Raises:
      ValueError: a gradient or a basis of another shape.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(x @ params["w"]).sum(-1).mean()
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.eye(2)
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)
      >>> print(kfe.diagnostics.squared_gradient_scale(taps["w"], grads["w"], (None, None)))
      [[0.5]
       [0.5]]
    """
    layer = layer_of(tap)
    if gradient.shape != layer.shape:
        raise ValueError(f"Layer {layer.name!r} has gradients of shape {layer.shape}, not {gradient.shape}.")
    left, right = examples_lib.check_basis(layer, basis)
    stacked = len(layer.stack_shape)
    rotated = kronecker.right(kronecker.left(left, gradient, stacked, transpose=True), right, stacked)
    weight = tap.taps.gradient_weight
    return jnp.square(rotated) * (tap.taps.examples_of(layer.name) if weight is None else weight)


def spectrum_error(
    spectrum: Float[Array, "*stacked size"], approximation: Float[Array, "*stacked size"]
) -> Float[Array, "*stacked"]:
    """‖spec F − spec F̂‖₂ / ‖spec F‖₂, (*stack,), each spectrum sorted (Koroko et al. 2022, section 4.1).

    By the Hoffman–Wielandt inequality it is at most the relative Frobenius error of F̂.

    Args:
      spectrum: spec F, (*stack, d), as from `fisher_spectrum`; in any order.
      approximation: spec F̂, (*stack, d), as from `kronecker_spectrum` or `eigenbasis_spectrum`.

    Returns:
      The relative error. When spec F is zero: 0 if spec F̂ is, else inf.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.spectrum_error(jnp.array([3.0, 4.0]), jnp.array([4.0, 4.0])))
      0.2
    """
    if spectrum.shape != approximation.shape:
        raise ValueError(
            f"The spectra have shapes {spectrum.shape} and {approximation.shape}; give all eigenvalues of both."
        )
    found, other = jnp.sort(spectrum), jnp.sort(approximation)
    size, error = (jnp.linalg.norm(v, axis=-1) for v in (found, found - other))
    nothing = jnp.where(error == 0, 0, jnp.inf)
    return jnp.where(size == 0, nothing, error / jnp.where(size == 0, 1, size))


def condition_number(spectrum: Float[Array, "*stacked size"], damping: Any = 0.0) -> Float[Array, "*stacked"]:
    """max |s + λ| / min |s + λ|, (*stack,): how far F̂ + λI is from a multiple of the identity; inf when it is singular.

    Args:
      spectrum: eigenvalues s of any of these matrices, (*stack, d), in any order.
      damping: λ, a scalar or (*stack,).

    Returns:
      The condition number. Above the inverse of the dtype's precision (about 1e7 in float32) it is rounding.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.condition_number(jnp.array([0.0, 1.0, 3.0]), damping=1.0))
      4.0
    """
    damping = jnp.asarray(damping, spectrum.dtype)[..., None]
    damped = jnp.abs(spectrum + jnp.expand_dims(damping, range(spectrum.ndim - damping.ndim)))
    smallest = damped.min(-1)
    return jnp.where(smallest == 0, jnp.inf, damped.max(-1) / jnp.where(smallest == 0, 1, smallest))


class ConditionNumbers(NamedTuple):
    """Condition numbers (*stack,) of a Kronecker product.

    Attributes:
      input: of A, undamped.
      output: of B, undamped.
      damped: of the damped product that is inverted.
    """

    input: jax.Array
    output: jax.Array
    damped: jax.Array


@precise
def condition_numbers(
    terms: Any,
    damping: Any = 0.0,
    *,
    damping_type: Literal["exact", "factored"] = "exact",
    stacked: int = 0,
) -> ConditionNumbers:
    """Condition numbers of A, of B, and of the damped A⊗B, from the eigenvalues of the factors.

    "exact": A⊗B + λI has max(s_A s_Bᵀ + λ)/min(s_A s_Bᵀ + λ). "factored": (A + π√λ I)⊗(B + √λ/π I) has the product of its
    factors' numbers, π = sqrt[(tr A/d_in)/(tr B/d_out)] (Martens & Grosse 2015, section 6.3).

    Args:
      terms: ((A, B),), each side a matrix (*stack, d, d) or a diagonal (*stack, d).
      damping: λ, a scalar or (*stack,).
      damping_type: which damped product, as in `kfe.scale_by_kfac`.
      stacked: the number of stacked axes.

    Returns:
      `ConditionNumbers`; inf where a matrix is singular. Above the inverse of the dtype's precision they are rounding.

    Raises:
      ValueError: more than one term, whose sum has no such rule; an unknown `damping_type`.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> terms = ((jnp.diag(jnp.array([1.0, 2.0])), jnp.diag(jnp.array([1.0, 4.0]))),)
      >>> print(*kfe.diagnostics.condition_numbers(terms, damping=1.0))
      2.0 4.0 4.5
    """
    pairs = examples_lib.check_pairs(terms)
    if len(pairs) > 1:
        raise ValueError(
            "The condition number of a sum of Kronecker products does not follow from its factors: use "
            "condition_number(kronecker_spectrum(terms), damping) for a small layer."
        )
    if damping_type not in ("exact", "factored"):
        raise ValueError(f"damping_type must be 'exact' or 'factored', not {damping_type!r}.")
    a, b = pairs[0]
    values = [_side_eigenvalues(side, stacked) for side in (a, b)]
    damping = jnp.asarray(damping, values[0].dtype)
    if damping_type == "exact":
        products = kronecker.outer(*values)
        damped = condition_number(products.reshape(*products.shape[:-2], -1), damping)
    else:
        # Eigenvalues as diagonals: the damping only shifts them.
        added = damping_lib.factored(values[0], values[1], damping, stacked)
        shifted = [own + amount[..., None] for own, amount in zip(values, added, strict=True)]
        damped = condition_number(shifted[0]) * condition_number(shifted[1])
    return ConditionNumbers(condition_number(values[0]), condition_number(values[1]), damped)


def _side_eigenvalues(side: jax.Array, stacked: int) -> jax.Array:
    return side if kronecker.is_diagonal(side, stacked) else _eigenvalues(side)


@jax.jit
def _eigenvalues(matrices: jax.Array) -> jax.Array:
    """Eigenvalues of symmetric (*stack, d, d), ascending; not clipped, so that an indefinite sum shows."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    values = kronecker.one_at_a_time_on_cpu(
        functools.partial(jnp.linalg.eigvalsh, symmetrize_input=True), flat
    )
    return values.reshape(matrices.shape[:-1])
