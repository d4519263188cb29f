"""`check_layers`: the law of rows on a user's own model, as a table."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax._jax import static_values
from kfe_optax._layers import table
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._taps.gradients import value_grad_and_taps
from kfe_optax._tracing import adapters


class LayerCheck(NamedTuple):
    """What was found for one layer; errors are relative to the largest entry of the reference.

    Attributes:
      name: the layer.
      gradient_error: Σ_n of the rows (or of the per-example gradients) against the gradient of the loss, without that of a
        penalty; None when nothing can be checked.
      example_error: the worst example's rows against the gradient of the loss of that example alone; None when the loss
        cannot be evaluated on single examples, or the layer keeps no per-example gradients.
      note: why an error is None, or what was left out.
    """

    name: str
    gradient_error: float | None
    example_error: float | None
    note: str

    @property
    def errors(self) -> list[float]:
        """Those that could be computed."""
        return [error for error in (self.gradient_error, self.example_error) if error is not None]


class LayerChecks(tuple[LayerCheck, ...]):
    """The result of `check_layers`: a tuple of `LayerCheck`, printed as a table."""

    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether some error could be computed, and all that could are within the tolerance."""
        errors = [error for check in self for error in check.errors]
        return bool(errors) and all(error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        if not self:
            return "No layers: nothing is checked."

        def show(error):
            return "–" if error is None else f"{error:.1e}"

        def verdict(errors):
            if any(not error <= self.tolerance for error in errors):
                return "WRONG"
            return "ok" if errors else "not checked"

        rows = [
            (
                check.name,
                show(check.gradient_error),
                show(check.example_error),
                verdict(check.errors),
                check.note,
            )
            for check in self
        ]
        header = ("layer", "gradient", "examples", "verdict", "note")
        return table.align(header, rows, right=(1, 2))


def check_layers(
    loss_fn: Callable[..., Any],
    layers: Layers,
    params: Any,
    *args: Any,
    has_aux: bool = False,
    tolerance: float | None = None,
    **kwargs: Any,
) -> LayerChecks:
    """Checks the law of rows on a model: Σ_t ā_{n,t} g_{n,t}ᵀ is the gradient of example n, layer by layer.

    It catches any mistake in how a layer's rows are read (a transposed axis, a wrong batch axis, a layer that computes
    something else than its kind). Two references: the gradient of the loss, which the examples' parts must add up to, and
    the gradient of the loss of each example alone, where every array among the arguments with the batch's leading axis is
    cut to that example. The second needs a loss whose gradient is the mean (or the sum) of its examples' gradients, which batch
    normalization, dropout and normalized advantages are not; it is left out, and said so, for any other. A part of the
    gradient that no other batch changes is a penalty's, and belongs to no example.

    Args:
      loss_fn: as given to `find_layers`.
      layers: what `find_layers` returned.
      params: the parameters, or the `nnx.Module`.
      *args: a small batch of different examples; the first axis of its arrays is the batch. On a batch of one, a layer that does
        not agree is not checked: that may be a penalty's doing.
      has_aux: as in `jax.value_and_grad`.
      tolerance: the largest error that is still called ok; 1e-8 in float64, 1e-3 in float32, 16 units of rounding below.
      **kwargs: as given to `loss_fn`.

    Returns:
      A printable tuple of `LayerCheck`; `.ok` says whether something was checked and all of that is well.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
      >>> model = nn.Dense(3)
      >>> x, labels = jax.random.normal(jax.random.key(0), (4, 5)), jnp.arange(4) % 3
      >>> params = {"dense": model.init(jax.random.key(1), x)["params"]}
      >>> def loss_fn(params, x, labels):
      ...     logits = model.apply({"params": params["dense"]}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> checks = kfe.check_layers(loss_fn, layers, params, x, labels)
      >>> checks.ok
      True
    """
    parameters, (other, *arguments), rebuild, _ = adapters.partition(params, args, kwargs)
    arrays, static = static_values.split_static(arguments)

    def call(parameters, arrays):
        # With copies: a check must not move batch statistics or random streams.
        return rebuild(parameters, (other, *static(arrays)))

    def pure(parameters, arrays):
        made = call(parameters, arrays)
        result = loss_fn(made.params, *made.args, **made.kwargs)
        return result[0] if has_aux else result

    common = [name for name, layer in layers.items() if layer.constant]
    checked = functools.reduce(lambda kept, name: kept.without(glob.escape(name)), common, layers)
    collect = value_grad_and_taps(loss_fn, checked, fisher="empirical", has_aux=has_aux)

    def measured(arrays):
        made = call(parameters, arrays)
        _, grads, taps = collect(made.params, *made.args, **made.kwargs)
        return grads, taps

    # The coarsest number that a layer computes with, whatever its parameters are kept in.
    coarsest = max(
        (float(jnp.finfo(use[3]).eps) for layer in layers.values() for use in layer.uses), default=1.0
    )
    standard = 1e-8 if coarsest < 1e-12 else 1e-3 if coarsest < 1e-6 else 16 * coarsest
    tolerance = standard if tolerance is None else tolerance
    found = {}
    if checked:
        against = _Against(pure, measured, parameters, arrays, tolerance, 16 * coarsest)
        found = {name: against.check(name) for name in checked}
    note = "its input is the same for all examples, which its gradient does not tell apart"
    checks = LayerChecks(found.get(name, LayerCheck(name, None, None, note)) for name in layers)
    checks.tolerance = tolerance
    return checks


class _Against:
    """The references of a batch, and the layers against them."""

    def __init__(self, pure, measured, parameters, arrays, tolerance, rounding):
        self.measured, self.arrays = measured, arrays
        self.tolerance, self.rounding = tolerance, rounding
        self.grads, self.taps = measured(arrays)
        self.layers: Layers = self.taps.layers
        self.examples, self.cut, self.trouble = _batch(self.layers, arrays)
        self.alone = None
        if not self.trouble:
            self.alone, self.trouble = self._alone(pure, parameters)

    def check(self, name: str) -> LayerCheck:
        layer = self.layers[name]
        if not layer.per_example and not layer.has_rows:
            why = "applied to one example at a time" if layer.aligned else layer.why_sums
            return LayerCheck(name, None, None, f"{why}: no per-example gradients")
        gradient, examples = _of_layer(layer, self.grads, self.taps)
        total = examples.mean(0)
        size = max(np.abs(examples).max(), np.abs(gradient).max())
        error, penalty, note = self._error(gradient - total, gradient, size), np.zeros_like(total), ""
        if error > self.tolerance and self.elsewhere is not None:
            other, others = _of_layer(layer, *self.elsewhere)
            change = self._error(gradient - total - (other - others.mean(0)), total, size)
            if change <= self.tolerance:
                # No other batch changes it: a penalty's gradient.
                error, penalty, note = change, gradient - total, "without the gradient of a penalty"
        if error > self.tolerance and self.examples == 1:
            note = "one example does not tell a penalty from a mistake: check it on two or more"
            return LayerCheck(name, None, None, note)
        if not examples.any() and error <= self.tolerance:
            return LayerCheck(
                name, None, None, "no example has a gradient here: check it at other parameters"
            )
        if self.alone is None:
            return LayerCheck(name, error, None, "; ".join(filter(None, (note, self.trouble))))
        reference = np.asarray(jax.vmap(layer.to_matrix)(self.alone), np.float64) - penalty
        return LayerCheck(name, error, self._error(examples - reference, reference, size), note)

    def _error(self, difference: np.ndarray, reference: np.ndarray, size: float) -> float:
        # Where terms of this size cancel, what is left is no larger than their rounding.
        least = self.rounding * size / max(self.tolerance, self.rounding)
        return float(np.abs(difference).max() / max(np.abs(reference).max(), least, 1e-30))

    @functools.cached_property
    def elsewhere(self) -> Any:
        """Gradients and taps of a batch of half of the examples, each twice; None where there is no other batch."""
        n = self.examples
        if n < 2:
            return None
        index = np.arange(n) % ((n + 1) // 2)
        return self.measured([a[index] if c else a for a, c in zip(self.arrays, self.cut, strict=True)])

    def _alone(self, pure: Any, parameters: Any) -> tuple[Any, str]:
        """n times each example's part in the gradient, stacked, from the loss of that example alone; or None and why."""
        n = self.examples

        def one(index):
            mine = [a[index][None] if c else a for a, c in zip(self.arrays, self.cut, strict=True)]
            return jax.grad(pure)(parameters, mine)

        try:
            gradients = jax.lax.map(one, jnp.arange(n))
        except Exception as error:  # the user's loss may need a whole batch, for any reason of its own
            return None, f"the loss does not run on one example ({type(error).__name__})"

        # A tenth of what an example may be off: their mean is closer.
        def equal(alone, whole):
            difference = np.abs(np.mean(alone, 0) - np.asarray(whole)).max()
            return difference <= 0.1 * self.tolerance * max(np.abs(alone).max(), np.abs(whole).max())

        for times in (1, n):
            scaled = jax.tree.map(lambda g, times=times: np.asarray(times * g, np.float64), gradients)
            leaves = zip(jax.tree.leaves(scaled), jax.tree.leaves(self.grads), strict=True)
            if all(equal(alone, np.asarray(whole, np.float64)) for alone, whole in leaves if whole.size):
                return scaled, ""
        return None, "its examples' own gradients do not add up to the loss's (normalization, dropout)"


def _batch(layers: Layers, arrays: list[Any]) -> tuple[int, list[bool], str]:
    """The number of examples, which arrays hold them along their first axis, and what is in the way."""
    sizes = {layer.examples for layer in layers.values() if layer.has_rows or layer.per_example}
    n = max(sizes, default=0)
    cut = [bool(a.ndim) and a.shape[0] == n for a in arrays]
    if len(sizes) > 1:
        return 0, cut, f"the layers' numbers of examples differ ({', '.join(map(str, sorted(sizes)))})"
    return (n, cut, "") if any(cut) else (0, cut, "no argument of the loss has the batch as its first axis")


def _of_layer(layer: Layer, grads: Any, taps: Any) -> tuple[np.ndarray, np.ndarray]:
    """The gradient (*stack, d_in, d_out), and n times each example's part, (n, *stack, d_in, d_out)."""
    examples = np.asarray(taps[layer.name].example_gradients(), np.float64)
    return np.asarray(layer.to_matrix(grads), np.float64), np.moveaxis(examples, len(layer.stack_shape), 0)
