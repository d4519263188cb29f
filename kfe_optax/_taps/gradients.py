"""`value_grad_and_taps`: the loss, its gradient and the taps, from one forward pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax._jax import checks, static_values, varying_axes
from kfe_optax._layers.layers import Layers, require_layers, same_layers
from kfe_optax._marks.loss_tags import FAINT, Place
from kfe_optax._taps import accumulation
from kfe_optax._taps import microbatches as microbatches_lib
from kfe_optax._taps.forward import Forward
from kfe_optax._taps.microbatches import BatchArguments
from kfe_optax._taps.plan import Fisher, Given, Plan
from kfe_optax._taps.taps import Taps
from kfe_optax._tracing import adapters, discovery
from kfe_optax._tracing.adapters import nnx as nnx_adapter

_compiled: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def value_grad_and_taps(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    fisher: Fisher = "sampled",
    num_samples: int = 1,
    has_aux: bool = False,
    axis_name: Any = None,
    quadratic_model: bool = False,
    microbatches: int = 1,
    batch_arguments: BatchArguments = None,
    recompute: bool | None = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns the taps from which curvature is estimated.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> loss`, as given to `find_layers`.
      layers: what `find_layers` returned for it. The batch size may differ from the one it saw.
      fisher: "sampled": targets drawn from the model's own predictive distribution (Martens & Grosse 2015), needs `key`;
        "exact": all columns of the Fisher at the outputs, as many backward passes as outputs an example; "empirical": the
        gradient's own targets, needs no registered loss.
      num_samples: how many draws "sampled" averages over.
      has_aux: as in `jax.value_and_grad`.
      axis_name: the axis, or a tuple of axes, over which the batch is divided inside `jax.pmap` or `jax.shard_map`: statistics
        are averaged over it, and sampled targets follow the global example. Loss and gradients stay local under both, also
        with `check_vma=True` and where the loss averages over the axis itself: the mean over the devices,
        `jax.lax.pmean((loss, grads), axis_name)`, is yours to take. With `check_vma=True` parameters are typed as varying over
        the axis, and so must be what a loop or a branch inside the loss carries beside them (`jax.lax.pcast`).
      quadratic_model: the taps also know the loss at other parameters (`taps.loss_at`) and products with the whole Fisher
        (`taps.tangent`), as `kfe.kfac_adaptive`, `kfe.scale_by_quadratic_model` and `kfe.adaptive_damping` need them.
      microbatches: k > 1 takes the batch in k parts one after the other, for gradients that do not fit into memory at once: loss
        and gradients are the means over the parts (those of the whole batch, for a loss that is a mean over examples), and
        so are the statistics, for which a refresh runs each part forward and backward once more. `aux` comes with a
        leading axis of k; the state of NNX objects moves from part to part. A key among the arguments is the same for all
        parts: give dropout a key an example, or `nnx.Rngs`, of the module or as an argument.
      batch_arguments: which arguments of the loss hold examples along their first axis: positions (the parameters are 0) or
        names of keywords. All behind the parameters by default; scalars are never split.
      recompute: whether a step that reads statistics runs the forward pass once more. Then the others keep no residuals for it,
        and cost what a plain gradient costs: a Transformer's, with attention to be kept, some 20 % less. False is cheaper where
        statistics are read on every step or two; it is the default with `quadratic_model`, True without. What the loss prints, a
        pass that runs again prints again.

    Returns:
      `f(params, *args, key=None, row_mask=None, **kwargs) -> (loss, grads, taps)`, `((loss, aux), grads, taps)` with `has_aux`.
      `row_mask`, (n,) or (n, t, ...), leaves padded positions out of the statistics (see `kfe.row_mask`). `loss_scale`, a
      number, is the factor by which `loss_fn` multiplies the loss so that float16 gradients do not underflow, and by which you
      divide the gradients afterwards: the curvature is then that of the loss without it. `loss` and `grads` are those of
      `jax.value_and_grad` (`nnx.value_and_grad` for an `nnx.Module`). The state of NNX objects moves as it does there: batch
      statistics and rng counts of the module, `nnx.Rngs`, metrics and further models among the arguments.
      It is compiled; arrays are traced, Python values among the arguments are static, so pass numbers that change as arrays.
      Under `vmap` a period's `lax.cond` on a batched step count becomes a select and every step pays for a refresh: keep the
      count unbatched.

    Raises:
      TypeError, ValueError: as `find_layers` does.
      ValueError: the loss registers no output or subtracts one, `key` is missing, `loss_scale` is not positive, the loss's
        layers or parameters are not those of `layers`, "exact" meets a loss inside a loop, the batch does not split into
        microbatches, or it differs between the devices of an axis of `jax.shard_map` that `axis_name` does not name.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
      >>> model = nn.Dense(3)
      >>> x, labels = jnp.ones((8, 5)), jnp.zeros(8, int)
      >>> params = {"model": model.init(jax.random.key(0), x)["params"]}
      >>> def loss_fn(params, x, labels):
      ...     logits = model.apply({"params": params["model"]}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(1))
      >>> a, g = layers["model"].rows(taps["model"])
      >>> a.shape, g.shape
      ((8, 1, 6), (8, 1, 3))
    """
    checks.one_of("fisher", fisher, Fisher)
    require_layers(layers)
    if not checks.is_whole(num_samples) or num_samples < 1 or (num_samples > 1 and fisher != "sampled"):
        raise ValueError(
            f"num_samples counts the draws of fisher='sampled', a positive whole number, not {num_samples!r}; leave it at 1 "
            "otherwise."
        )
    microbatches = microbatches_lib.check(microbatches)
    place = Place(tuple(axis_name) if isinstance(axis_name, list) else axis_name, microbatches)
    again = not quadratic_model if recompute is None else bool(recompute)
    options = (layers, fisher, num_samples, has_aux, place, quadratic_model, again)
    # The compiled function belongs to the loss function: a caller that builds this wrapper anew each step does not recompile.
    per_loss = _compiled.setdefault(loss_fn, {})
    reference, compiled = per_loss.get(options, (lambda: None, None))
    # Two bound methods of one object are equal and share an entry: the one that was compiled must outlive this wrapper.
    keep = reference()
    if keep is None:
        keep, reference = loss_fn, weakref.ref(loss_fn)
        compiled = _compile(reference, *options)
        per_loss[options] = (reference, compiled)

    def wrapped(params, *args, key=None, row_mask=None, loss_scale=None, **kwargs):
        if fisher == "sampled" and key is None:
            raise ValueError(
                "fisher='sampled' draws targets from the model and needs a random key: pass key=jax.random.fold_in(key, step), "
                "or choose fisher='empirical' or 'exact'."
            )
        if loss_scale is not None:
            loss_scale = _checked_scale(loss_scale)
        parameters, given, rebuild, objects = adapters.partition(params, args, kwargs)
        arrays, static = static_values.split_call(given)
        stacked = microbatches_lib.flags(microbatches, batch_arguments, *given, row_mask)
        seed = jnp.zeros(2, jnp.uint32) if key is None else jax.random.bits(key, (2,), jnp.uint32)
        assert keep is not None  # the compiled function holds it weakly
        moving = (parameters, arrays, seed, row_mask, loss_scale)
        value, grads, taps, state = compiled(rebuild, static, stacked, *moving)
        taps.loss_fn = keep
        if objects:
            nnx_adapter.update(objects, state)
        return value, grads, taps

    return wrapped


