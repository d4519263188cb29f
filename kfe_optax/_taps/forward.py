"""One forward pass of a loss with tags and riders, and where among its residuals stands what the Fisher's pull swaps."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks, explicit_axes, varying_axes
from kfe_optax._layers.kinds.base import TRANSPOSED
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._marks import loss_tags, marks, registrations
from kfe_optax._statistics import masks, riders, tags
from kfe_optax._tracing import adapters, equations, rules, traced
from kfe_optax._tracing.rebuild import Kept, Place, Rebuild, Riders


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Which of the pull's leaves are swapped, for each registered loss, and the pull's tree structure."""

    structure: Any
    modes: tuple[tuple[int, ...], ...]
    seeds: tuple[tuple[int, ...], ...]
    cotangents: tuple[tuple[int, ...], ...]  # for products with J, where the quadratic model is asked for
    shares: tuple[tuple[int, ...], ...]  # where the pass sees a part of the batch alone
    shardings: Any  # of the leaves and the cotangent, where types have them
    start: float  # of the Fisher's pull, see `loss_tags.Place`


class Pass(NamedTuple):
    """What one forward pass leaves: the loss, and the residuals of its `jax.vjp` as leaves."""

    loss: jax.Array
    aux: Any
    state: Any  # what NNX objects hold beside the parameters, as the pass has moved it
    leaves: list[Any]
    cotangent: jax.Array
    swaps: Swaps

    def pull(self) -> tuple[Any, Any]:
        """The cotangents of parameters and riders: gradients and weights."""
        return jax.tree.unflatten(self.swaps.structure, self.leaves)(self.cotangent)


@dataclasses.dataclass(frozen=True)
class Forward:
    """What is static about the pass: the function (held weakly) and what of its arguments is no array.

    Attributes:
      layers: with the shapes of the batch that it is called with.
      tangents: whether the residuals hold a cotangent for products with J.
    """

    reference: Any
    rebuild: adapters.Rebuild
    static: Any
    has_aux: bool
    layers: Layers
    place: loss_tags.Place
    tangents: bool

    def loss(self, parameters: Any, arrays: Any) -> jax.Array:
        """The loss at these parameters, without taps; mutable state moves on in a copy."""
        call = self.rebuild(parameters, self.static(arrays))
        return checks.loss(self._loss_fn()(call.params, *call.args, **call.kwargs), self.has_aux)[0]

    def _loss_fn(self) -> Any:
        loss_fn = self.reference()
        if loss_fn is None:
            raise ReferenceError(
                "The loss function of these taps is gone: keep a reference to it as long as to the taps."
            )
        return loss_fn

    def __call__(self, parameters: Any, arrays: Any, row_mask: Any, loss_scale: Any) -> Pass:
        """The pass: the residuals know gradients and statistics."""
        # Where types tell devices apart, all is local, as it is under pmap: who wants sums over devices takes them.
        axes = varying_axes.named(self.place.axis_name)
        parameters = varying_axes.over(axes, parameters)
        place = self.place._replace(axes=axes | varying_axes.axes_of((parameters, arrays)))
        registered = {output.serial: output for output in self.layers.outputs}
        zeros = varying_axes.over(
            place.axes, loss_tags.control_zeros(registered.values(), self.tangents, loss_scale, place.alone)
        )
        controls = dict(zip(registered, zeros, strict=True))
        riders = {
            "layers": [self._rider(layer, arrays) for layer in self.layers.values()],
            "outputs": [control.rider for control in controls.values()],
        }

        loss_fn, given = self._loss_fn(), (parameters, arrays, row_mask)
        trace = traced.trace(loss_fn, self.rebuild, self.static, self.has_aux, *given, varied=axes)

        def run(parameters, riders):
            live = {
                serial: controls[serial]._replace(rider=rider)
                for serial, rider in zip(controls, riders["outputs"], strict=True)
            }
            tagger = _Tagger(self.layers, registered, live, place, row_mask)
            given = [*jax.tree.leaves(parameters), *arrays]
            found = tagger.rebuild(trace.program, given, dict(enumerate(riders["layers"])))
            loss, aux, state = jax.tree.unflatten(trace.structure, found)
            if any(output.spec.loss is not None for output in registered.values()):
                _check_range(loss, place)
            return loss, (aux, state)

        loss, pull, (aux, state) = jax.vjp(
            run, parameters, varying_axes.over(place.axes, riders), has_aux=True
        )
        leaves, structure = jax.tree.flatten(pull)
        # A loss that was averaged over the devices inside is one loss on all of them, and its cotangent is divided among
        # them where types say so; under pmap it counts once a device.
        devices = jax.lax.psum(1, tuple(axes - varying_axes.axes_of(loss))) if axes else 1
        cotangent = jnp.ones_like(loss) * jnp.asarray(devices, loss.dtype)
        swaps = Swaps(
            structure,
            tuple(_find(leaves, control.mode) for control in controls.values()),
            tuple(_find(leaves, control.seed) for control in controls.values()),
            tuple(_find(leaves, control.cotangent) for control in controls.values()) if self.tangents else (),
            tuple(_find(leaves, control.share) for control in controls.values()) if place.alone else (),
            explicit_axes.shardings((leaves, cotangent)),
            place.start,
        )
        return Pass(loss, aux, state, leaves, cotangent, swaps)

    def _rider(self, layer: Layer, arrays: Any) -> dict[str, jax.Array]:
        """Zeros for the statistics; those that have the batch's axis are divided over devices as it is."""
        mesh = explicit_axes.mesh_of(arrays)
        examples = {layer.examples, *(output.examples for output in self.layers.outputs)}
        names = None if mesh is None else explicit_axes.batch_axes(arrays, examples)
        rider = riders.zeros(layer)
        if names is None:
            return rider
        for name, value in rider.items():
            axis = riders.examples_axis(layer, name)
            if axis is not None:
                rider[name] = explicit_axes.divided(value, mesh, axis, names)
        return rider


