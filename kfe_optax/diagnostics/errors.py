"""Norms of a layer's Fisher block and errors of its approximations, without the block."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfe_optax._linalg import kronecker
from kfe_optax.diagnostics import examples as examples_lib
from kfe_optax.diagnostics.examples import layer_of, precise

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@precise
def fisher_trace(tap: Any) -> Float[Array, "*stacked"]:
    """tr F = E‖M‖², (*stack,).

    Args:
      tap: `taps[name]`.

    Returns:
      The trace, averaged over devices inside `pmap`.

    Raises:
      ValueError: the layer keeps no per-example gradients (it is applied to one example at a time).

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()
      >>> params, x = {"w": {"kernel": jnp.ones((2, 2))}}, jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> print(f"{kfe.diagnostics.fisher_trace(taps['w']):.1f}")   # F = diag(1/2, 2) ⊗ I
      5.0
    """
    return _trace(tap)


@jax.jit
def _trace(tap: Any) -> jax.Array:
    layer = layer_of(tap)
    ones = jnp.ones((*layer.stack_shape, layer.sides[1]), layer.factor_dtype)
    return tap.taps.pulled().reduce(lambda s: s[tap.name].contract_output(ones, diagonal=True)).sum(-1)


@precise
def fisher_norm(tap: Any, *, chunk_size: int | None = None) -> Float[Array, "*stacked"]:
    """‖F‖_F, (*stack,), from the inner products of the per-example gradients: n²‖F‖² = Σ_nm ⟨M_n, M_m⟩².

    With one position an example ⟨M_n, M_m⟩ = (ā_n·ā_m)(g_n·g_m), which costs n²(d_in + d_out). With t shared positions it is
    the sum over t² of these products, or the product of the gradients where that is cheaper. Draws count as further
    examples.

    Args:
      tap: `taps[name]`.
      chunk_size: how many examples are multiplied with as many others at once. By default as many as keep the
        intermediate results (chunk² draws² t² numbers, or chunk draws d_in d_out) within 64 MiB of float32. The rows
        (ā, g) of all draws are kept whole besides, n t (d_in + draws d_out) numbers.

    Returns:
      The norm; inside `pmap` that of the mean over devices, from the gathered rows.

    Raises:
      ValueError: the layer keeps no per-example gradients; `chunk_size` is not positive.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()
      >>> params, x = {"w": {"kernel": jnp.ones((2, 2))}}, jnp.array([[3**0.5, 0.0], [0.0, 2.0]])
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> print(f"{kfe.diagnostics.fisher_norm(taps['w']) ** 2:.2f}")   # F = diag(3/2, 2) ⊗ I
      12.50
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size counts examples and must be positive, not {chunk_size}.")
    return _norm(tap, chunk_size)


@functools.partial(jax.jit, static_argnums=1)
def _norm(tap: Any, chunk_size: int | None) -> jax.Array:
    examples = examples_lib.collect(tap)
    chunk = min(chunk_size or examples_lib.chunk_of(examples), examples.g.shape[2])

    def one(layer):
        a, g = layer
        # Fourth powers of small gradients would leave the range of float32: take out the units first.
        unit_a, unit_g = (1.0 if v is None else jnp.max(jnp.abs(v)) for v in (a, g))
        unit_a, unit_g = (jnp.where(unit == 0, 1.0, unit) for unit in (unit_a, unit_g))
        total = examples_lib.squared_gram(None if a is None else a / unit_a, g / unit_g, chunk)
        return jnp.square(unit_a) * (jnp.square(unit_g) * (examples.weight * jnp.sqrt(total)))

    # One stacked layer after another, so that memory is that of one.
    norms = jax.lax.map(one, (examples.a, examples.g))
    return norms.reshape(layer_of(tap).stack_shape)


