"""`find_layers`: which parameters form which layer, found by following them through one abstract trace of the loss.

Each parameter is followed to the marks and equations that use it as a layer does. That yields the parameters' key paths, the
batch shape, stacked axes, and whether the parameters are used more than once, through jit, remat, scan and vmap.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from kfe_optax._jax import static_values, varying_axes
from kfe_optax._jax.static_values import Static
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._layers.paths import Path, leaves_by_path, path_name
from kfe_optax._marks import marks
from kfe_optax._marks.registrations import Output
from kfe_optax._tracing import adapters, grouping, jaxprs, traced
from kfe_optax._tracing import counting as uses_lib
from kfe_optax._tracing.trails import OWN_DERIVATIVE


def find_layers(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    has_aux: bool = False,
    axis_name: Any = None,
    **kwargs: Any,
) -> Layers:
    """Finds the layers of a loss function, in one abstract evaluation; nothing is computed.

    Args:
      loss_fn: the function that is differentiated, `loss_fn(params, *args, **kwargs) -> loss`, or `(loss, aux)` with `has_aux`.
      params: an `nnx.Module`, or any tree of floating-point arrays.
      *args: as given to `loss_fn`; `jax.ShapeDtypeStruct`s will do. Python scalars, strings and None stay as they are.
      has_aux: as in `jax.value_and_grad`.
      axis_name: the axis, or a tuple of axes, that the loss itself names in a `psum`, a batch norm with `axis_name` and the like;
        outside `jax.pmap` and `jax.shard_map` it stands for a single device.
      **kwargs: as given to `loss_fn`.

    Returns:
      `Layers`: static, hashable, a mapping from name to `Layer`; printed, a table. `layers.rest` holds the key paths of the
      parameters outside every layer, `layers.reasons` why.

    Raises:
      TypeError: parameters that are no floating-point arrays; an argument that is neither arrays nor a value to compare.
      ValueError: the loss is no real scalar or does not depend on the parameters, the batch is empty, an axis of devices is not
        named in `axis_name`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
      >>> x, labels = jnp.ones((8, 5)), jnp.zeros(8, int)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x, labels):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> [(name, layer.shape) for name, layer in layers.items()]
      [('layers_0', (6, 4)), ('layers_2', (5, 3))]
    """
    parameters, given, rebuild, _ = adapters.partition(params, args, kwargs)
    arrays, static = static_values.split_call(given)
    axes = tuple((name, 1) for name in varying_axes.names(axis_name))
    return discover(loss_fn, has_aux, parameters, arrays, rebuild, static, axes=axes)


def discover(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    parameters: Any,
    arrays: list[Any],
    rebuild: adapters.Rebuild,
    static: Static,
    row_mask: Any = None,
    axes: tuple[tuple[Any, int], ...] = (),
) -> Layers:
    """`find_layers` on partitioned arguments (see `adapters.partition` and `static_values.split_static`)."""
    shapes = leaves_by_path(parameters)
    _check_parameters(shapes)
    with bound_axes():
        trace = traced.trace(
            loss_fn, rebuild, static, has_aux, parameters, arrays, row_mask, axes, alone=True
        )
    jaxpr = trace.program
    if not _depends(jaxpr, len(shapes)):
        raise ValueError(
            "The loss does not depend on the parameters, so that its gradient is zero: it must use what it is given as its first "
            "argument, and not behind jax.lax.stop_gradient alone."
        )
    trails = [jaxprs.Trail(path, tuple(range(len(leaf.shape)))) for path, leaf in shapes.items()]
    others = len(jaxpr.jaxpr.invars) - len(trails)
    walk = jaxprs.follow(jaxpr, [*trails, *[None] * others], row_mask is not None)
    uses = walk.uses
    outputs = _outputs(walk, trace.registered)
    # In a loop over single examples no output shows where they are.
    alone = any(output.looped and not output.batched for output in outputs)
    batches = set() if alone else {size for output in outputs for size in output.batches}
    layers, reasons = grouping.layers_of(walk, shapes, batches)
    _check_batch(layers)
    taken = {path for layer in layers for _, path in layer.paths}
    rest = tuple(path for path in shapes if path not in taken)
    unused = _unused(jaxpr, list(shapes))
    others = uses_lib.unseen(walk) | walk.others
    explained = tuple(_advised(_reason(path, reasons, unused, others)) for path in rest)
    outside = tuple(tuple(shapes[path].shape) for path in rest)
    unregistered = any(uses[i].info["mark"] is marks.layer_mark for i, _ in walk.live)
    return Layers(layers, rest, explained, outside, outputs, unregistered)


@contextlib.contextmanager
def bound_axes() -> Generator[None]:
    """Says what to do where an axis of devices is named that is not bound."""
    try:
        yield
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise ValueError(
            f"{str(error).split('.')[0]}. kfe.find_layers, which runs outside of jax.pmap and jax.shard_map, is told with "
            "axis_name= which axes the loss names; kfe.value_grad_and_taps must be called inside the pmap or shard_map that "
            "names its own."
        ) from error


def _check_parameters(leaves: dict[Path, Any]) -> None:
    for path, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jax.dtypes.issubdtype(dtype, np.inexact):
            raise TypeError(
                f"The parameters hold {path_name(path)!r} of type {dtype or type(leaf).__name__}, and only floating-point arrays "
                "have a gradient: pass everything else as another argument of the loss (of an Equinox module "
                "eqx.partition(module, eqx.is_inexact_array) takes the arrays apart)."
            )


def _check_batch(layers: tuple[Layer, ...]) -> None:
    for layer in layers:
        shapes = [use[0] for use in layer.uses]
        if shapes and all(0 in shape for shape in shapes):
            raise ValueError(f"The batch is empty: the input of layer {layer.name!r} has shape {shapes[0]}.")


def _depends(jaxpr: Any, count: int) -> bool:
    """Whether the loss is computed from one of the first `count` arguments, other than behind a stop_gradient."""
    wanted = [i == 0 for i in range(len(jaxpr.jaxpr.outvars))]
    return any(_needed(jaxpr.jaxpr, wanted)[:count])


def _needed(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    """Which inputs the wanted outputs are computed from; of a loop or a branch that is wanted, all."""
    needed = {id(v) for v, flag in zip(jaxpr.outvars, wanted, strict=True) if flag}
    for equation in reversed(jaxpr.eqns):
        flags = [id(v) in needed for v in equation.outvars]
        if equation.primitive.name == "stop_gradient" or not any(flags):
            continue
        # A jit, a remat or a function with a derivative of its own: its inner jaxpr has the same inputs and outputs.
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [j for j in inner if hasattr(j, "eqns") and len(j.outvars) == len(flags)]
        plain = equation.primitive.name not in ("scan", "while", "cond")
        if plain and len(inner) == 1 and len(inner[0].invars) == len(equation.invars):
            read = _needed(inner[0], flags)
        else:
            read = [True] * len(equation.invars)
        needed |= {id(v) for v, flag in zip(equation.invars, read, strict=True) if flag}
    return [id(v) in needed for v in jaxpr.invars]


def _outputs(walk: jaxprs.Walk, registered: list[Any]) -> tuple[Output, ...]:
    """The registered losses that the traced loss really reaches."""
    indices = uses_lib.outputs_of(walk)
    reached = [walk.uses[i] for i in sorted(indices)]
    times = collections.Counter(use.info["serial"] for use in reached)
    signs = collections.defaultdict(set)
    for i, sign in walk.live:
        if walk.uses[i].info["mark"] is marks.ELEMENTS:
            signs[walk.uses[i].info["serial"]].add(sign)
    found: dict[int, Output] = {}
    for use in reached:
        serial = use.info["serial"]
        spec, shape, unweighted = registered[serial]
        mapped = tuple(size for size, own in use.info["vmaps"] if own[0])
        looped = use.loops > 0
        places = tuple(other.place for other in reached if other.info["serial"] == serial)
        nested = bool(mapped) or looped or times[serial] > 1
        positive = unweighted or (signs[serial] == {1} and not spec.signed)
        found[serial] = Output(
            serial, spec, shape, mapped, nested, looped, signs[serial] == {-1}, positive, places
        )
    return tuple(found[serial] for serial in sorted(found))


def _unused(jaxpr: Any, paths: list[Path]) -> frozenset[Path]:
    read = {id(v) for e in jaxpr.jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.jaxpr.outvars}
    return frozenset(p for p, v in zip(paths, jaxpr.jaxpr.invars, strict=False) if id(v) not in read)


def _advised(reason: str) -> str:
    """A reason with what to do, where a derivative of its own hides a whole loss (an energy in variational Monte Carlo)."""
    if OWN_DERIVATIVE not in reason:
        return reason
    if "custom_jvp" in reason:
        return f"{reason}; around a whole loss, wrap it in kfe.losses.linearized or write the surrogate: see examples/helium.py"
    return f"{reason}; around a whole loss, write the surrogate: see examples/helium.py"


def _reason(
    path: Path,
    reasons: dict[Path, str],
    unused: frozenset[Path],
    others: dict[Path, str],
) -> str:
    if path in reasons:
        return reasons[path]
    if path in unused:
        return "the loss does not use it"
    return (
        f"no supported layer reads it ({others[path]})" if path in others else "no supported layer reads it"
    )
