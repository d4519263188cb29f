"""`find_layers`: which parameters form which layer, found by following data through one abstract trace of the loss.

A probe of each parameter's own shape is put beside it; supported layers bind a marker to the probe they find; one
`jax.make_jaxpr` of the loss, and each probe is followed to the markers that read it. That yields the parameters' key paths,
the batch shape, stacked axes, and whether the parameters are used more than once, through jit, remat, scan and vmap.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kfe_optax import adapters, jaxprs, masks, tags
from kfe_optax.adapters import nnx as nnx_adapter
from kfe_optax.layer import Layer, Path, leaves_by_path, path_name
from kfe_optax.layers import Layers
from kfe_optax.outputs import Output


def find_layers(
    loss_fn: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False, **kwargs: Any
) -> Layers:
    """Finds the layers of a loss function, in one abstract evaluation; nothing is computed.

    Args:
      loss_fn: the function that is differentiated, `loss_fn(params, *args, **kwargs) -> loss`, or `(loss, aux)` with `has_aux`.
      params: a Linen parameter tree (of one model or of several in one tree), an `nnx.Module`, or a tree of dicts, lists and
        tuples when `loss_fn` is plain JAX with `kfe.tag_dense`.
      *args: as given to `loss_fn`; `jax.ShapeDtypeStruct`s will do. Python scalars, strings and None stay as they are.
      has_aux: as in `jax.value_and_grad`.
      **kwargs: as given to `loss_fn`.

    Returns:
      `Layers`: static, hashable, a mapping from name to `Layer`; printed, a table. `layers.rest` holds the key paths of the
      parameters outside every layer, `layers.reasons` why.

    Raises:
      ValueError: the loss breaks on the riders in its parameter tree (use `kfe.plain`), or differentiates a tagged layer
        itself.

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
    parameters, other, rebuild = adapters.partition(params)
    arrays, static = split_static((other, args, kwargs))
    classes = nnx_adapter.class_names(params) if nnx_adapter.is_module(params) else {}
    return discover(loss_fn, has_aux, parameters, arrays, rebuild, static, classes)


def discover(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    parameters: Any,
    arrays: list[Any],
    rebuild: Callable[..., Any],
    static: Static,
    classes: dict[Path, str],
) -> Layers:
    """`find_layers` on partitioned arguments (see `adapters.partition` and `split_static`)."""
    shapes = leaves_by_path(parameters)
    names = [
        (parent, name)
        for parent, own in adapters.slots(rebuild(parameters, static(arrays)[0], {})).items()
        for name in own
        if jaxprs.float_leaf(shapes.get((*parent, name)))
    ]
    probes = [
        jax.ShapeDtypeStruct(shapes[(*parent, name)].shape, shapes[(*parent, name)].dtype)
        for parent, name in names
    ]

    def traced(parameters, arrays, probes, kept):
        other, args, kwargs = static(arrays)
        boxes: dict[Path, dict[str, Any]] = {}
        for (parent, name), probe in zip(names, probes, strict=True):
            if parent in kept:
                boxes.setdefault(parent, {})[name] = probe
        loss = loss_fn(rebuild(parameters, other, boxes), *args, **kwargs)
        return loss[0] if has_aux else loss

    def trace(kept):
        listener = _Discovery()
        with tags.listening(listener), adapters.intercepting():
            jaxpr = jax.make_jaxpr(functools.partial(traced, kept=kept))(parameters, arrays, probes)
        return listener, jaxpr

    kept = {parent for parent, _ in names}
    try:
        listener, jaxpr = trace(kept)
    except jaxprs.InnerDerivativeError:
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

    # The parameters themselves are followed as well: a kernel that was replaced beside its probe must not pass for itself.
    own = [_trail(path, leaf) for path, leaf in shapes.items()]
    trails = [_trail((*parent, name), probe) for (parent, name), probe in zip(names, probes, strict=True)]
    between = len(jaxpr.jaxpr.invars) - len(own) - len(trails)
    walk = jaxprs.follow(jaxpr, [*own, *[None] * between, *trails])
    uses = walk.uses
    layers, reasons = _build(walk, shapes)
    for parent, name in names:
        if parent not in kept:
            reasons[(*parent, name)] = "changed before the layer uses it (by a wrapper that takes no rider)"
    taken = {path for layer in layers for _, path in layer.paths}
    rest = tuple(path for path in shapes if path not in taken)
    unused = _unused(jaxpr, list(shapes))
    explained = tuple(_reason(path, reasons, unused, classes) for path in rest)
    sizes = tuple(int(np.prod(shapes[path].shape)) for path in rest)
    return Layers(layers, rest, explained, sizes, listener.outputs(uses))


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
        self._outputs: list[tuple[Any, tuple[int, ...]]] = []

    def tag(self, kind, roles, x, y, parameters, box, label):
        probe = box.get(roles[0][1])
        if probe is None:
            self.unsupported(f"the {roles[0][1]} beside it is not among the parameters", box)
            return y
        shapes = (x.shape, y.shape, np.dtype(x.dtype).name, np.dtype(y.dtype).name, label)
        masked = masks.active()
        return jaxprs.layer_mark.bind(
            y, probe, x, *parameters, kind=kind, roles=roles, shapes=shapes, masked=masked, vmaps=()
        )

    def unsupported(self, reason, box):
        for probe in box.values():
            jaxprs.unsupported_mark.bind(probe, reason=reason, vmaps=())

    def output(self, spec, z, args):
        serial = len(self._outputs)
        self._outputs.append((spec, z.shape))
        z = jaxprs.output_mark.bind(z, serial=serial, vmaps=())
        return z if spec.loss is None else spec.loss(z, *args)

    def outputs(self, uses: list[jaxprs.Use]) -> tuple[Output, ...]:
        """The registered losses that the traced loss really reaches."""
        marks = [use for use in uses if use.info["mark"] is jaxprs.output_mark]
        times = collections.Counter(use.info["serial"] for use in marks)
        found: dict[int, Output] = {}
        for use in marks:
            serial = use.info["serial"]
            spec, shape = self._outputs[serial]
            mapped = tuple(size for size, (is_mapped,) in use.info["vmaps"] if is_mapped)
            looped = use.loops > 0
            nested = bool(mapped) or looped or times[serial] > 1
            found[serial] = Output(serial, spec, shape, mapped, nested, looped)
        return tuple(found[serial] for serial in sorted(found))


