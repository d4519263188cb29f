"""`find_layers`: which parameters form which layer, found by following data through one abstract trace of the loss.

A probe of each parameter's own shape is put beside it; supported layers bind a marker to the probe they find; one
`jax.make_jaxpr` of the loss, and each probe is followed to the markers that read it. That yields the parameters' key paths,
the batch shape, stacked axes, and whether the parameters are used more than once, through jit, remat, scan and vmap.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from kfe_optax import adapters, checks, grouping, jaxprs, marks, masks, static_values, tags, varying
from kfe_optax.adapters import nnx as nnx_adapter
from kfe_optax.layer import Layer, Path, leaves_by_path, path_name
from kfe_optax.layers import Layers
from kfe_optax.outputs import Output
from kfe_optax.static_values import Static


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
      params: a Linen parameter tree (of one model or of several in one tree), an `nnx.Module`, or a tree of dicts, lists and
        tuples when `loss_fn` is plain JAX with `kfe.tag_dense`.
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
        named in `axis_name`; the loss breaks on the riders in its parameter tree (use `kfe.plain`), or differentiates a tagged
        layer itself.

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
    classes = nnx_adapter.class_names(params) if nnx_adapter.is_module(params) else {}
    axes = tuple((name, 1) for name in varying.names(axis_name))
    return discover(loss_fn, has_aux, parameters, arrays, rebuild, static, classes, axes)


def discover(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    parameters: Any,
    arrays: list[Any],
    rebuild: Callable[..., Any],
    static: Static,
    classes: dict[Path, str],
    axes: tuple[tuple[Any, int], ...] = (),
) -> Layers:
    """`find_layers` on partitioned arguments (see `adapters.partition` and `static_values.split_static`)."""
    shapes = leaves_by_path(parameters)
    _check_parameters(shapes)
    names = [
        (parent, name)
        for parent, own in adapters.slots(rebuild(parameters, static(arrays), {}).params).items()
        for name in own
        if jaxprs.float_leaf(shapes.get((*parent, name)))
    ]
    probes = [
        jax.ShapeDtypeStruct(shapes[(*parent, name)].shape, shapes[(*parent, name)].dtype)
        for parent, name in names
    ]

    def traced(parameters, arrays, probes, kept):
        boxes: dict[Path, dict[str, Any]] = {}
        for (parent, name), probe in zip(names, probes, strict=True):
            if parent in kept:
                boxes.setdefault(parent, {})[name] = probe
        call = rebuild(parameters, static(arrays), boxes)
        loss = loss_fn(call.params, *call.args, **call.kwargs)
        return checks.loss(loss, has_aux)[0]

    def trace(kept):
        listener = _Discovery()
        with tags.listening(listener), adapters.intercepting(), bound_axes():
            function = functools.partial(traced, kept=kept)
            jaxpr = jax.make_jaxpr(function, axis_env=axes)(parameters, arrays, probes)
        return listener, jaxpr

    kept = {parent for parent, _ in names}
    try:
        listener, jaxpr = trace(kept)
    except marks.InnerDerivativeError:
        raise
    except Exception as error:
        # Was it the riders? Without them the user's own error comes through as it is.
        trace(set())
        kept = {parent for parent in kept if _runs(trace, {parent})}
        if not kept:
            raise ValueError(
                "The loss function runs on the parameters, but breaks when riders stand beside the layers' kernels (under the "
                f"name {tags.SLOT!r}): it probably walks the parameter tree itself. Let it read kfe.plain(params) there. "
                f"It said: {type(error).__name__}: {error}"
            ) from error
        # A wrapper around some layers walks their parameters (weight normalization does): those layers take no riders.
        listener, jaxpr = trace(kept)

    if not _depends(jaxpr, len(shapes)):
        raise ValueError(
            "The loss does not depend on the parameters, so that its gradient is zero: it must use what it is given as its first "
            "argument, and not behind jax.lax.stop_gradient alone."
        )
    # The parameters themselves are followed as well: a kernel that was replaced beside its probe must not pass for itself.
    own = [_trail(path, leaf) for path, leaf in shapes.items()]
    trails = [_trail((*parent, name), probe) for (parent, name), probe in zip(names, probes, strict=True)]
    between = len(jaxpr.jaxpr.invars) - len(own) - len(trails)
    walk = jaxprs.follow(jaxpr, [*own, *[None] * between, *trails])
    uses = walk.uses
    outputs = listener.outputs(walk)
    # In a loop over single examples no output shows where they are.
    alone = any(output.looped and not output.batched for output in outputs)
    batches = set() if alone else {size for output in outputs for size in output.batches}
    layers, reasons = grouping.layers_of(walk, shapes, batches)
    _check_batch(layers)
    for parent, name in names:
        if parent not in kept:
            reasons[(*parent, name)] = "changed before the layer uses it (by a wrapper that takes no rider)"
    taken = {path for layer in layers for _, path in layer.paths}
    rest = tuple(path for path in shapes if path not in taken)
    unused = _unused(jaxpr, list(shapes))
    explained = tuple(_reason(path, reasons, unused, classes) for path in rest)
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
                "have a gradient: pass everything else as another argument of the loss."
            )


def _check_batch(layers: tuple[Layer, ...]) -> None:
    for layer in layers:
        shapes = [use[0] for use in layer.uses]
        if shapes and all(0 in shape for shape in shapes):
            raise ValueError(f"The batch is empty: the input of layer {layer.name!r} has shape {shapes[0]}.")


def _depends(jaxpr: Any, count: int) -> bool:
    """Whether the loss is computed from one of the first `count` arguments, other than behind a stop_gradient."""
    return any(_needed(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[:count])


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


def _runs(trace: Callable[[set[Path]], Any], kept: set[Path]) -> bool:
    try:
        trace(kept)
    except Exception:
        return False
    return True


def _trail(path: Path, leaf: Any) -> jaxprs.Trail:
    return jaxprs.Trail(path, tuple(range(len(leaf.shape))))


class _Discovery:
    """Binds markers to the probes (see `tags.Listener`)."""

    def __init__(self):
        self._outputs: list[tuple[Any, tuple[int, ...], bool]] = []

    def tag(self, kind, roles, x, y, parameters, box, label):
        probe = box.get(roles[0][1])
        if probe is None:
            self.unsupported(f"the {roles[0][1]} beside it is not among the parameters", box)
            return y
        shapes = (x.shape, y.shape, np.dtype(x.dtype).name, np.dtype(y.dtype).name, label)
        masked = masks.active()
        return marks.layer_mark.bind(
            y, probe, x, *parameters, kind=kind, roles=roles, shapes=shapes, masked=masked, vmaps=()
        )

    def unsupported(self, reason, box):
        for probe in box.values():
            marks.unsupported_mark.bind(probe, reason=reason, vmaps=())

    def output(self, spec, z, args):
        serial = len(self._outputs)
        # `register_output` has weights of its own, 1/n where it is given none.
        self._outputs.append((spec, z.shape, spec.loss is None and args[0] is None))
        z = marks.output_mark.bind(z, serial=serial, vmaps=())
        if spec.loss is None:
            return z
        return marks.elements_mark.bind(spec.loss(z, *args), serial=serial, vmaps=())

    def outputs(self, walk: jaxprs.Walk) -> tuple[Output, ...]:
        """The registered losses that the traced loss really reaches."""
        reached = [walk.uses[i] for i in grouping.outputs_of(walk)]
        times = collections.Counter(use.info["serial"] for use in reached)
        signs = collections.defaultdict(set)
        for i, sign in walk.live:
            if walk.uses[i].info["mark"] is marks.elements_mark:
                signs[walk.uses[i].info["serial"]].add(sign)
        found: dict[int, Output] = {}
        for use in reached:
            serial = use.info["serial"]
            spec, shape, unweighted = self._outputs[serial]
            mapped = tuple(size for size, (is_mapped,) in use.info["vmaps"] if is_mapped)
            looped = use.loops > 0
            nested = bool(mapped) or looped or times[serial] > 1
            positive = unweighted or (signs[serial] == {1} and not spec.signed)
            found[serial] = Output(
                serial, spec, shape, mapped, nested, looped, signs[serial] == {-1}, positive
            )
        return tuple(found[serial] for serial in sorted(found))


def _unused(jaxpr: Any, paths: list[Path]) -> frozenset[Path]:
    read = {id(v) for e in jaxpr.jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.jaxpr.outvars}
    return frozenset(p for p, v in zip(paths, jaxpr.jaxpr.invars, strict=False) if id(v) not in read)


def _reason(path: Path, reasons: dict[Path, str], unused: frozenset[Path], classes: dict[Path, str]) -> str:
    if path in reasons:
        return reasons[path]
    if path in unused:
        return "the loss does not use it"
    if path[:-1] in classes:
        return f"{classes[path[:-1]]} has no curvature block"
    return "no supported layer reads it"
