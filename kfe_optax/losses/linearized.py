"""A loss whose gradient is a rule of its own, as the program of that rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def linearized(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """The same loss and gradient, with a `jax.custom_jvp` around or inside the loss expanded, so that its layers are seen.

    With w₀ the parameters w behind a `stop_gradient`, and J(w₀; v) the tangent of the loss L along v,

        L(w₀) + J(w₀; w − w₀),

    has the value of L, since w = w₀, and J(w₀; ·) as its derivative, which is what the rule says. Each layer is used where the
    rule computes its tangent, a (W − W₀) with the input a of the primal pass. So register the outputs of which the rule takes the
    tangent where that tangent is: `kfe.register_output(tangent, kfe.Gaussian())`, whose Fisher matrix no value enters.

    The energy of variational Monte Carlo, E[E_L], has the gradient 2 E[(E_L − E[E_L]) ∂ log|ψ|], which is not that of the mean
    over walkers. A rule that says so, as in FermiNet, makes log|ψ| a Gaussian output with weights 1/n: F = E[∂ log|ψ| ∂ log|ψ|ᵀ].
    Where the rule's tangent is not finite, neither is the value. The tangent is one more forward pass of what it depends on;
    `examples/helium.py` does without it, with a surrogate for the loss.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> loss`, or `(loss, aux)` with `has_aux`; the parameters are any tree of
        floating-point arrays.
      has_aux: as in `jax.value_and_grad`.

    Returns:
      A function of the same arguments.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> def log_psi(params, x):
      ...     return jnp.tanh(x @ params["w"]).sum(-1)
      >>> @jax.custom_jvp
      ... def energy(params, x):
      ...     return (log_psi(params, x) ** 2).mean()
      >>> @energy.defjvp
      ... def _(primals, tangents):
      ...     (params, x), energies = primals, log_psi(*primals) ** 2
      ...     tangent = jax.jvp(lambda params: log_psi(params, x), (params,), tangents[:1])[1]
      ...     tangent = kfe.register_output(tangent, kfe.Gaussian())
      ...     return energies.mean(), 2 * ((energies - energies.mean()) * tangent).mean()
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
      >>> list(kfe.find_layers(energy, params, x)), list(kfe.find_layers(kfe.losses.linearized(energy), params, x))
      ([], ['w'])
    """

    @functools.wraps(loss_fn)
    def linear(params: Any, *args: Any, **kwargs: Any) -> Any:
        base = jax.lax.stop_gradient(params)
        direction = jax.tree.map(lambda w, w0: w - w0, params, base)

        def of_params(params):
            return loss_fn(params, *args, **kwargs)

        value, tangent, *aux = jax.jvp(of_params, (base,), (direction,), has_aux=has_aux)
        loss = jax.lax.stop_gradient(value) + tangent
        return (loss, *aux) if has_aux else loss

    return linear
