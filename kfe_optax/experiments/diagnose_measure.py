"""One measurement of ``diagnose``: the errors of every method on one layer's F, in one compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfe_optax as kfe
from kfe_optax.diagnostics import eigenbasis_error, kronecker_error, spectrum_error
from kfe_optax.experiments.batches import Batch
from kfe_optax.experiments.diagnose_plan import Plan
from kfe_optax.experiments.diagnose_rows import GivenRows
from kfe_optax.experiments.task import Params, State, Task
from kfe_optax.factors import Term

Basis = tuple[jax.Array, jax.Array]  # eigenvectors of both sides, as columns
Terms = tuple[Term, ...]
Values = dict[str, dict[str, jax.Array]]  # {quantity: {method: scalar}}


class Stale(NamedTuple):
    """What an amortized optimizer keeps between refreshes."""

    terms: Terms  # K-FAC's factors of the last refresh
    basis: Basis  # and their eigenbasis
    scale: jax.Array  # running average of S*, in that basis


class Window(NamedTuple):
    """The last batches' rows, F = Σ_k weights_k F_k."""

    a: jax.Array  # (window, n, t, d_in)
    g: jax.Array  # (window, n, t, d_out)
    weights: jax.Array  # (window,)


class MeasureState(NamedTuple):
    """What a measurement hands to the next one."""

    fresh: dict[str, Any]  # estimators of one batch: only where their iterations start
    averaged: dict[str, Any]
    best: Any
    stale: Stale
    window: Window
    count: jax.Array


class Measurement(NamedTuple):
    """The numbers of one step, and the correlation matrices in parameter space and in the KFE."""

    values: Values
    correlations: dict[str, jax.Array]  # "parameters" and "kfe"


Measure = Callable[..., tuple[MeasureState, Measurement]]


def fresh_estimators(plan: Plan) -> dict[str, Any]:
    """The factorizations of one batch: no average over batches, iterations that converge."""
    power = _power_limits(plan)
    return {
        "kfac": kfe.factors.kfac(0.0),
        "tkfac": kfe.factors.tkfac(0.0),
        "kpsvd": kfe.factors.kpsvd(0.0, **power),
        "deflation": kfe.factors.deflation(0.0, **power),
        "lanczos": kfe.factors.lanczos(0.0, **_lanczos_limits(plan)),
        "kfac_corrected": kfe.factors.kfac_corrected(0.0, **power),
    }


def _power_limits(plan: Plan) -> dict[str, Any]:
    return {"tolerance": plan.tolerance, "max_iterations": plan.max_iterations}


