"""`value_grad_and_taps`: the loss, its gradient and the taps, from one forward pass."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax._jax import checks, static_values
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._marks.loss_tags import Place
from kfe_optax._taps import microbatches as microbatches_lib
from kfe_optax._taps.microbatches import BatchArguments
from kfe_optax._taps.plan import Fisher
from kfe_optax._taps.step import Parts, Step
from kfe_optax._tracing import adapters
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
    statistics_fraction: float = 1.0,
    products_fraction: float = 1.0,
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
        names of keywords. All behind the parameters by default; scalars are never divided.
      statistics_fraction: 1/k estimates curvature from a part of the batch (τ₁ of Martens & Grosse 2015): every k-th
        example, from one that `key` chooses. A step that reads statistics then runs a pass on that part alone, besides the
        gradient's, and `layers` of the taps have its shapes. The estimate is that of the whole loss, a sum or a mean.
      products_fraction: the same for the products with the Fisher of `quadratic_model` (τ₂); the loss at other parameters stays
        that of the whole batch.
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
      ValueError: the loss registers no output or subtracts one, `key` is missing, the loss has a `key` of its own and is not
        given it, `loss_scale` is not positive, the loss's layers or parameters are not those of `layers`, "exact" meets a loss
        inside a loop, the batch does not divide into microbatches or fractions, or it differs between the devices of an axis of
        `jax.shard_map` that `axis_name` does not name.

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
    if products_fraction != 1 and not quadratic_model:
        raise ValueError("products_fraction is about the products with the Fisher of quadratic_model=True.")
    parts = Parts(
        microbatches_lib.parts_of("statistics_fraction", statistics_fraction),
        microbatches_lib.parts_of("products_fraction", products_fraction) if quadratic_model else 0,
    )
    again = not quadratic_model if recompute is None else bool(recompute)
    options = (layers, fisher, num_samples, has_aux, place, parts, again)
    # The compiled function belongs to the loss function: a caller that builds this wrapper anew each step does not recompile.
    per_loss = _compiled.setdefault(loss_fn, {})
    reference, compiled = per_loss.get(options, (lambda: None, None))
    # Two bound methods of one object are equal and share an entry: the one that was compiled must outlive this wrapper.
    keep = reference()
    if keep is None:
        keep, reference = loss_fn, weakref.ref(loss_fn)
        compiled = jax.jit(Step(reference, *options).passes, static_argnums=(0, 1, 2))
        per_loss[options] = (reference, compiled)

    def wrapped(params, *args, key=None, row_mask=None, loss_scale=None, **kwargs):
        if fisher == "sampled" and key is None:
            raise ValueError(
                "fisher='sampled' draws targets from the model and needs a random key: pass key=jax.random.fold_in(key, step), "
                "or choose fisher='empirical' or 'exact'."
            )
        if loss_scale is not None:
            loss_scale = _checked_scale(loss_scale)
        _check_names(keep, args, kwargs, key=key, row_mask=row_mask, loss_scale=loss_scale)
        parameters, given, rebuild, objects = adapters.partition(params, args, kwargs)
        arrays, static = static_values.split_call(given)
        divided = {
            f"microbatches={microbatches}": microbatches,
            f"statistics_fraction={statistics_fraction:.6g}": parts.statistics,
            f"products_fraction={products_fraction:.6g}": parts.products,
        }
        examples = microbatches_lib.flags(divided, batch_arguments, *given, row_mask)
        seed = jnp.zeros(2, jnp.uint32) if key is None else jax.random.bits(key, (2,), jnp.uint32)
        assert keep is not None  # the compiled function holds it weakly
        moving = (parameters, arrays, seed, row_mask, loss_scale)
        value, grads, taps, state = compiled(rebuild, static, examples, *moving)
        taps.loss_fn = keep
        if objects:
            nnx_adapter.update(objects, state)
        return value, grads, taps

    return wrapped


def _check_names(loss_fn: Any, args: Any, kwargs: Any, **taken: Any) -> None:
    """Raises where a keyword that this call takes for itself is one of the loss's, too, and the loss is left without."""
    try:
        signature = inspect.signature(loss_fn)
        given = signature.bind_partial(None, *args, **kwargs).arguments
    except (TypeError, ValueError):
        return  # no signature, or a call that the loss itself refuses
    for name, value in taken.items():
        if value is not None and name in signature.parameters and name not in given:
            raise ValueError(
                f"The loss has a parameter {name!r} of its own and is not given it: {name}= is for the taps (a key for the "
                "Fisher's draws, a mask of rows, a scale). Pass the loss's by position, None for none."
            )


def _checked_scale(loss_scale: Any) -> jax.Array:
    if jnp.shape(loss_scale) != () or (not isinstance(loss_scale, core.Tracer) and not loss_scale > 0):
        raise ValueError(
            f"loss_scale must be a positive number, by which loss_fn multiplies its loss, not {loss_scale!r}."
        )
    return jnp.asarray(loss_scale, jnp.result_type(float))