@dataclasses.dataclass(frozen=True)
class Static:
    """The Python values among a function's arguments, hashable; called with the arrays it gives the arguments back."""

    structure: Any
    values: tuple[Any, ...]

    def __call__(self, arrays: list[Any]) -> Any:
        source = iter(arrays)
        leaves = [next(source) if value is _ARRAY else value for value in self.values]
        return jax.tree.unflatten(self.structure, leaves)


_ARRAY = object()


def split_static(tree: Any) -> tuple[list[Any], Static]:
    """Separates the arrays of a tree from everything that must stay a Python value (flags, names, counts)."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    values = tuple(_ARRAY if a else leaf for a, leaf in zip(is_array, leaves, strict=True))
    return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], Static(structure, values)


def _unused(jaxpr: Any, paths: list[Path]) -> frozenset[Path]:
    read = {id(v) for e in jaxpr.jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.jaxpr.outvars}
    return frozenset(p for p, v in zip(paths, jaxpr.jaxpr.invars, strict=False) if id(v) not in read)


def _build(walk: jaxprs.Walk, shapes: dict[Path, Any]) -> tuple[tuple[Layer, ...], dict[Path, str]]:
    """Groups the uses by parameter into layers; the reason for every parameter that a tag or module saw in vain."""
    uses = walk.uses
    reasons: dict[Path, str] = {}
    by_path: dict[Path, list[jaxprs.Use]] = {}
    for use in uses:
        if use.trail is None:
            continue
        if use.info["mark"] is jaxprs.unsupported_mark:
            reasons.setdefault(use.trail.path, use.info["reason"])
        elif use.info["mark"] is jaxprs.layer_mark:
            by_path.setdefault(use.trail.path, []).append(use)
    # A loss inside the loop sees other examples in each iteration.
    looped = any(use.info["mark"] is jaxprs.output_mark and use.loops for use in uses)
    parents = collections.Counter(path[:-1] for path in by_path)
    layers = []
    for path, group in by_path.items():
        single = not any(map(_spread, group)) and not (looped and any(use.loops for use in group))
        trouble = next(filter(None, map(_trouble, group)), None) or _disagreement(group)
        if walk.products[path] > len(group):
            trouble = trouble or "also used outside its layer, where no tag sees it"
        if group[0].info["kind"].per_example:
            trouble = trouble or _unknown_examples(group, single)
        paths = tuple((role, (*path[:-1], name)) for role, name in group[0].info["roles"])
        absent = [p for _, p in paths if p not in shapes]
        if absent:
            trouble = f"{path_name(absent[0])} is not among the parameters"
        if trouble:
            reasons.update({p: trouble for _, p in paths})
        else:
            name = path_name(path if parents[path[:-1]] > 1 else path[:-1]) or path_name(path)
            size = sum(int(np.prod(shapes[p].shape)) for _, p in paths)
            layer = _layer(name, paths, group, len(layers), shapes[path])
            layers.append(dataclasses.replace(layer, size=size, per_example=layer.per_example and single))
    return tuple(layers), reasons


def _inner_rank(use: jaxprs.Use) -> int:
    trail = use.trail
    assert trail is not None
    return len(trail.dims) - sum(mapped[1] for _, mapped in use.info["vmaps"])


def _trouble(use: jaxprs.Use) -> str | None:
    trail = use.trail
    assert trail is not None
    if trail.lost:
        return f"changed before the layer uses it ({trail.lost})"
    if trail.stopped:
        return "frozen by stop_gradient"
    stack = _stack(use)
    for i, ((_, name), own) in enumerate(zip(use.info["roles"], use.parameters, strict=True)):
        # The bias, too: preconditioning would move what the gradient leaves alone.
        which = "" if name == trail.path[-1] else f"its {name} is "
        if own is None or own.lost or own.path != (*trail.path[:-1], name):
            how = own.lost if own is not None and own.lost else "replaced"
            return f"{which}changed before the layer uses it ({how})"
        if own.stopped:
            return f"{which}frozen by stop_gradient"
        mapped = sum(flags[i + 3] for _, flags in use.info["vmaps"])
        axes = (*(axis for axis, _ in own.stack), *own.dims[:mapped])
        rank = len(own.dims) + len(own.stack)
        if axes != tuple(min(axis, rank - 1) for axis, _ in stack):
            return "stacked along other axes than the layer's other parameters"
    inner = trail.dims[len(trail.dims) - _inner_rank(use) :]
    if inner != tuple(sorted(inner)):
        return "transposed before the layer uses it"
    return None


def _unknown_examples(group: list[jaxprs.Use], single: bool) -> str | None:
    """Why a kind that keeps a row an example cannot do so."""
    if not single:
        return "applied to single examples or parts of the batch (vmap, map): its examples are not known"
    kind = group[0].info["kind"]
    if len({kind.free(x, y)[0] for x, y, *_ in (use.info["shapes"] for use in group)}) > 1:
        return "applied to batches of different sizes: its examples are not known"
    return None


def _disagreement(group: list[jaxprs.Use]) -> str | None:
    if len({(use.info["kind"], use.info["roles"], _stack(use)) for use in group}) > 1:
        return "used by layers of different kinds"
    return None


def _stack(use: jaxprs.Use) -> tuple[tuple[int, int], ...]:
    """((axis of the kernel, size), ...) of the stacked axes, outermost first."""
    trail = use.trail
    assert trail is not None
    mapped = [size for size, is_mapped in reversed(use.info["vmaps"]) if is_mapped[1]]
    return (*trail.stack, *zip(trail.dims, mapped, strict=False))


def _layer(name: str, paths: Any, group: list[jaxprs.Use], order: int, kernel: Any) -> Layer:
    first = group[0]
    kind = first.info["kind"]
    stack = _stack(first)
    kernel_shape = tuple(s for i, s in enumerate(kernel.shape) if i not in {axis for axis, _ in stack})
    spread = _spread(first)
    trail = first.trail
    assert trail is not None
    uses = tuple(use.info["shapes"] for use in group)
    free = [kind.free(x, y) for x, y, *_ in uses]
    shared = len(group) > 1 or bool(spread) or trail.broadcast
    return Layer(
        name=name,
        kind=kind,
        paths=paths,
        kernel_shape=kernel_shape,
        stack_axes=tuple(axis for axis, _ in stack),
        stacked=tuple(size for _, size in stack),
        shared=shared,
        order=order,
        dtype=np.dtype(kernel.dtype).name,
        uses=uses,
        examples=int(np.prod([size for size, _ in spread], initial=1)) if spread else free[0][0],
        positions=int(np.prod(free[0][1:], initial=1)),
        per_example=len({f[0] for f in free}) == 1,
        in_loop=any(use.trail is not None and use.trail.broadcast for use in group),
        masked=any(use.info["masked"] for use in group),
        spread=bool(spread),
        constant=all(use.constant for use in group),
    )


def _spread(use: jaxprs.Use) -> list[Any]:
    """The vmaps that map the layer's data but not its parameters: around one example, they broadcast the parameters."""
    return [m for m in use.info["vmaps"] if not m[1][1]]


