"""What a transformation's `init` and `update` are given, checked: parameters, gradients, taps, a state."""

from __future__ import annotations

import glob
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers, same_layers
from kfe_optax._layers.paths import Path, leaves_by_path, path_name
from kfe_optax._taps.taps import Taps


def leaves_at_start(layers: Layers, params: Any) -> dict[Path, Any]:
    """{key path: leaf} of what `init` is given: parameters, their shapes alone, or what stands for them all."""
    if type(params).__name__ == "_ParamsPlaceholder":
        # `optax.tree_map_params` asks what of the state has the structure of the parameters: nothing of a layerwise state.
        return {
            path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in layers.leaf_shapes().items()
        }
    return leaves_by_path(params)


def present_layers(layers: Layers, leaves: dict[Path, jax.Array]) -> list[Layer]:
    """The layers whose parameters are in the tree; a layer is there as a whole or masked as a whole."""
    present = []
    known = set(layers.rest)
    for layer in layers.values():
        paths = [path for _, path in layer.paths]
        known.update(paths)
        there = [path for path in paths if path in leaves]
        if there and len(there) < len(paths):
            gone = next(path for path in paths if path not in leaves)
            raise ValueError(
                f"Layer {layer.name!r} is only partly there: {path_name(gone)} is masked out and {path_name(there[0])} is not. A "
                "layer's kernel and bias are preconditioned together; mask both or neither."
            )
        if there:
            shape = _matrix_shape(layer, {role: leaves[path] for role, path in layer.paths})
            if shape != layer.shape:
                raise ValueError(
                    f"Layer {layer.name!r} was found with a matrix of shape {layer.shape}, but the tree holds one of shape "
                    f"{shape}; call kfe.find_layers again after changing the model."
                )
            present.append(layer)
    unknown = [path for path in leaves if path not in known]
    if unknown:
        raise ValueError(
            f"The parameter tree holds {path_name(unknown[0])}, which find_layers did not see; call kfe.find_layers again after "
            "changing the model, and give the optimizer the tree that the loss takes."
        )
    if not present:
        raise ValueError(
            "None of the layers' parameters is in the tree: the optimizer was given another tree (a subtree, a wrapped one) than "
            "find_layers saw."
        )
    return present


def _matrix_shape(layer: Layer, leaves: dict[str, Any]) -> tuple[int, ...]:
    plain = {role: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for role, leaf in leaves.items()}
    return jax.eval_shape(layer.gather, plain).shape


def check_method_state(method: Any, present: list[Layer], state: Any) -> None:
    """Raises ValueError for the state of other layers, or of the same method with other options."""
    if isinstance(getattr(method, "max_dim", None), core.Tracer):
        return  # the shapes are not known
    leaves = [
        {
            jax.tree_util.keystr(path): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (jax.eval_shape(lambda: method.init(present)), state)
    ]
    expected, found = leaves
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"The optimizer state is that of another model, or of other options: at {name} there is "
                f"{_shape(found, name)} where this optimizer has {_shape(expected, name)}. Give update what tx.init, or the "
                "last tx.update, of the same optimizer returned."
            )


def _shape(leaves: dict[str, tuple[int, ...]], name: str) -> str:
    return f"an array of shape {leaves[name]}" if name in leaves else "nothing"


def reasons(layers: Layers, most: int = 5) -> str:
    """Why the parameters are in no layer."""
    pairs = zip(layers.rest, layers.reasons, strict=True)
    found = [f"{path_name(path) or 'the parameters'} ({why})" for path, why in pairs]
    more = f" and {len(found) - most} more, which print(layers) lists" if len(found) > most else ""
    return ", ".join(found[:most]) + more if found else "it has no parameters"


def check_taps(layers: Layers, taps: Any) -> None:
    """Raises unless the taps are those of these layers, or of more: a method may leave some to the rest."""
    if taps is None:
        raise ValueError(
            "This transformation needs the taps of the step: call tx.update(grads, opt_state, params, taps=taps) with what "
            "kfe.value_grad_and_taps returned. For flax's TrainState use kfe.TrainState, for nnx.Optimizer pass taps=taps to "
            "its update."
        )
    if not isinstance(taps, Taps):
        raise TypeError(f"taps must be what kfe.value_grad_and_taps returns, not a {type(taps).__name__}.")
    more = [glob.escape(name) for name in taps.layers if name not in layers]
    difference = same_layers(layers, taps.layers.without(*more))
    if difference:
        raise ValueError(
            f"The taps are not those of the layers that the optimizer was built for: {difference}. Give value_grad_and_taps and "
            "the optimizer the same layers, or the optimizer layers.without(...) of them."
        )