def _compile(
    loss_reference: Any,
    layers: Layers,
    fisher: Fisher,
    num_samples: int,
    has_aux: bool,
    place: Place,
    quadratic_model: bool,
    recompute: bool,
):
    def step(rebuild, static, stacked, parameters, arrays, seed, row_mask, loss_scale):
        with discovery.bound_axes():
            _check_axes(parameters, arrays, place.axis_name)
        k, here, before = place.microbatches, place, arrays
        if k > 1:
            arrays = [microbatches_lib.split(a, k) if s else a for a, s in zip(arrays, stacked, strict=True)]
            row_mask = None if row_mask is None else microbatches_lib.split(jnp.asarray(row_mask), k)
        parts, whole = microbatches_lib.separate(stacked, arrays)
        first = jax.tree.map(lambda v: v[0], (parts, row_mask)) if k > 1 else (parts, row_mask)
        sample = microbatches_lib.merge(stacked, first[0], whole)
        found = discovery.discover(loss_reference(), has_aux, parameters, sample, rebuild, static, first[1])
        found = _check(layers, found, fisher)
        if quadratic_model:
            _check_tangents(found)
        if found.unregistered and fisher != "empirical":
            here = here._replace(start=FAINT)
        if k > 1:
            here = here._replace(examples=parts[0].shape[1])
        forward = Forward(loss_reference, rebuild, static, has_aux, found, here, quadratic_model)
        if k == 1:
            passed = forward(parameters, arrays, row_mask, loss_scale)
            grads, cotangents = passed.pull()
            loss, aux, state = passed.loss, passed.aux, passed.state
            weights = accumulation.weights_of(cotangents)
            residuals, swaps = (
                (None, None) if recompute else ((passed.leaves, passed.cotangent), passed.swaps)
            )
        else:
            num_state = len(static_values.split_static(static(arrays)[0])[0])
            scanned = accumulation.accumulated(
                forward, parameters, arrays, row_mask, loss_scale, stacked, num_state
            )
            (loss, aux), grads, state, weights, arrays, stacked = scanned
            residuals = swaps = None
        if state is not None:
            state = nnx_adapter.moved(static(before)[0], state)
        container = jax.tree.structure(parameters)
        plan = Plan(forward, swaps, fisher, num_samples, stacked, container)
        given = Given(parameters, arrays, row_mask) if quadratic_model or recompute or k > 1 else None
        unscaled = loss if loss_scale is None else loss / loss_scale
        taps = Taps(residuals, given, seed, weights, unscaled if quadratic_model else None, loss_scale, plan)
        return ((loss, aux) if has_aux else loss), grads, taps, state

    return jax.jit(step, static_argnums=(0, 1, 2))