@precise
def kronecker_error(
    tap: Any, terms: Any, *, norm: Float[Array, "*stacked"] | None = None
) -> Float[Array, "*stacked"]:
    """‖F − F̂‖_F / ‖F‖_F for F̂ = A⊗B + C⊗D + ..., without F or F̂ (Koroko et al. 2022, section 4.1).

    ‖F − F̂‖² = ‖F‖² − 2 Σ_k ⟨A_k, MAT(Z(F) vec B_k)⟩ + Σ_kl ⟨A_k, A_l⟩⟨B_k, B_l⟩. Large numbers add up to a small one: in float32
    an error e is known to about 5e-7/e, and one below about 1e-3 may come out as zero (1e-8 in float64). `relative_error`
    of the dense block resolves smaller ones.

    Args:
      tap: `taps[name]`.
      terms: ((A, B), ...), A (*stack, d_in, d_in) and B (*stack, d_out, d_out), or diagonals; see `kfe.diagnostics`.
      norm: ‖F‖_F if it is known already, as when many approximations are judged on one batch; `fisher_norm(tap)` otherwise.

    Returns:
      The relative error, (*stack,). When F is zero: 0 if F̂ is, else inf.

    Raises:
      ValueError: factors of other shapes; the layer keeps no per-example gradients.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()
      >>> params, x = {"w": {"kernel": jnp.ones((3, 2))}}, jnp.eye(3)
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> a, g = taps["w"].covariances()                             # F is A⊗G for a linear model
      >>> print(f"{kfe.diagnostics.kronecker_error(taps['w'], ((a, g / 2),)):.3f}")
      0.500
    """
    terms = examples_lib.check_terms(layer_of(tap), terms)
    return _kronecker_error(tap, terms, fisher_norm(tap) if norm is None else norm)


@jax.jit
def _kronecker_error(tap: Any, terms: Any, norm: jax.Array) -> jax.Array:
    layer = layer_of(tap)
    stacked = len(layer.stack_shape)
    safe = jnp.where(norm > 0, norm, 1)
    # B of unit size, and A⊗B in units of ‖F‖: no product leaves the range of float32.
    scaled = []
    for a, b in terms:
        unit = jnp.max(jnp.abs(b), tuple(range(stacked, b.ndim)))
        unit = jnp.where(unit == 0, 1, unit)
        scaled.append((_times(a, unit / safe), _times(b, 1 / unit)))

    def products(statistics):
        contract = statistics[tap.name].contract_output
        return sum(_inner(a, contract(b, kronecker.is_diagonal(a, stacked)), stacked) for a, b in scaled)

    cross = tap.taps.pulled().reduce(products) / safe
    size = sum(_inner(a, c, stacked) * _inner(b, d, stacked) for a, b in scaled for c, d in scaled)
    return _relative(norm, size - 2 * cross)


@precise
def eigenbasis_error(
    tap: Any,
    basis: Any,
    scale: Float[Array, "*stack d_in d_out"],
    *,
    norm: Float[Array, "*stacked"] | None = None,
) -> Float[Array, "*stacked"]:
    """‖F − F̂‖_F / ‖F‖_F for F̂ = (U_A⊗U_G) diag(vec S) (U_A⊗U_G)ᵀ, as EKFAC has it (George et al. 2018).

    ‖F − F̂‖² = ‖F‖² − ‖S*‖² + ‖S* − S‖² with S* = E[(U_Aᵀ M U_G)²], the diagonal that minimizes it. Its resolution is that of
    `kronecker_error`.

    Args:
      tap: `taps[name]`.
      basis: (input side, output side), as in `state.basis[name]`; each an `Eigenbasis`, an orthogonal matrix (*stack, d, d), or
        None for the identity.
      scale: S (*stack, d_in, d_out), as in `state.scale[name]`; s_A s_Gᵀ for K-FAC in its eigenbasis.
      norm: as in `kronecker_error`.

    Returns:
      The relative error, (*stack,). When F is zero: 0 if F̂ is, else inf.

    Raises:
      ValueError: a basis or scale of another shape; the layer keeps no per-example gradients.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["w"]["kernel"], params["w"])).sum(-1).mean()
      >>> params, x = {"w": {"kernel": jnp.ones((3, 2))}}, jnp.eye(3)
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)
      >>> scale = taps["w"].second_moment_in(None, None)             # F is diagonal here
      >>> print(f"{kfe.diagnostics.eigenbasis_error(taps['w'], (None, None), 0.9 * scale):.3f}")
      0.100
    """
    layer = layer_of(tap)
    basis = examples_lib.check_basis(layer, basis)
    if scale.shape != layer.shape:
        raise ValueError(f"The scale of layer {layer.name!r} has shape {layer.shape}, not {scale.shape}.")
    return _eigenbasis_error(tap, basis, scale, fisher_norm(tap) if norm is None else norm)


