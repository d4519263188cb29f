"""From the tags that were met to layers: uses grouped by parameter, or the reason why they form no layer."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from kfe_optax import jaxprs, marks
from kfe_optax.flow import SAME, End, Flow, Source
from kfe_optax.layer import Layer, Path, path_name
from kfe_optax.origins import Origins


def layers_of(
    walk: jaxprs.Walk, shapes: dict[Path, Any], batches: set[int]
) -> tuple[tuple[Layer, ...], dict[Path, str]]:
    """Groups the uses by parameter into layers; the reason for every parameter that a tag or module saw in vain.

    `batches` are the sizes that the batch may have by the registered losses.
    """
    uses = walk.uses
    reasons: dict[Path, str] = {}
    by_path: dict[Path, list[jaxprs.Use]] = {}
    places: dict[Path, set[int]] = collections.defaultdict(set)
    for i, use in enumerate(uses):
        if use.trail is None:
            continue
        if use.info["mark"] is marks.unsupported_mark:
            reasons.setdefault(use.trail.path, use.info["reason"])
        elif use.info["mark"] is marks.layer_mark:
            by_path.setdefault(use.trail.path, []).append(use)
            places[use.trail.path].add(i)
    # A loss inside the loop sees other examples in each iteration.
    registered = outputs_of(walk)
    looped = any(uses[i].loops for i in registered)
    # The first axis of an output is the batch, flattened with others or not, and so may be those of vmaps around it.
    sources = {
        label.source: label.size
        for i in registered
        for label in uses[i].batch
        if label.axis <= sum(is_mapped for _, (is_mapped,) in uses[i].info["vmaps"])
    }
    predicting = frozenset().union(*(walk.behind(uses[i].live) for i in registered))
    parents = collections.Counter(path[:-1] for path in by_path)
    layers, names = [], {}
    for path, group in by_path.items():
        single = not any(map(_spread, group)) and not (looped and any(use.loops for use in group))
        trouble = next(filter(None, map(_trouble, group)), None) or _disagreement(group)
        if walk.products[path] > len(group):
            trouble = trouble or "also used outside its layer, where no tag sees it"
        shown = 1 if batches == {1} else _shown(group, sources)
        if group[0].info["kind"].per_example:
            trouble = trouble or _unknown_examples(group, single, batches, shown)
        paths = tuple((role, (*path[:-1], name)) for role, name in group[0].info["roles"])
        dtypes = {np.dtype(shapes[path].dtype).name, *(t for use in group for t in use.info["shapes"][2:4])}
        if any(dtype.startswith("complex") for dtype in dtypes):
            trouble = trouble or "its numbers are complex, and factors are those of real ones"
        if registered and not places[path] & predicting:
            trouble = trouble or "no registered loss depends on it"
        absent = [p for _, p in paths if p not in shapes]
        if absent:
            trouble = f"{path_name(absent[0])} is not among the parameters"
        if trouble:
            reasons.update({p: trouble for _, p in paths})
        else:
            name = path_name(path if parents[path[:-1]] > 1 else path[:-1]) or path_name(path)
            size = sum(int(np.prod(shapes[p].shape)) for _, p in paths)
            names[path] = name
            layer = _layer(name, paths, group, len(layers), shapes[path])
            layer = dataclasses.replace(layer, size=size, per_example=layer.per_example and single)
            if batches:
                fixed = shown is None and all(use.fixed for use in group)
                layer = dataclasses.replace(layer, constant=layer.constant or fixed)
                layer = _settled(layer, shown, max(sources.values(), default=max(batches)))
            layers.append(layer)
    flows = _flows(walk, names)
    return tuple(dataclasses.replace(layer, flow=flows[layer.name]) for layer in layers), reasons


def outputs_of(walk: jaxprs.Walk) -> frozenset[int]:
    """The uses that are registered losses on which the loss's derivative depends."""
    return frozenset(i for i in walk.behind(walk.live) if walk.uses[i].info["mark"] is marks.output_mark)


def _flows(walk: jaxprs.Walk, names: dict[Path, str]) -> dict[str, Flow]:
    """{layer: what feeds it}; a tagged use that forms no layer is an operation like any other."""
    uses = walk.uses

    def key(i: int) -> Any:
        trail = uses[i].trail
        return i if trail is None else names.get(trail.path, i)

    def sources(origins: Origins) -> list[Source]:
        return [Source(End.DATA, SAME) if o.use < 0 else Source(key(o.use), o.when) for o in sorted(origins)]

    loss = tuple(source for source in sources(walk.loss) if source.layer is not End.DATA)
    flows: dict[Any, Flow] = {}
    for i, use in enumerate(uses):
        if use.info["mark"] is not marks.layer_mark:
            continue
        before = flows.get(key(i), Flow())
        first, later = (
            tuple(dict.fromkeys([*known, *sources(origins)]))
            for known, origins in ((before.first, use.first), (before.later, use.later))
        )
        single = len(_stack(use)) == 1 == len(use.trail.stack) if use.trail else False
        flows[key(i)] = Flow(first, later, use.loop if single else 0, loss)
    gone = {name: flow for name, flow in flows.items() if not isinstance(name, str)}
    return {name: flow.bypassing(gone) for name, flow in flows.items() if isinstance(name, str)}


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


def _shown(group: list[jaxprs.Use], sources: dict[Any, int]) -> int | None:
    """The size of the batch, where the leading axis of the layer's input is shown to be the batch in all of its uses."""
    found = []
    for use in group:
        kind, (x, *_) = use.info["kind"], use.info["shapes"]
        # A vmap over stacked layers that maps the input as well stands in front.
        axis = kind.batch_axis(x) + sum(mapped[2] for _, mapped in use.info["vmaps"])
        found.append({label.size for label in use.batch if label.axis == axis and label.source in sources})
    return max(set.intersection(*found), default=None) or None


def _settled(layer: Layer, shown: int | None, batch: int) -> Layer:
    """The layer with n set to the batch, which it may see flattened with other axes, (n t, d)."""
    if layer.constant:
        positions = layer.positions * layer.examples
        known = layer.per_example and layer.has_rows
        return dataclasses.replace(layer, examples=1, positions=positions, per_example=known)
    if layer.shared and not layer.per_example:
        return layer
    if shown is None:
        # Sums over all rows are right whatever the rows are; only single examples are not known.
        return dataclasses.replace(layer, examples=batch, per_example=False, aligned=False)
    return dataclasses.replace(layer, examples=shown, positions=layer.positions * layer.examples // shown)


def _unknown_examples(
    group: list[jaxprs.Use], single: bool, batches: set[int], shown: int | None
) -> str | None:
    """Why a kind that keeps a row an example cannot do so."""
    if not single:
        return "applied to single examples or parts of the batch (vmap, map): its examples are not known"
    kind = group[0].info["kind"]
    if len({kind.free(x, y)[0] for x, y, *_ in (use.info["shapes"] for use in group)}) > 1:
        return "applied to batches of different sizes: its examples are not known"
    if batches and shown is None and not all(use.fixed for use in group):
        return "its leading axis is not shown to be the batch: its examples are not known"
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
