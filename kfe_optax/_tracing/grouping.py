"""From the uses that were met to layers: uses grouped by parameter, or the reason why they form no layer."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from kfe_optax._layers.flow import SAME, End, Flow, Source
from kfe_optax._layers.kinds import Embedding
from kfe_optax._layers.layer import WITHOUT_BIAS, Layer, Path, path_name
from kfe_optax._marks import marks
from kfe_optax._tracing import jaxprs
from kfe_optax._tracing.orientation import oriented
from kfe_optax._tracing.origins import Origins


def layers_of(
    walk: jaxprs.Walk, shapes: dict[Path, Any], batches: set[int]
) -> tuple[tuple[Layer, ...], dict[Path, str]]:
    """Groups the uses by parameter into layers; the reason for every parameter that a use or module saw in vain.

    `batches` are the sizes that the batch may have by the registered losses.
    """
    uses = walk.uses
    reasons: dict[Path, str] = {}
    by_path: dict[Path, list[jaxprs.Use]] = {}
    places: dict[Path, set[int]] = collections.defaultdict(set)
    beside: dict[Path, str] = {}  # parameters that are added to outputs without being their layer's biases
    marked = _marked(walk)
    reached = walk.behind(walk.live)
    unsupported: dict[Path, str] = {}
    registered = outputs_of(walk)
    dead = "no registered loss depends on it" if registered else "the loss's derivative does not reach it"
    for i, use in enumerate(uses):
        paths = [trail.path for trail in (use.trail, *use.parameters) if trail is not None]
        if use.info["mark"] is marks.unsupported_mark:
            unsupported.update(dict.fromkeys(paths, use.info["reason"]))
        elif use.info["mark"] is marks.layer_mark and i not in marked:
            trail = use.trail
            # What the loss's derivative does not reach counts for nothing, and neither does a parameter that is stopped.
            if trail is None:
                reasons.update(dict.fromkeys(paths, "the kernel beside it is not among the parameters"))
            elif trail.stopped:
                reasons.update(dict.fromkeys(paths, "frozen by stop_gradient"))
            elif i not in reached:
                reasons.update(dict.fromkeys(paths, dead))
            else:
                by_path.setdefault(trail.path, []).append(_alone(use, i, walk, beside))
                places[trail.path].add(i)
    # A loss inside the loop sees other examples in each iteration.
    looped = any(uses[i].loops for i in registered)
    # The first axis of an output is the batch, flattened with others or not, and so may be those of vmaps around it.
    sources = {
        label.source: label.size
        for i in registered
        for label in uses[i].batch
        if label.axis <= sum(mapped[0] for _, mapped in uses[i].info["vmaps"])
    }
    predicting = frozenset().union(*(walk.behind(uses[i].live) for i in registered))
    parents = collections.Counter(path[:-1] for path in by_path)
    layers, names = [], {}
    claims = collections.Counter(
        p for group in by_path.values() for p in {own.path for use in group for own in use.parameters if own}
    )
    others = unseen(walk)
    for path, group in by_path.items():
        single = not any(map(_spread, group)) and not (looped and any(use.loops for use in group))
        if any(isinstance(use.info["kind"], Embedding) for use in group):
            group = [_without_bias(use, "which belongs to an embedding", beside) for use in group]
        widest = max(group, key=lambda use: len(use.parameters))
        kind = next((use.info["kind"] for use in group if isinstance(use.info["kind"], Embedding)), None)
        group = [_with_roles(oriented(use, kind or widest.info["kind"]), widest) for use in group]
        trouble = next(filter(None, map(_trouble, group)), None) or _disagreement(group)
        shown = 1 if batches == {1} else _shown(group, sources)
        if group[0].info["kind"].per_example:
            trouble = trouble or _unknown_examples(group, single, batches, shown)
        paths = tuple(
            (role, trail.path)
            for role, trail in zip(widest.info["roles"], widest.parameters, strict=True)
            if trail is not None
        )
        dtypes = {np.dtype(shapes[path].dtype).name, *(t for use in group for t in use.info["shapes"][2:4])}
        if any(dtype.startswith("complex") for dtype in dtypes):
            trouble = trouble or "its numbers are complex, and factors are those of real ones"
        if registered and not places[path] & predicting:
            trouble = trouble or "no registered loss depends on it"
        taken = [p for _, p in paths if claims[p] > 1]
        if taken:
            trouble = trouble or f"{path_name(taken[0])} is also used by another layer"
        added = [beside[p] for _, p in paths if p in beside]
        if added:
            trouble = trouble or f"its bias is {added[0]}"
        elsewhere = [others[p] for _, p in paths if p in others]
        if elsewhere:
            trouble = trouble or f"also used outside its layer, in another way ({elsewhere[0]})"
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
    return tuple(
        dataclasses.replace(layer, flow=flows[layer.name]) for layer in layers
    ), unsupported | beside | reasons


def _marked(walk: jaxprs.Walk) -> frozenset[int]:
    """The uses by a rule at which a mark stands: of the same kernel, with nothing but other equations between."""
    found = set()
    for use in walk.uses:
        if use.info["mark"] is not marks.layer_mark or "rule" in use.info or use.trail is None:
            continue
        for i, _ in use.live:
            before = walk.uses[i]
            if "rule" in before.info and before.trail is not None and before.trail.path == use.trail.path:
                found.add(i)
    return frozenset(found)


def unseen(walk: jaxprs.Walk) -> dict[Path, str]:
    """The parameters that have a gradient from examples that no tag sees, with the first equation that says so.

    What a mark stands for is seen: the equations between it and the uses before it.
    """
    uses, marked, inside = walk.uses, _marked(walk), set[tuple[Path, int]]()
    for use in uses:
        if use.info["mark"] is marks.layer_mark and "rule" not in use.info:
            before = {i for i, _ in use.live}
            before |= {i for rule in before & marked for i, _ in uses[rule].live}
            inside |= {(own.path, i) for own in use.parameters if own for i in before}
    found: dict[Path, str] = {}
    for i in sorted(walk.behind(walk.live)):
        info = uses[i].info
        if info["mark"] is marks.MET:
            for path in info["paths"]:
                if (path, i) not in inside:
                    found.setdefault(path, info["rule"])
    return found


def _alone(use: jaxprs.Use, index: int, walk: jaxprs.Walk, beside: dict[Path, str]) -> jaxprs.Use:
    """A use by a rule without the bias that was found, where its output is also read without that bias."""
    return use if walk.readers[index] == 1 else _without_bias(use, "which is also read without it", beside)


def _without_bias(use: jaxprs.Use, why: str, beside: dict[Path, str]) -> jaxprs.Use:
    """A use by a rule without its bias, of which is said what it is added to."""
    if "rule" not in use.info or len(use.parameters) == 1:
        return use
    kernel, bias = use.parameters
    if bias is not None:
        beside[bias.path] = f"added to an output ({use.info['rule']}), {why}"
    info = use.info | {"roles": use.info["roles"][:1]}
    if info["kind"].per_example:
        info["kind"] = dataclasses.replace(info["kind"], parameters=info["roles"])
    return dataclasses.replace(use, info=info, parameters=(kernel,))


def _with_roles(use: jaxprs.Use, widest: jaxprs.Use) -> jaxprs.Use:
    """A use of the layer in which `widest` has a bias: one without it has 0 in the place of the homogeneous 1."""
    if "rule" not in use.info or len(use.parameters) == len(widest.parameters):
        return use
    info = dict(use.info)
    *shapes, label = info["shapes"]
    info["roles"], info["shapes"] = widest.info["roles"], (*shapes, label or WITHOUT_BIAS)
    kind, wide = info["kind"], widest.info["kind"]
    # How a kind says that it has a bias, and along which axes.
    for field in {"bias", "parameters"} & set(vars(kind)) & set(vars(wide)):
        if dataclasses.replace(wide, **{field: getattr(kind, field)}) == kind:
            info["kind"] = wide
    return dataclasses.replace(use, info=info, parameters=widest.parameters)


def outputs_of(walk: jaxprs.Walk) -> frozenset[int]:
    """The uses that are registered losses on which the loss's derivative depends."""
    return frozenset(i for i in walk.behind(walk.live) if walk.uses[i].info["mark"] is marks.OUTPUT)


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
    return len(trail.dims) - sum(mapped[2] for _, mapped in use.info["vmaps"])