@jax.jit
def _eigenbasis_error(tap: Any, basis: Any, scale: jax.Array, norm: jax.Array) -> jax.Array:
    best = tap.second_moment_in(*basis)
    if best is None:
        raise ValueError(
            f"Layer {tap.name!r} is applied to one example at a time and keeps no per-example gradients; call the model on the "
            "whole batch."
        )
    safe = jnp.where(norm > 0, norm, 1)[..., None, None]
    best, rest = best / safe, (best - scale) / safe
    # Nothing but ‖F‖² and ‖S*‖² cancels.
    return _relative(norm, jnp.sum(rest * rest, (-2, -1)) - jnp.sum(best * best, (-2, -1)))


@precise
def relative_error(
    block: Float[Array, "*stacked size size"], approximation: Float[Array, "*stacked size size"]
) -> Float[Array, "*stacked"]:
    """‖F − F̂‖_F / ‖F‖_F of dense matrices (*stack, d, d), to the precision of their dtype.

    Args:
      block: F, as from `fisher_block` or `gauss_newton_block`.
      approximation: F̂, as from `kronecker_matrix` or `eigenbasis_matrix`.

    Returns:
      The relative error, (*stack,). When F is zero: 0 if F̂ is, else inf.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> print(kfe.diagnostics.relative_error(jnp.eye(4), 0.75 * jnp.eye(4)))
      0.25
    """
    if block.shape != approximation.shape:
        raise ValueError(
            f"The matrices have shapes {block.shape} and {approximation.shape}; give two of one shape."
        )
    return _quotient(*(jnp.linalg.norm(v, axis=(-2, -1)) for v in (block, block - approximation)))


def _relative(norm: jax.Array, excess: jax.Array) -> jax.Array:
    """‖F − F̂‖/‖F‖ from (‖F − F̂‖² − ‖F‖²)/‖F‖², undivided where F is zero; rounding below zero is zero."""
    one = jnp.where(norm > 0, 1, norm)
    square = one + excess
    # maximum would turn a NaN of the inputs into zero on some devices.
    return _quotient(one, jnp.sqrt(jnp.where(square < 0, 0, square)))


def _quotient(norm: jax.Array, error: jax.Array) -> jax.Array:
    nothing = jnp.where(error == 0, 0, jnp.inf)
    return jnp.where(norm == 0, nothing, error / jnp.where(norm == 0, 1, norm))


def _times(factor: jax.Array, amount: jax.Array) -> jax.Array:
    """factor (*stack, ...) times amount (*stack,)."""
    return factor * amount.reshape(amount.shape + (1,) * (factor.ndim - amount.ndim))


def _inner(a: jax.Array, b: jax.Array, stacked: int) -> jax.Array:
    """⟨A, B⟩, (*stack,), of matrices or diagonals."""
    a_diagonal, b_diagonal = (kronecker.is_diagonal(v, stacked) for v in (a, b))
    if a_diagonal != b_diagonal:
        a, b = (
            v if d else jnp.diagonal(v, axis1=-2, axis2=-1) for v, d in ((a, a_diagonal), (b, b_diagonal))
        )
        a_diagonal = True
    # In two stages, see `examples.squared_gram`.
    rows = jnp.sum(a * b, -1)
    return rows if a_diagonal else jnp.sum(rows, -1)
