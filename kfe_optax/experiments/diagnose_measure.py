"""One measurement of ``diagnose``: what ``kfe.diagnostics`` says of every method on one layer's F, in one function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfe_optax as kfe
from kfe_optax import diagnostics
from kfe_optax.experiments.task import Task

Terms = tuple[kfe.factors.Term, ...]
Values = dict[str, dict[str, jax.Array]]  # {quantity: {method: number}}
# Streaming factors are Lanczos's on a single batch.
_METHODS = {
    name: make for name, make in kfe.factors.FACTORS.items() if make().needs_taps and name != "streaming"
}
# Of iterations.
_LIMITS = {"decay": 0.0, "tolerance": 1e-5, "max_iterations": 500, "subspace": 8, "max_restarts": 60}
_SPECTRUM_LIMIT = 1500  # rows of a sum of terms, which is decomposed as a dense matrix
_COORDINATES = 36
_EIGENBASES = {"ekfac": "kfac", "tekfac": "tkfac"}  # best diagonals, and from whose factors their bases are


def make_measure(
    task: Task, layers: kfe.Layers, name: str, **options: Any
) -> Callable[..., tuple[Values, dict[str, jax.Array], Terms]]:
    """``measure(params, batch, model_state, key, old, refresh)`` for the layer ``name``, to be compiled.

    It returns the numbers, the correlation matrices in parameter space and in the eigenbasis, and K-FAC's terms of the
    last refresh: those of this batch where ``refresh`` is set, or else ``old``. All methods see the same draw of the
    targets; ``options`` are those of ``kfe.value_grad_and_taps``.

    Example::

        measure = jax.jit(make_measure(task, layers, "dense_5", fisher="empirical"))
        values, _, old = measure(params, batch, {}, key, old, True)
        values["error"]["kpsvd"]
    """
    differentiate = kfe.value_grad_and_taps(task.loss_fn, layers, has_aux=task.has_state, **options)
    estimators = {
        method: make(**{key: _LIMITS[key] for key in inspect.signature(make).parameters if key in _LIMITS})
        for method, make in _METHODS.items()
    }
    d_in, d_out = layers[name].sides
    # In the eigenbasis, whose eigenvalues ascend, these reach from the weakest to the strongest direction.
    indices = np.unique(np.linspace(0, d_in * d_out - 1, _COORDINATES).astype(int))

    def measure(params, batch, model_state, key, old, refresh):
        with jax.default_matmul_precision("highest"):
            loss, _, taps = differentiate(params, batch, model_state, key, key=key)
            tap = taps[name]
            terms = {
                method: kfe.factors.estimate(factors, taps, [name], max_dim=max(d_in, d_out))[name]
                for method, factors in estimators.items()
            }
            kept = jax.tree.map(lambda new, before: jnp.where(refresh, new, before), terms["kfac"], old)
            bases = {method: _basis(terms[factors]) for method, factors in _EIGENBASES.items()}
            error, spectrum_error = _errors(tap, terms, bases)
            stale_error, _ = _errors(tap, {"kfac": kept}, {"ekfac": _basis(kept)})
            # Under sampled targets they have no mean to subtract.
            correlations = {
                space: diagnostics.gradient_correlation(tap, basis, indices=indices)
                for space, basis in (("parameters", (None, None)), ("kfe", bases["ekfac"]))
            }
        values = {
            "error": error,
            "spectrum_error": spectrum_error,
            "stale_error": stale_error,
            "correlation": jax.tree.map(diagnostics.mean_absolute_correlation, correlations),
            "loss": {"loss": (loss[0] if task.has_state else loss) * task.loss_scale},
        }
        return values, correlations, kept

    return measure


def _errors(
    tap: Any, terms: dict[str, Terms], bases: dict[str, Any]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Errors and spectrum errors of Kronecker terms, and of the best diagonals in bases."""
    norm, spectrum = diagnostics.fisher_norm(tap), diagnostics.fisher_spectrum(tap)
    errors = {method: diagnostics.kronecker_error(tap, found, norm=norm) for method, found in terms.items()}
    spectra = {
        method: diagnostics.kronecker_spectrum(found, max_size=spectrum.size)
        for method, found in terms.items()
        if len(found) == 1 or spectrum.size <= _SPECTRUM_LIMIT
    }
    for method, basis in bases.items():
        scale = tap.second_moment_in(*basis)
        errors[method] = diagnostics.eigenbasis_error(tap, basis, scale, norm=norm)
        spectra[method] = diagnostics.eigenbasis_spectrum(scale)
    return errors, {method: diagnostics.spectrum_error(spectrum, found) for method, found in spectra.items()}


def _basis(terms: Terms) -> tuple[jax.Array, jax.Array]:
    """The eigenbasis of the leading term."""
    return jnp.linalg.eigh(terms[0].input)[1], jnp.linalg.eigh(terms[0].output)[1]