def _lanczos_limits(plan: Plan) -> dict[str, Any]:
    subspace = 8
    restarts = max(1, plan.max_iterations // subspace)
    return {"tolerance": plan.tolerance, "subspace": subspace, "max_restarts": restarts}


def averaged_estimators(plan: Plan) -> dict[str, Any]:
    """The papers' averages of factors, and the factors that track the average of F."""
    decay, lanczos = plan.decay, _lanczos_limits(plan)
    return {
        "kfac": kfe.factors.kfac(decay),
        "tkfac": kfe.factors.tkfac(decay),
        "kpsvd": kfe.factors.kpsvd(decay, **_power_limits(plan)),
        "lanczos": kfe.factors.lanczos(decay, **lanczos),
        "streaming_rank_1": kfe.factors.streaming(1, decay, **lanczos),
        "streaming_rank_2": kfe.factors.streaming(2, decay, **lanczos),
    }


def make_measure(
    plan: Plan,
    task: Task,
    layers: kfe.Layers,
    params: Params,
    batch: Batch,
    model_state: State | None = None,
) -> tuple[Measure, MeasureState]:
    """The measuring function, to be compiled, and its first state.

    ``measure(state, params, batch, key, refresh, model_state)`` looks at ``batch`` (the examples that
    make up F) with targets drawn by ``key``: every method sees the same draw. ``refresh`` says whether
    the amortized methods take new factors and a new basis now; it is true at the first call.

    Example::

        measure, state = make_measure(plan, task, layers, params, batch)
        state, found = jax.jit(measure)(state, params, batch, key, jnp.array(True))
        found.values["error"]["kfac"]
    """
    layer = layers[plan.layer]
    given = GivenRows(*layer.sides, layer.factor_dtype)
    fresh, averaged = fresh_estimators(plan), averaged_estimators(plan)
    best = kfe.factors.lanczos(0.0, **_lanczos_limits(plan))
    differentiate = kfe.value_grad_and_taps(task.loss_fn, layers, has_aux=task.has_state)
    coordinates = _coordinates(layer.sides, plan.coordinates)

    def measure(state, params, batch, key, refresh, model_state=None):
        with jax.default_matmul_precision("highest"):
            loss, _, taps = differentiate(params, batch, model_state, key, key=key)
            loss = loss[0] if task.has_state else loss
            a, g = taps[plan.layer].rows()
            # The same rows as a network of one layer, which is passed at no cost.
            tap = given.tap(a, g)
            seen = _Seen(tap, kfe.diagnostics.fisher_norm(tap), kfe.diagnostics.fisher_spectrum(tap), plan)
            fresh_states, terms, iterations = _estimates(given, fresh, state.fresh, tap)
            basis, values = _of_the_batch(seen, terms)
            stale, found = _between_refreshes(seen, state, refresh, terms["kfac"], basis)
            values |= found

            few = a[: plan.running_examples], g[: plan.running_examples]
            averaged_states, averages, _ = _estimates(given, averaged, state.averaged, given.tap(*few))
            window = _extended(state.window, *few, _weight_of_past(state.count, plan.decay, a.dtype))
            whole = given.tap(*_rows_of(window))
            best_state, both = given.update(best, state.best, whole)
            averages |= {"best_rank_1": both[:1], "best_rank_2": both}
            values["running_error"] = _errors(whole, averages, kfe.diagnostics.fisher_norm(whole))

            # From the network's own taps: gradients of sampled targets have no mean to subtract.
            correlations = {
                name: kfe.diagnostics.gradient_correlation(taps[plan.layer], where, indices=coordinates)
                for name, where in (("parameters", (None, None)), ("kfe", basis))
            }
            values["correlation"] = jax.tree.map(kfe.diagnostics.mean_absolute_correlation, correlations)
            values["iterations"] = iterations
            values["loss"] = {plan.optimizer: loss * task.loss_scale}
        new = MeasureState(fresh_states, averaged_states, best_state, stale, window, state.count + 1)
        return new, Measurement(values, correlations)

    key = jax.random.key(0)
    rows = jax.eval_shape(
        lambda p, b, s: differentiate(p, b, s, key, key=key)[2][plan.layer].rows(), params, batch, model_state
    )
    window = Window(
        *(jnp.zeros((plan.window, plan.running_examples, *v.shape[1:]), v.dtype) for v in rows),
        jnp.zeros(plan.window, rows[0].dtype),
    )
    terms = _zero_terms(given, fresh["kfac"])
    return measure, MeasureState(
        {name: given.start(factors) for name, factors in fresh.items()},
        {name: given.start(factors) for name, factors in averaged.items()},
        given.start(best),
        Stale(terms, _basis(terms), jnp.zeros(layer.sides, rows[0].dtype)),
        window,
        jnp.zeros((), jnp.int32),
    )


class _Seen(NamedTuple):
    """F of the step: its tap, norm and spectrum."""

    tap: Any
    norm: jax.Array
    spectrum: jax.Array
    plan: Plan


def _of_the_batch(seen: _Seen, terms: dict[str, Terms]) -> tuple[Basis, Values]:
    """The errors of this batch's own estimates, of EKFAC and of TEKFAC; and K-FAC's eigenbasis."""
    bases = {"ekfac": _basis(terms["kfac"]), "tekfac": _basis(terms["tkfac"])}
    scales = {name: _scale(seen.tap, basis) for name, basis in bases.items()}
    errors = _errors(seen.tap, terms, seen.norm) | {
        name: eigenbasis_error(seen.tap, bases[name], scales[name], norm=seen.norm) for name in bases
    }
    return bases["ekfac"], {"error": errors, "spectrum_error": _spectrum_errors(seen, terms, scales)}


def _between_refreshes(
    seen: _Seen, state: MeasureState, refresh: jax.Array, terms: Terms, basis: Basis
) -> tuple[Stale, Values]:
    """The errors of amortized methods, after the refresh where it is time for one."""
    old = state.stale
    # On a refresh the running scale is carried into the new basis: (R_A∘R_A) S (R_G∘R_G)ᵀ with R = U_newᵀ U_old.
    turned_in, turned_out = (jnp.square(new.T @ before) for new, before in zip(basis, old.basis, strict=True))
    carried = turned_in @ old.scale @ turned_out.T
    stale = jax.tree.map(lambda new, kept: jnp.where(refresh, new, kept), Stale(terms, basis, carried), old)
    current = _scale(seen.tap, stale.basis)
    # The memory of a scale that is updated in every step, as the optimizers' is.
    rho = _weight_of_past(state.count, seen.plan.decay**seen.plan.every, current.dtype)
    stale = stale._replace(scale=rho * stale.scale + (1 - rho) * current)
    scales, factors = {"ekfac": current, "ekfac_running": stale.scale}, {"kfac": stale.terms}
    errors = _errors(seen.tap, factors, seen.norm) | {
        name: eigenbasis_error(seen.tap, stale.basis, scale, norm=seen.norm) for name, scale in scales.items()
    }
    return stale, {"stale_error": errors, "stale_spectrum_error": _spectrum_errors(seen, factors, scales)}


def _errors(tap: Any, terms: dict[str, Terms], norm: jax.Array) -> dict[str, jax.Array]:
    return {name: kronecker_error(tap, found, norm=norm) for name, found in terms.items()}


def _zero_terms(given: GivenRows, factors: Any) -> Terms:
    return factors.terms(given.start(factors), given.layers)[given.layer.name]


def _estimates(
    given: GivenRows, estimators: dict[str, Any], states: dict[str, Any], tap: Any
) -> tuple[dict[str, Any], dict[str, Terms], dict[str, jax.Array]]:
    """New states, Kronecker terms, and the iterations of those that iterate."""
    found = {name: given.update(factors, states[name], tap) for name, factors in estimators.items()}
    return (
        {name: state for name, (state, _) in found.items()},
        {name: terms for name, (_, terms) in found.items()},
        {
            name: state.iterations[given.layer.name]
            for name, (state, _) in found.items()
            if hasattr(state, "iterations")
        },
    )


def _basis(terms: Terms) -> Basis:
    """The eigenbasis of the leading term."""
    return jnp.linalg.eigh(terms[0].input)[1], jnp.linalg.eigh(terms[0].output)[1]


def _scale(tap: Any, basis: Basis) -> jax.Array:
    """S*, the best diagonal in a basis."""
    return tap.second_moment_in(*basis)


def _spectrum_errors(
    seen: _Seen, terms: dict[str, Terms], scales: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Spectrum errors of Kronecker terms and of diagonals; NaN where a sum of terms is too large."""
    spectra = {name: kfe.diagnostics.eigenbasis_spectrum(scale) for name, scale in scales.items()}
    size = seen.spectrum.size
    errors = {}
    for name, found in terms.items():
        if len(found) > 1 and size > seen.plan.spectrum_limit:
            errors[name] = jnp.full((), jnp.nan)
        else:
            spectra[name] = kfe.diagnostics.kronecker_spectrum(found, max_size=size)
    return errors | {name: spectrum_error(seen.spectrum, found) for name, found in spectra.items()}


def _weight_of_past(count: jax.Array, decay: float, dtype: Any) -> jax.Array:
    """ρ = min(1 − 1/k, decay), as the factors' averages have it."""
    return jnp.minimum(1 - 1 / (count + 1).astype(dtype), decay)


def _extended(window: Window, a: jax.Array, g: jax.Array, rho: jax.Array) -> Window:
    """One more batch in the place of the lightest, its weight 1 − ρ, that of the others times ρ."""
    place = jnp.argmin(window.weights)
    return Window(
        window.a.at[place].set(a),
        window.g.at[place].set(g),
        (rho * window.weights).at[place].set(1 - rho),
    )


def _rows_of(window: Window) -> tuple[jax.Array, jax.Array]:
    """ā and g whose plain mean F is the weighted mean of the window's, its weights made to sum to one."""
    weights = window.weights / window.weights.sum()
    roots = jnp.sqrt(weights * weights.shape[0])
    g = window.g * roots[:, None, None, None]
    return window.a.reshape(-1, *window.a.shape[2:]), g.reshape(-1, *g.shape[2:])


def _coordinates(sides: tuple[int, int], count: int) -> np.ndarray:
    """About ``count`` entries of the gradient: evenly spaced rows times evenly spaced columns, the last of each included.

    In the eigenbasis, whose eigenvalues ascend, these reach from the weakest to the strongest direction.
    """
    count = min(count, sides[0] * sides[1])
    rows = min(sides[0], max(round(count**0.5), -(-count // sides[1])))
    columns = min(sides[1], max(1, count // rows))
    chosen = [
        np.unique(np.linspace(d - 1, 0, k).round().astype(int))
        for d, k in zip(sides, (rows, columns), strict=True)
    ]
    return (chosen[0][:, None] * sides[1] + chosen[1]).ravel()