def _trouble(use: jaxprs.Use) -> str | None:
    trail = use.trail
    assert trail is not None
    if trail.lost:
        return f"changed before the layer uses it ({trail.lost})"
    stack = _stack(use)
    if use.info.get("scoped"):
        return "in a row_mask inside the loss, which only a marked layer sees: mark it with kfe.tag_dense"
    for i, (role, own) in enumerate(zip(use.info["roles"], use.parameters, strict=True)):
        # The bias, too: preconditioning would move what the gradient leaves alone.
        which = f"its {role} is " if i else ""
        if own is None or own.lost:
            return f"{which}changed before the layer uses it ({'replaced' if own is None else own.lost})"
        if own.stopped:
            return f"{which}frozen by stop_gradient"
        # Of the kernel alone the factor moves to the layer's input.
        if own.factor != 1 and (i or role == "bias" or use.info["kind"].statistics == "tokens"):
            return f"{which}changed before the layer uses it (times {own.factor:g})"
        mapped = sum(flags[i + 2] for _, flags in use.info["vmaps"])
        if own.views and "rule" not in use.info:
            return f"{which}changed before the layer uses it (reshape)"
        axes = (*(axis for axis, _ in own.stack), *own.dims[:mapped])
        rank = sum(axis >= 0 for axis in own.dims) + len(own.stack)
        if axes != tuple(min(axis, rank - 1) for axis, _ in stack):
            return "stacked along other axes than the layer's other parameters"
    inner = trail.dims[len(trail.dims) - _inner_rank(use) :]
    if "rule" not in use.info and inner != tuple(sorted(inner)):
        return "transposed before the layer uses it"
    return None