def _checked_scale(loss_scale: Any) -> jax.Array:
    if jnp.shape(loss_scale) != () or (not isinstance(loss_scale, core.Tracer) and not loss_scale > 0):
        raise ValueError(
            f"loss_scale must be a positive number, by which loss_fn multiplies its loss, not {loss_scale!r}."
        )
    return jnp.asarray(loss_scale, jnp.result_type(float))


def _check_axes(parameters: Any, arrays: Any, axis_name: Any) -> None:
    """Raises where types say that the batch, but not the parameters, differs along an axis that `axis_name` leaves out."""
    varying_axes.named(axis_name)  # raises where an axis is not bound
    known = frozenset(varying_axes.names(axis_name)) | varying_axes.axes_of(parameters)
    unnamed = varying_axes.axes_of(arrays) - known
    if unnamed:
        axis = min(map(str, unnamed))
        raise ValueError(
            f"The arguments of the loss differ between the devices of axis {axis!r}, over which the statistics must be averaged: "
            f"pass kfe.value_grad_and_taps(..., axis_name={axis!r})."
        )


def _check_tangents(layers: Layers) -> None:
    """Raises unless the loss's outputs can be followed forward."""
    if not layers.outputs:
        raise ValueError(
            "quadratic_model=True needs to know what the model predicts, but the loss registers nothing: compute it with a "
            "function of kfe.losses, or pass the outputs through kfe.register_output."
        )
    nested = [output for output in layers.outputs if output.nested]
    if nested:
        raise ValueError(
            f"quadratic_model=True meets {nested[0].spec.name} inside a vmap or a loop (or more than once), where its outputs "
            "cannot be told apart: collect the model's outputs and compute the loss on the whole batch."
        )


def _check(layers: Layers, found: Layers, fisher: Fisher) -> Layers:
    """Raises for a call that does not fit the layers; otherwise the layers found, configured like those given."""
    found = found.configured_like(layers)
    difference = same_layers(layers, found)
    if difference:
        raise ValueError(
            f"The parameters or the loss are not those that find_layers saw: {difference}. Call find_layers again and rebuild "
            "the optimizer with what it returns."
        )
    if fisher != "empirical" and not found.outputs:
        raise ValueError(
            f"fisher={fisher!r} needs to know what the model predicts, but the loss registers nothing: compute it with a "
            "function of kfe.losses, or pass the outputs through kfe.register_output; or use fisher='empirical'."
        )
    subtracted = [output.spec.name for output in found.outputs if output.subtracted]
    if fisher != "empirical" and subtracted:
        raise ValueError(
            f"The loss subtracts {subtracted[0]}, and negative weights make no Fisher matrix: if that term is to grow, compute "
            "it with optax.losses, so that it adds nothing to the Fisher, or use fisher='empirical'."
        )
    looped = [output.spec.name for output in found.outputs if output.looped]
    if fisher == "exact" and looped:
        raise ValueError(
            f"fisher='exact' cannot enumerate the outputs of {looped[0]} inside a loop (scan, map): collect the outputs and "
            "compute the loss outside the loop, or use fisher='sampled'."
        )
    constant = [name for name, layer in found.items() if layer.constant]
    if constant and fisher != "sampled":
        raise ValueError(
            f"The input of layer {constant[0]!r} is the same for all examples (positions, for instance): only samples tell its "
            f"examples apart. Use fisher='sampled', or leave it out with layers.without({constant[0]!r})."
        )
    batches = {size for output in found.outputs for size in output.batches}
    unsure = [
        name
        for name, layer in found.items()
        if not layer.aligned or (layer.per_example and layer.examples not in batches)
    ]
    if fisher == "exact" and unsure:
        raise ValueError(
            f"fisher='exact' takes a column of all examples at once, and it is not shown that each row of layer {unsure[0]!r} "
            "belongs to one example of the registered loss: its leading axis is no batch, or the loss's outputs are flattened "
            f"with other axes. Use fisher='sampled', or leave the layer out with layers.without({unsure[0]!r})."
        )
    spread = [
        output
        for output in found.outputs
        if output.mapped
        and any(output.examples not in (layer.examples, math.prod(layer.stacked)) for layer in found.values())
    ]
    if fisher == "exact" and spread:
        raise ValueError(
            f"fisher='exact' meets {spread[0].spec.name} under a vmap of size {spread[0].examples}, which is neither the batch "
            "nor an ensemble's members: its columns would mix what the vmap maps. Call the loss on the whole array instead, "
            "or use fisher='sampled'."
        )
    return found