class _Tagger:
    """Puts the tags on (see `rebuild.Tagger`)."""

    def __init__(
        self,
        layers: Layers,
        registered: dict[int, registrations.Output],
        controls: dict[int, Any],
        place: loss_tags.Place,
        row_mask: Any,
    ):
        self._layers = list(layers.values())
        self._registered = registered
        self._controls = controls
        self._place = place
        self._row_mask = row_mask
        places = {use[0]: Place(i, *use[1:]) for i, layer in enumerate(self._layers) for use in layer.places}
        beside = [
            at for p in places.values() for at in (p.mask, *(p.kept or ())[:1]) if at is not None and at >= 0
        ]
        places |= {at: Place(serial) for serial, output in registered.items() for at in output.places}
        self.rebuild = Rebuild(places | {at: Kept(at) for at in beside}, self)
        self._kept: dict[int, tuple[Any, list[Any]]] = {}

    def __call__(self, place: Place | Kept, equation: Any, operands: list[Any], riders: Riders) -> Any:
        if isinstance(place, Kept):
            self._kept[place.place] = equation, operands
            return equations.result(equation, operands)
        if equation.primitive is marks.loss_mark:
            return self._loss(place.number, equation.params, operands)
        layer, rider = self._layers[place.number], riders[place.number]
        if equation.primitive is not marks.layer_mark:
            return self._used(layer, place, equation, operands, rider)
        params = equation.params
        roles = len(params["roles"])
        names = list(rider)

        masked = params["masked"]
        of_example = masked and all(mapped[2 + roles] for _, mapped in params["vmaps"])

        def tagged(y, x, *rest):
            own = dict(zip(names, rest[-len(names) :], strict=True))
            live = self._live(layer, place, x, y, rest[0] if masked else None, of_example=of_example)
            return self._tagged(layer, place, x, y, live, own)

        y, x, *rest = operands
        own = varying_axes.over(varying_axes.axes_of((y, x)), list(rider.values()))
        vmaps = tuple(
            (size, (*mapped[:2], *mapped[2 + roles :], *(mapped[2],) * len(own)))
            for size, mapped in params["vmaps"]
        )
        return marks.under_vmaps(tagged, vmaps, y, x, *rest[roles:], *own)

    def _used(self, layer: Layer, place: Place, equation: Any, operands: list[Any], rider: Any) -> Any:
        """The result of an equation that is itself the use."""
        y = equations.result(equation, operands)
        rule = rules.RULES[equation.primitive.name]
        layout = rule.layout(equation, place.x, operands)
        x, outward, back = layout if place.moves is None else layout.then(place.moves)
        if place.kept is not None:
            of, operand = place.kept
            x = x * self._kept[of][1][operand]
        mask, of_batch = self._mask(layer, place)
        # Inside a shard_map the rider is the same on all devices, and what the tag yields is each one's own.
        own, names = varying_axes.over(varying_axes.axes_of((y, x)), list(rider.values())), list(rider)

        def tagged(y, x, mask, *own):
            rider = dict(zip(names, own, strict=True))
            live = self._live(layer, place, x, y, mask, of_batch=of_batch)
            return self._tagged(layer, place, x, y, live, rider)

        vmaps = tuple((size, (*flags[:2], False, *(flags[2],) * len(own))) for size, flags in place.vmaps)
        return back(marks.under_vmaps(tagged, vmaps, outward(y), jax.lax.stop_gradient(x), mask, *own))

    def _mask(self, layer: Layer, place: Place) -> tuple[Any, bool]:
        """The row mask of a use by a rule, and whether its first axis is the batch's, as a vmap's over the examples is."""
        if place.mask is None:
            return self._row_mask, True
        if place.mask < 0 or layer.kind.per_example:
            return None, False
        mark, (mask,) = self._kept[place.mask]
        mapped = bool(mark.params["vmaps"])
        if mapped and (place.vmaps or layer.stack_shape):
            raise ValueError(
                f"A vmap over models maps the row_mask that layer {layer.name!r} is in, and which of its axes are the members' "
                "is not known: mark the layer with kfe.tag_dense, or open the row_mask around the vmap."
            )
        return mask, mapped

    def _free(self, layer: Layer, place: Place, x: Any, y: Any) -> tuple[int, ...]:
        shapes = (y.shape, x.shape) if place.label == TRANSPOSED else (x.shape, y.shape)
        return layer.kind.free(*shapes)

    def _live(self, layer: Layer, place: Place, x: Any, y: Any, mask: Any, **of: bool) -> jax.Array | None:
        """Which rows of a use count (see `masks.live`)."""
        return (
            None if layer.kind.per_example else masks.live(layer, mask, self._free(layer, place, x, y), **of)
        )

    def _tagged(self, layer: Layer, place: Place, x: Any, y: Any, live: jax.Array | None, rider: Any) -> Any:
        kind = layer.kind  # with its approximation
        free = self._free(layer, place, x, y)
        # The leading axis is the batch's, also when it is flattened with others.
        examples = layer.examples if layer.per_example else free[0]
        label, factor, bytes_ = place.label, place.factor, layer.row_bytes
        use = tags.Use(kind, layer.kernel_shape, layer.bias, label, factor, examples, bytes_)
        add = tags.row_tag if layer.has_rows else tags.additive_tag
        return add(use, x, y, live, rider)

    def _loss(self, serial: int, params: Any, operands: list[Any]) -> Any:
        output, control = self._registered[serial], self._controls[serial]

        def tagged(z, *leaves):
            args = jax.tree.unflatten(params["structure"], leaves)
            if output.spec.loss is None:
                return loss_tags.tagged_output(output, self._place, z, args[0], control)
            return loss_tags.tagged_loss(output, self._place, z, args, control)

        losses = marks.under_vmaps(tagged, params["vmaps"], *operands)
        if output.spec.loss is not None:
            _check_range(losses, self._place)
        return losses


def _check_range(losses: Any, place: loss_tags.Place) -> None:
    """Raises where what arrives at a registered loss in the Fisher's pull would be too small a number."""
    dtype = jnp.result_type(losses)
    if place.start < jnp.finfo(dtype).tiny:
        raise ValueError(
            f"A term of the loss is not registered, and {dtype}, in which a registered loss is computed, has too small a range "
            "to keep that term out of the Fisher: compute the loss in float32, from outputs.astype(jnp.float32), or use "
            "fisher='empirical'."
        )


def _find(leaves: list[Any], wanted: Any) -> tuple[int, ...]:
    """Where a control's leaf stands among the pull's residuals."""
    found = tuple(i for i, leaf in enumerate(leaves) if leaf is wanted)
    if not found:
        raise ValueError(
            "The registered loss could not be reached from the gradient: its residuals hold no mode. Is it inside "
            "a custom_vjp or a shard_map of the loss's own, or is its value unused? Register its outputs outside of that."
        )
    return found