def _reason(path: Path, reasons: dict[Path, str], unused: frozenset[Path], classes: dict[Path, str]) -> str:
    if path in reasons:
        return reasons[path]
    if path in unused:
        return "the loss does not use it"
    if path[:-1] in classes:
        return f"{classes[path[:-1]]} has no curvature block"
    return "no supported layer reads it"


def same_layers(expected: Layers, found: Layers) -> str | None:
    """What differs between the layers an optimizer was built for and those of the present call; None when nothing does."""
    for name in expected:
        if name not in found:
            return f"layer {name!r} is gone"
        if expected[name] != found[name]:
            fields = [
                f.name
                for f in dataclasses.fields(Layer)
                if f.compare and getattr(expected[name], f.name) != getattr(found[name], f.name)
            ]
            old, new = (
                ", ".join(f"{f}={getattr(layers[name], f)}" for f in fields) for layers in (expected, found)
            )
            return f"layer {name!r} was found with {old} and now has {new}"
    extra = [name for name in found if name not in expected]
    if extra:
        return f"layer {extra[0]!r} is new"
    if set(expected.rest) != set(found.rest):
        changed = set(expected.rest) ^ set(found.rest)
        return f"the parameters outside the layers differ ({', '.join(map(path_name, sorted(changed, key=str)))})"
    return None
