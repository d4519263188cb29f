"""Whether a call fits the layers that were found before: the same parameters, a Fisher that the loss can give."""

from __future__ import annotations

import math
from typing import Any

from kfe_optax._jax import varying_axes
from kfe_optax._layers.layers import Layers, same_layers
from kfe_optax._taps.plan import Fisher


def check_axes(parameters: Any, arrays: Any, axis_name: Any) -> None:
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


def check_tangents(layers: Layers) -> None:
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


def fitted(layers: Layers, found: Layers, fisher: Fisher) -> Layers:
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
