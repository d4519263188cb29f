"""One forward pass of a loss with tags and riders, and where among its residuals stands what the Fisher's pull swaps."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax import adapters, checks, explicit, masks, outputs, tags, varying
from kfe_optax.layer import Layer
from kfe_optax.layers import Layers

# The name of a part of a layer's rider in its slot, which the layers of one module share.
_RIDER = re.compile(r"rider(\d+)_(\w+)")


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Which of the pull's leaves are swapped, for each registered loss, and the pull's tree structure."""

    structure: Any
    modes: tuple[tuple[int, ...], ...]
    seeds: tuple[tuple[int, ...], ...]
    cotangents: tuple[tuple[int, ...], ...]  # for products with J, where the quadratic model is asked for
    shardings: Any  # of the leaves and the cotangent, where types have them
    start: float  # of the Fisher's pull, see `outputs.Place`


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
    place: outputs.Place
    tangents: bool

    def loss(self, parameters: Any, arrays: Any) -> jax.Array:
        """The loss at these parameters, without taps; mutable state moves on in a copy."""
        return self._run(self.rebuild(parameters, self.static(arrays), {}))[0]

    def _run(self, call: adapters.Call) -> tuple[jax.Array, Any]:
        loss_fn = self.reference()
        if loss_fn is None:
            raise ReferenceError(
                "The loss function of these taps is gone: keep a reference to it as long as to the taps."
            )
        found = loss_fn(call.params, *call.args, **call.kwargs)
        return checks.loss(found, self.has_aux)

    def __call__(self, parameters: Any, arrays: Any, row_mask: Any, loss_scale: Any) -> Pass:
        """The pass: the residuals know gradients and statistics."""
        # Where types tell devices apart, all is local, as it is under pmap: who wants sums over devices takes them.
        axes = varying.named(self.place.axis_name)
        parameters = varying.over(axes, parameters)
        place = self.place._replace(axes=axes | varying.axes_of((parameters, arrays)))
        registered = {output.serial: output for output in self.layers.outputs}
        zeros = varying.over(
            place.axes, outputs.control_zeros(registered.values(), self.tangents, loss_scale)
        )
        controls = dict(zip(registered, zeros, strict=True))
        riders = {
            "layers": [self._rider(layer, arrays) for layer in self.layers.values()],
            "outputs": [control.rider for control in controls.values()],
        }

        def run(parameters, riders):
            live = {
                serial: controls[serial]._replace(rider=rider)
                for serial, rider in zip(controls, riders["outputs"], strict=True)
            }
            call = self.rebuild(parameters, self.static(arrays), self._boxes(riders["layers"]))
            collection = _Collection(self.layers, registered, live, place, axes)
            with tags.listening(collection), adapters.intercepting(), masks.row_mask(row_mask):
                loss, aux = self._run(call)
            if any(output.spec.loss is not None for output in registered.values()):
                _check_range(loss, place)
            return loss, (aux, call.state())

        loss, pull, (aux, state) = jax.vjp(run, parameters, varying.over(place.axes, riders), has_aux=True)
        leaves, structure = jax.tree.flatten(pull)
        # A loss that was averaged over the devices inside is one loss on all of them, and its cotangent is divided among
        # them where types say so; under pmap it counts once a device.
        devices = jax.lax.psum(1, tuple(axes - varying.axes_of(loss))) if axes else 1
        cotangent = jnp.ones_like(loss) * jnp.asarray(devices, loss.dtype)
        swaps = Swaps(
            structure,
            tuple(_find(leaves, control.mode) for control in controls.values()),
            tuple(_find(leaves, control.seed) for control in controls.values()),
            tuple(_find(leaves, control.cotangent) for control in controls.values()) if self.tangents else (),
            explicit.shardings((leaves, cotangent)),
            place.start,
        )
        return Pass(loss, aux, state, leaves, cotangent, swaps)

    def _rider(self, layer: Layer, arrays: Any) -> dict[str, jax.Array]:
        """Zeros for the statistics; those that have the batch's axis are divided over devices as it is."""
        mesh = explicit.mesh_of(arrays)
        examples = {layer.examples, *(output.examples for output in self.layers.outputs)}
        names = None if mesh is None else explicit.batch_axes(arrays, examples)
        rider = {name: jnp.zeros(s.shape, s.dtype) for name, s in layer.rider_shapes().items()}
        if names is None:
            return rider
        for name, value in rider.items():
            axis = layer.examples_axis(name)
            if axis is not None:
                rider[name] = explicit.divided(value, mesh, axis, names)
        return rider

    def _boxes(self, riders: list[dict[str, jax.Array]]) -> dict[Any, dict[str, Any]]:
        boxes: dict[Any, dict[str, Any]] = {}
        for layer, rider in zip(self.layers.values(), riders, strict=True):
            slot = boxes.setdefault(layer.paths[0][1][:-1], {})
            slot.update({f"rider{layer.order}_{part}": value for part, value in rider.items()})
        return boxes


class _Collection:
    """Puts the tags on (see `tags.Listener`)."""

    def __init__(
        self,
        layers: Layers,
        registered: dict[int, outputs.Output],
        controls: dict[int, Any],
        place: outputs.Place,
        axes: varying.Axes,
    ):
        self._layers = list(layers.values())
        self._registered = registered
        self._controls = controls
        self._place = place
        self._axes = axes
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
        # What is the same on all devices (an average over them, say) is drawn from on each of them.
        z, args = varying.over(self._axes, (z, args))
        if spec.loss is None:
            return outputs.tagged_output(output, self._place, z, args[0], control)
        losses = outputs.tagged_loss(output, self._place, z, args, control)
        _check_range(losses, self._place)
        return losses


def _check_range(losses: Any, place: outputs.Place) -> None:
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
            "The registered loss could not be reached from the gradient: its residuals hold no mode. Does the loss pass through "
            "a custom_vjp of its own, or is its value unused? Register its outputs outside, or use fisher='empirical'."
        )
    return found
