"""`check_layers`: the law of rows on a user's own model, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfe_optax import adapters, static_values, table
from kfe_optax.gradients import value_grad_and_taps
from kfe_optax.layer import Layer
from kfe_optax.layers import Layers


class LayerCheck(NamedTuple):
    """What was found for one layer; errors are relative to the largest entry of the reference.

    Attributes:
      name: the layer.
      gradient_error: Σ_n of the rows (or of the per-example gradients) against the gradient of the loss.
      example_error: the worst example's rows against the gradient of the loss of that example alone; None when the loss
        cannot be evaluated on single examples, or the layer keeps no per-example gradients.
      note: why an error is None, or what fails.
    """

    name: str
    gradient_error: float | None
    example_error: float | None
    note: str


class LayerChecks(tuple[LayerCheck, ...]):
    """The result of `check_layers`: a tuple of `LayerCheck`, printed as a table."""

    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error that could be computed is within the tolerance."""
        errors = [e for check in self for e in (check.gradient_error, check.example_error) if e is not None]
        return all(error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        def show(error):
            return "–" if error is None else f"{error:.1e}"

        rows = []
        for check in self:
            errors = [e for e in (check.gradient_error, check.example_error) if e is not None]
            verdict = (
                "WRONG" if any(not e <= self.tolerance for e in errors) else "ok" if errors else "not checked"
            )
            rows.append(
                (check.name, show(check.gradient_error), show(check.example_error), verdict, check.note)
            )
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
    the gradient of the loss of each example alone, n times, where every array among `args` with the batch's leading axis is
    cut to that example. The second needs a loss that is the mean of its examples' losses, which batch normalization and
    dropout are not; it is left out, and said so, for any other.

    Args:
      loss_fn: as given to `find_layers`.
      layers: what `find_layers` returned.
      params: the parameters, or the `nnx.Module`.
      *args: a small batch; the first axis of its arrays is the batch.
      has_aux: as in `jax.value_and_grad`.
      tolerance: the largest error that is still called ok; 1e-8 in float64, 1e-3 in float32, 16 units of rounding below.
      **kwargs: as given to `loss_fn`.

    Returns:
      A printable tuple of `LayerCheck`; `.ok` says whether all is well.

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
    parameters, (other, args, kwargs), rebuild, _ = adapters.partition(params, args, kwargs)

    def pure(parameters, *args):
        # On copies: a check must not move batch statistics or random streams.
        call = rebuild(parameters, (other, args, kwargs), {})
        result = loss_fn(call.params, *call.args, **call.kwargs)
        return result[0] if has_aux else result

    call = rebuild(parameters, (other, args, kwargs), {})
    collect = value_grad_and_taps(loss_fn, layers, fisher="empirical", has_aux=has_aux)
    value, grads, taps = collect(call.params, *call.args, **call.kwargs)
    alone, trouble = _alone(pure, parameters, args, taps.layers, value[0] if has_aux else value)
    checks = LayerChecks(_check(layer, taps, grads, alone, trouble) for layer in taps.layers.values())
    # The coarsest number that a layer computes with, whatever its parameters are kept in.
    coarsest = max(float(jnp.finfo(use[3]).eps) for layer in layers.values() for use in layer.uses)
    standard = 1e-8 if coarsest < 1e-12 else 1e-3 if coarsest < 1e-6 else 16 * coarsest
    checks.tolerance = standard if tolerance is None else tolerance
    return checks


def _check(layer: Layer, taps: Any, grads: Any, alone: Any, trouble: str) -> LayerCheck:
    if not layer.per_example and not layer.has_rows:
        return LayerCheck(
            layer.name, None, None, "applied to one example at a time: no per-example gradients"
        )
    examples = np.asarray(taps[layer.name].example_gradients(), np.float64)
    axis = len(layer.stack_shape)
    gradient = np.asarray(layer.to_matrix(grads), np.float64)
    total = _error(examples.mean(axis), gradient)
    if alone is None:
        return LayerCheck(layer.name, total, None, trouble)
    reference = np.asarray(jax.vmap(layer.to_matrix)(alone), np.float64)
    return LayerCheck(layer.name, total, _error(np.moveaxis(examples, axis, 0), reference), "")


def _error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(found - reference).max() / max(np.abs(reference).max(), 1e-30))


def _alone(pure: Any, parameters: Any, args: Any, layers: Layers, value: Any) -> tuple[Any, str]:
    """Gradients of the loss of each example alone, stacked; or None and why."""
    batches = {layer.examples for layer in layers.values() if layer.has_rows}
    arrays, static = static_values.split_static(args)
    n = max(batches, default=0)
    if len(batches) != 1 or not any(a.ndim and a.shape[0] == n for a in arrays):
        return None, "no argument of the loss has the batch as its first axis"
    cut = [bool(a.ndim) and a.shape[0] == n for a in arrays]

    def one(index):
        mine = [a[index][None] if c else a for a, c in zip(arrays, cut, strict=True)]
        return jax.value_and_grad(pure)(parameters, *static(mine))

    try:
        values, gradients = jax.lax.map(one, jnp.arange(n))
    except Exception as error:  # the user's loss may need a whole batch, for any reason of its own
        return None, f"the loss does not run on one example ({type(error).__name__})"
    if not np.allclose(values.mean(), value, rtol=1e-3, atol=1e-6):
        # Batch statistics, dropout or a sum: no reference for a single example.
        return None, "the loss is not the mean of its examples' losses"
    return gradients, ""
