"""From the uses that were met to layers: uses grouped by parameter, or the reason why they form no layer."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from kfe_optax._layers.flow import SAME, End, Flow, Source
from kfe_optax._layers.kinds import Norm
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.paths import Path, path_name
from kfe_optax._marks import marks
from kfe_optax._tracing import reasons as reasons_lib
from kfe_optax._tracing.counting import Counted, as_one_layer, counted, outputs_of, spread_of, stack_of
from kfe_optax._tracing.findings import Use, Walk
from kfe_optax._tracing.origins import Origins


class Batch(NamedTuple):
    """What registered losses say of the batch.

    Attributes:
      sizes: those that it may have.
      sources: {source: size} of the values along whose first axes the examples are.
      registered: whether there is a registered loss.
      looped: whether one is in a loop, and so sees other examples in each iteration.
      predicting: the uses that one of them reaches.
    """

    sizes: set[int]
    sources: dict[Any, int]
    registered: bool
    looped: bool
    predicting: frozenset[int]


def _batch_of(walk: Walk, sizes: set[int]) -> Batch:
    registered = [walk.uses[i] for i in outputs_of(walk)]
    # The first axis of an output is the batch, flattened with others or not, and so may be those of vmaps around it.
    sources = {
        label.source: label.size
        for output in registered
        for label in output.batch
        if label.axis <= sum(mapped[0] for _, mapped in output.info["vmaps"])
    }
    predicting = frozenset[int]().union(*(walk.behind(output.live) for output in registered))
    return Batch(sizes, sources, bool(registered), any(output.loops for output in registered), predicting)


def layers_of(
    walk: Walk, shapes: dict[Path, Any], batches: set[int]
) -> tuple[tuple[Layer, ...], dict[Path, str]]:
    """Groups the uses by parameter into layers; the reason for every parameter that was used in vain.

    `batches` are the sizes that the batch may have by the registered losses.
    """
    found, batch = counted(walk), _batch_of(walk, batches)
    parents = collections.Counter(path[:-1] for path in found.groups)
    claims = collections.Counter(
        p
        for group in found.groups.values()
        for p in {own.path for use in group for own in use.parameters if own}
    )
    layers, names, reasons = [], {}, {}
    for path, group in found.groups.items():
        group, paths = as_one_layer(group, found.beside)
        single = not any(map(spread_of, group)) and not (batch.looped and any(use.loops for use in group))
        shown = _shown(group, batch.sources) if batches != {1} else 1
        shown = None if any(use.info["divided"] for use in group) else shown
        if batches and single and shown is None:
            group = [_by_positions(use) for use in group]
        own = [p for _, p in paths]
        trouble = _trouble_inside(group, single, shown, batch) or _trouble_outside(
            path, own, found, claims, batch
        )
        dtypes = {np.dtype(shapes[path].dtype).name, *(t for use in group for t in use.info["shapes"][2:4])}
        if any(dtype.startswith("complex") for dtype in dtypes):
            trouble = trouble or "its numbers are complex, and factors are those of real ones"
        if trouble:
            reasons.update(dict.fromkeys(own, trouble))
            continue
        name = path_name(path if parents[path[:-1]] > 1 else path[:-1]) or path_name(path)
        names[path] = name
        layer = _layer(name, paths, group, len(layers), shapes[path])
        size = sum(int(np.prod(shapes[p].shape)) for p in own)
        layer = dataclasses.replace(layer, size=size, per_example=layer.per_example and single)
        if batches:
            fixed = shown is None and all(use.fixed for use in group)
            layer = dataclasses.replace(layer, constant=layer.constant or fixed)
            layer = _settled(layer, shown, max(batch.sources.values(), default=max(batches)))
        layers.append(layer)
    flows = _flows(walk, names)
    found_layers = tuple(dataclasses.replace(layer, flow=flows[layer.name]) for layer in layers)
    return found_layers, found.beside | found.reasons | reasons


def _trouble_inside(group: list[Use], single: bool, shown: int | None, batch: Batch) -> str | None:
    """What is wrong with the uses of a kernel."""
    trouble = next(filter(None, map(reasons_lib.trouble, group)), None) or reasons_lib.disagreement(group)
    if any(use.info["divided"] for use in group) and not batch.sizes:
        trouble = trouble or "inside a shard_map, and no registered loss says how many examples there are"
    if group[0].info["kind"].per_example:
        trouble = trouble or reasons_lib.unknown_examples(group, single, batch.sizes, shown)
    return trouble


def _trouble_outside(
    kernel: Path, own: list[Path], found: Counted, claims: collections.Counter, batch: Batch
) -> str | None:
    """What is wrong with where else a layer's parameters are."""
    if batch.registered and not found.places[kernel] & batch.predicting:
        return "no registered loss depends on it"
    for path in own:
        if claims[path] > 1:
            return f"{path_name(path)} is also used by another layer"
    for path in own:
        if path in found.beside:
            return f"its bias is {found.beside[path]}"
    for path in own:
        if path in found.elsewhere:
            return f"also used outside its layer, in another way ({found.elsewhere[path]})"
    return None


