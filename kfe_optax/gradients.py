"""`value_grad_and_taps`: the loss, its gradient and the taps, from one forward pass."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax import adapters, discovery, masks, outputs, tags
from kfe_optax.adapters import nnx as nnx_adapter
from kfe_optax.layers import Layers, same_layers
from kfe_optax.taps import Evaluate, Fisher, Plan, Taps, Trial

# The name of a part of a layer's rider in its slot, which the layers of one module share.
_RIDER = re.compile(r"rider(\d+)_(\w+)")


class _Collection:
    """Puts the tags on (see `tags.Listener`)."""

    def __init__(
        self,
        layers: Layers,
        registered: dict[int, outputs.Output],
        controls: dict[int, Any],
        axis_name: Any,
    ):
        self._layers = list(layers.values())
        self._registered = registered
        self._controls = controls
        self._axis_name = axis_name
        self._serial = 0

    def tag(self, kind, roles, x, y, parameters, box, label):
        del parameters
        rider, order = {}, None
        for name, value in box.items():
            own = _RIDER.fullmatch(name)
            if own and self._layers[int(own[1])].paths[0][1][-1] == roles[0][1]:
                rider[own[2]], order = value, int(own[1])
        if order is None:
            return y
        layer = self._layers[order]
        kind = layer.kind  # with its approximation
        free = kind.free(x.shape, y.shape)
        live = None
        if not kind.per_example:
            live = masks.live(layer, free)
        # The leading axis is the batch's, also when it is flattened with others.
        examples = layer.examples if layer.per_example else free[0]
        use = tags.Use(kind, layer.kernel_shape, layer.bias, label, examples, layer.row_bytes)
        add = tags.row_tag if layer.has_rows else tags.additive_tag
        return add(use, x, y, live, rider)

    def unsupported(self, reason, box):
        del reason, box

    def output(self, spec, z, args):
        serial, self._serial = self._serial, self._serial + 1
        output = self._registered.get(serial)
        if output is None:
            return z if spec.loss is None else spec.loss(z, *args)
        control = self._controls[serial]
        if spec.loss is None:
            return outputs.tagged_output(output, self._axis_name, z, args[0], control)
        return outputs.tagged_loss(output, self._axis_name, z, args, control)


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
      axis_name: the mapped axis inside `jax.pmap`: statistics are averaged over it, and sampled targets follow the global
        example. The gradients stay local, as those of `jax.value_and_grad`: average them yourself.
      quadratic_model: the taps also know the loss at other parameters (`taps.loss_at`) and products with the whole Fisher
        (`taps.tangent`), as `kfe.kfac_adaptive`, `kfe.scale_by_quadratic_model` and `kfe.adaptive_damping` need them.

    Returns:
      `f(params, *args, key=None, row_mask=None, **kwargs) -> (loss, grads, taps)`, `((loss, aux), grads, taps)` with `has_aux`.
      `row_mask`, (n,) or (n, t, ...), leaves padded positions out of the statistics (see `kfe.row_mask`). `loss` and
      `grads` are those of `jax.value_and_grad` (`nnx.value_and_grad` for an `nnx.Module`, whose batch statistics and rng
      counts move alike). It is compiled; arrays are traced, Python values among the arguments are static, so pass
      numbers that change as arrays. Under `vmap` a period's `lax.cond` on a batched step count becomes a select and
      every step pays for a refresh: keep the count unbatched.

    Raises:
      ValueError: the loss registers no output, `key` is missing, the loss's layers or parameters are not those of `layers`, a
        layer's leading axis is not the batch, or "exact" meets a loss inside a loop.

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
    if fisher not in ("sampled", "empirical", "exact"):
        raise ValueError(f"fisher must be 'sampled', 'empirical' or 'exact', not {fisher!r}.")
    if not isinstance(layers, Layers):
        raise TypeError(f"layers must be what kfe.find_layers returns, not a {type(layers).__name__}.")
    if num_samples < 1 or (num_samples > 1 and fisher != "sampled"):
        raise ValueError("num_samples counts the draws of fisher='sampled'; leave it at 1 otherwise.")
    options = (layers, fisher, num_samples, has_aux, axis_name, quadratic_model)
    # The compiled function belongs to the loss function: a caller that builds this wrapper anew each step does not recompile.
    per_loss = _compiled.setdefault(loss_fn, {})
    reference, compiled = per_loss.get(options, (lambda: None, None))
    # Two bound methods of one object are equal and share an entry: the one that was compiled must outlive this wrapper.
    keep = reference()
    if keep is None:
        keep, reference = loss_fn, weakref.ref(loss_fn)
        compiled = _compile(reference, *options)
        per_loss[options] = (reference, compiled)

    def wrapped(params, *args, key=None, row_mask=None, **kwargs):
        if fisher == "sampled" and key is None:
            raise ValueError(
                "fisher='sampled' draws targets from the model and needs a random key: pass key=jax.random.fold_in(key, step), "
                "or choose fisher='empirical' or 'exact'."
            )
        parameters, other, rebuild = adapters.partition(params)
        arrays, static = discovery.split_static((other, args, kwargs))
        seed = jnp.zeros(2, jnp.uint32) if key is None else jax.random.bits(key, (2,), jnp.uint32)
        assert keep is not None  # the compiled function holds it weakly
        value, grads, taps, state = compiled(rebuild, static, parameters, arrays, seed, row_mask)
        if nnx_adapter.is_module(params):
            nnx_adapter.update(params, state)
        return value, grads, taps

    return wrapped


def _compile(
    loss_reference: Any,
    layers: Layers,
    fisher: Fisher,
    num_samples: int,
    has_aux: bool,
    axis_name: Any,
    quadratic_model: bool,
):
    def step(rebuild, static, parameters, arrays, seed, row_mask):
        loss_fn = loss_reference()
        with masks.row_mask(row_mask):
            found = discovery.discover(loss_fn, has_aux, parameters, arrays, rebuild, static, {})
        found = _check(layers, found, fisher)
        registered = {output.serial: output for output in found.outputs}
        if quadratic_model:
            _check_tangents(found)
        zeros = outputs.control_zeros(found.outputs, quadratic_model)
        controls = dict(zip(registered, zeros, strict=True))
        riders = {
            "layers": [
                {name: jnp.zeros(s.shape, s.dtype) for name, s in layer.rider_shapes().items()}
                for layer in found.values()
            ],
            "outputs": [control.rider for control in controls.values()],
        }

        def run(parameters, riders):
            boxes: dict[Any, dict[str, Any]] = {}
            for layer, rider in zip(found.values(), riders["layers"], strict=True):
                slot = boxes.setdefault(layer.paths[0][1][:-1], {})
                slot.update({f"rider{layer.order}_{part}": value for part, value in rider.items()})
            live = {
                serial: controls[serial]._replace(rider=rider)
                for serial, rider in zip(controls, riders["outputs"], strict=True)
            }
            other, args, kwargs = static(arrays)
            model = rebuild(parameters, other, boxes)
            collection = _Collection(found, registered, live, axis_name)
            with tags.listening(collection), adapters.intercepting(), masks.row_mask(row_mask):
                loss = loss_fn(model, *args, **kwargs)
            loss, aux = loss if has_aux else (loss, None)
            state = nnx_adapter.other_state(model) if nnx_adapter.is_module(model) else None
            if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
                raise ValueError(
                    f"The loss must be a real scalar, but has shape {jnp.shape(loss)} and dtype {jnp.result_type(loss)}; "
                    "reduce it, for instance with .mean()."
                )
            return loss, (aux, state)

        loss, pull, (aux, state) = jax.vjp(run, parameters, riders, has_aux=True)
        leaves, structure = jax.tree.flatten(pull)
        cotangent = jnp.ones_like(loss)
        grads, cotangents = pull(cotangent)
        modes, seeds = (
            tuple(_find(leaves, control, field) for control in controls.values())
            for field in ("mode", "seed")
        )
        trial, evaluate, tangents = None, None, ()
        if quadratic_model:
            trial = Trial(loss, parameters, arrays)
            evaluate = Evaluate(loss_reference, rebuild, static, has_aux)
            tangents = tuple(_find(leaves, control, "cotangent") for control in controls.values())
        container = jax.tree.structure(parameters)
        plan = Plan(
            structure, modes, seeds, tangents, found, fisher, num_samples, axis_name, evaluate, container
        )
        weights = sum(cotangents["outputs"]) if controls else None
        taps = Taps(leaves, cotangent, seed, weights, trial, plan)
        return ((loss, aux) if has_aux else loss), grads, taps, state

    return jax.jit(step, static_argnums=(0, 1))


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


def _find(leaves: list[Any], control: outputs.Control, field: str) -> tuple[int, ...]:
    """Where a control's leaf stands among the pull's residuals."""
    wanted = getattr(control, field)
    found = tuple(i for i, leaf in enumerate(leaves) if leaf is wanted)
    if not found:
        raise ValueError(
            "The registered loss could not be reached from the gradient: its residuals hold no mode. Does the loss pass through "
            "a custom_vjp of its own, or is its value unused? Register its outputs outside, or use fisher='empirical'."
        )
    return found


def _check(layers: Layers, found: Layers, fisher: Fisher) -> Layers:
    """Raises for a call that does not fit the layers; otherwise the layers found, with the batch axis settled."""
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
    batches = {size for output in found.outputs if not output.looped for size in output.batches}
    return found.settle_batch(batches) if batches else found