def _shown(group: list[jaxprs.Use], sources: dict[Any, int]) -> int | None:
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
    if len({(use.info["kind"], _stack(use)) for use in group}) > 1:
        rules = [use.info["rule"] for use in group if "rule" in use.info]
        if rules:
            return f"also used outside its layer, in another way ({rules[-1]})"
        return "used by layers of different kinds"
    found = [dict(zip(use.info["roles"], use.parameters, strict=True)) for use in group]
    seen = {
        tuple((role, trail and (trail.path, trail.views)) for role, trail in own.items()) for own in found
    }
    if len(seen) > 1:
        return "used with different parameters beside it"
    return None


def _stack(use: jaxprs.Use) -> tuple[tuple[int, int], ...]:
    """((axis of the kernel, size), ...) of the stacked axes, outermost first."""
    trail = use.trail
    assert trail is not None
    mapped = [size for size, is_mapped in reversed(use.info["vmaps"]) if is_mapped[2]]
    return (*trail.stack, *zip(trail.dims, mapped, strict=False))


def _layer(name: str, paths: Any, group: list[jaxprs.Use], order: int, kernel: Any) -> Layer:
    first = group[0]
    kind = first.info["kind"]
    stack = _stack(first)
    kernel_shape = tuple(s for i, s in enumerate(kernel.shape) if i not in {axis for axis, _ in stack})
    views = tuple(
        (role, own.views)
        for role, own in zip(first.info["roles"], first.parameters, strict=True)
        if own is not None and own.views
    )
    for view in dict(views).get(first.info["roles"][0], ()):
        kernel_shape = view.shape
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


def _place(use: jaxprs.Use) -> tuple[Any, ...]:
    assert use.trail is not None
    info = use.info
    x, label, moves = info.get("x", -1), info["shapes"][4], info.get("moves")
    return use.place, use.trail.route, x, label, moves, use.trail.factor


def _spread(use: jaxprs.Use) -> list[Any]:
    """The vmaps that map the layer's data but not its parameters: around one example, they broadcast the parameters."""
    return [m for m in use.info["vmaps"] if not m[1][2]]