def _by_positions(use: Use) -> Use:
    """A use whose kind keeps a row an example, where it is not known which its examples are, with a row a position."""
    kind, (*_, label) = use.info["kind"], use.info["shapes"]
    # What is the same for all examples has them all in one row; a use without its bias shares rows with those that have it.
    if use.fixed or label or not isinstance(kind, Norm):
        return use
    return dataclasses.replace(use, info=use.info | {"kind": kind.by_positions()})


def _shown(group: list[Use], sources: dict[Any, int]) -> int | None:
    """The size of the batch, where the leading axis of the layer's input is shown to be the batch in all of its uses."""
    found = []
    for use in group:
        kind, (x, *_) = use.info["kind"], use.info["shapes"]
        # A vmap over stacked layers that maps the input as well stands in front.
        axis = kind.batch_axis(x) + sum(mapped[1] for _, mapped in use.info["vmaps"])
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


def _layer(name: str, paths: Any, group: list[Use], order: int, kernel: Any) -> Layer:
    first = group[0]
    kind = first.info["kind"]
    stack = stack_of(first)
    kernel_shape = tuple(s for i, s in enumerate(kernel.shape) if i not in {axis for axis, _ in stack})
    views = tuple(
        (role, own.views)
        for role, own in zip(first.info["roles"], first.parameters, strict=True)
        if own is not None and own.views
    )
    for view in dict(views).get(first.info["roles"][0], ()):
        kernel_shape = view.shape
    spread = spread_of(first)
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
        places=tuple(_place(use) for use in group),
        examples=int(np.prod([size for size, _ in spread], initial=1)) if spread else free[0][0],
        positions=int(np.prod(free[0][1:], initial=1)),
        per_example=len({f[0] for f in free}) == 1,
        in_loop=any(use.trail is not None and use.trail.broadcast for use in group),
        masked=any(use.info["masked"] for use in group),
        spread=bool(spread),
        constant=all(use.constant for use in group),
        views=views,
    )


def _place(use: Use) -> tuple[Any, ...]:
    assert use.trail is not None
    info = use.info
    x, label, moves, kept = info.get("x", -1), info["shapes"][4], info.get("moves"), use.trail.kept
    return (
        use.place,
        use.trail.route,
        x,
        label,
        moves,
        use.trail.factor,
        info.get("mask"),
        info["vmaps"],
        kept,
    )


def _flows(walk: Walk, names: dict[Path, str]) -> dict[str, Flow]:
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
        single = len(stack_of(use)) == 1 == len(use.trail.stack) if use.trail else False
        flows[key(i)] = Flow(first, later, use.loop if single else 0, loss)
    gone = {name: flow for name, flow in flows.items() if not isinstance(name, str)}
    return {name: flow.bypassing(gone) for name, flow in flows.items() if isinstance(name, str)}
