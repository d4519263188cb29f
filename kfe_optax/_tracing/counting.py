"""Which uses count, and how those of one parameter become uses of one layer."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

from kfe_optax._layers.kinds import Embedding
from kfe_optax._layers.layer import WITHOUT_BIAS
from kfe_optax._layers.paths import Path
from kfe_optax._marks import marks
from kfe_optax._tracing.findings import Use, Walk
from kfe_optax._tracing.orientation import oriented


class Counted(NamedTuple):
    """The uses that count.

    Attributes:
      groups: {kernel: its uses}.
      places: {kernel: their numbers}.
      reasons: why uses of a parameter count for nothing.
      beside: where parameters are added to outputs without being their layer's biases.
      elsewhere: where examples reach a parameter otherwise than by uses.
    """

    groups: dict[Path, list[Use]]
    places: dict[Path, set[int]]
    reasons: dict[Path, str]
    beside: dict[Path, str]
    elsewhere: dict[Path, str]


def counted(walk: Walk) -> Counted:
    """The uses of parameters that the loss's derivative reaches, each once."""
    found = Counted({}, collections.defaultdict(set), {}, {}, unseen(walk))
    marked, reached = _marked(walk) | _moved(walk), walk.behind(walk.live)
    for i, use in enumerate(walk.uses):
        paths = [trail.path for trail in (use.trail, *use.parameters) if trail is not None]
        if use.info["mark"] is marks.layer_mark and i not in marked:
            trail = use.trail
            # What the loss's derivative does not reach counts for nothing, and neither does a parameter that is stopped.
            if trail is None:
                found.reasons.update(dict.fromkeys(paths, "the kernel beside it is not among the parameters"))
            elif trail.stopped:
                found.reasons.update(dict.fromkeys(paths, "frozen by stop_gradient"))
            elif i not in reached:
                found.reasons.update(dict.fromkeys(paths, "the loss's derivative does not reach it"))
            else:
                found.groups.setdefault(trail.path, []).append(_alone(use, i, walk, found.beside))
                found.places[trail.path].add(i)
    return found


def as_one_layer(group: list[Use], beside: dict[Path, str]) -> tuple[list[Use], tuple[tuple[str, Path], ...]]:
    """Uses of one kernel as those of one layer, in its layout and with its bias; the layer's (role, path)s."""
    table = next((use.info["kind"] for use in group if isinstance(use.info["kind"], Embedding)), None)
    if table is not None:
        group = [_without_bias(use, "which belongs to an embedding", beside) for use in group]
    group = _padded_alike(group)
    widest = max(group, key=lambda use: len(use.parameters))
    kind = widest.info["kind"] if table is None else table
    roles = zip(widest.info["roles"], widest.parameters, strict=True)
    paths = tuple((role, trail.path) for role, trail in roles if trail is not None)
    return [_with_roles(oriented(use, kind), widest) for use in group], paths


def _padded_alike(group: list[Use]) -> list[Use]:
    """Convolutions that differ in their padding alone, with its name if they have one, which is what their sizes make of it."""
    kinds = {use.info["kind"] for use in group}
    if len(kinds) == 1 or len({kind.form() for kind in kinds}) > 1:
        return group
    for name in ("SAME", "SAME_LOWER"):
        named = [_named(use, name) for use in group]
        if None not in named:
            return [use for use in named if use is not None]
    return group


def _named(use: Use, name: str) -> Use | None:
    kind, (x, *_) = use.info["kind"], use.info["shapes"]
    geometry = kind.geometry.named(name)
    if geometry.pads(x[1:-1]) != kind.geometry.padding:
        return None
    return dataclasses.replace(use, info=use.info | {"kind": dataclasses.replace(kind, geometry=geometry)})


def _marked(walk: Walk) -> frozenset[int]:
    """The uses by a rule at which a mark stands: of its parameters, with nothing but other equations between."""
    found, moved = set[int](), _moved(walk)
    for place, use in enumerate(walk.uses):
        if use.info["mark"] is marks.layer_mark and "rule" not in use.info and place not in moved:
            found |= _inside(use, walk)[0]
    return frozenset(found)


def _inside(mark: Use, walk: Walk) -> tuple[set[int], set[int]]:
    """The uses of a mark's parameters by rules that it stands for, one behind the other, and all that is between."""
    own = {trail.path for trail in mark.parameters if trail is not None}
    found, seen, pending = set[int](), set[int](), [i for i, _ in mark.live]
    while pending:
        i = pending.pop()
        before = walk.uses[i]
        seen.add(i)
        if i not in found and "rule" in before.info and before.trail and before.trail.path in own:
            found.add(i)
            pending += [further for further, _ in before.live]
    return found, seen


def _moved(walk: Walk) -> frozenset[int]:
    """The marks of kernels that were transposed or reshaped before, where a rule knows the use as well, which follows that.

    So does `nn.Dense` that is given the transpose of an embedding's table.
    """
    found = set()
    for place, use in enumerate(walk.uses):
        trail = use.trail
        if use.info["mark"] is not marks.layer_mark or "rule" in use.info or trail is None or trail.lost:
            continue
        before = [walk.uses[i] for i, _ in use.live]
        known = any("rule" in own.info and own.trail and own.trail.path == trail.path for own in before)
        if known and not use.info["vmaps"] and (trail.views or list(trail.dims) != sorted(trail.dims)):
            found.add(place)
    return frozenset(found)


def unseen(walk: Walk) -> dict[Path, str]:
    """The parameters that have a gradient from examples that no tag sees, with the first equation that says so.

    What a mark stands for is seen: the equations between it and the uses before it.
    """
    uses, moved, inside = walk.uses, _moved(walk), set[tuple[Path, int]]()
    for place, use in enumerate(uses):
        if use.info["mark"] is marks.layer_mark and "rule" not in use.info and place not in moved:
            before = _inside(use, walk)[1]
            inside |= {(own.path, i) for own in use.parameters if own for i in before}
    found: dict[Path, str] = {}
    for i in sorted(walk.behind(walk.live)):
        info = uses[i].info
        if info["mark"] is marks.MET:
            for path in info["paths"]:
                if (path, i) not in inside:
                    found.setdefault(path, info["rule"])
    return found


def _alone(use: Use, index: int, walk: Walk, beside: dict[Path, str]) -> Use:
    """A use by a rule without the bias that was found, where its output is also read without that bias."""
    return use if walk.readers[index] == 1 else _without_bias(use, "which is also read without it", beside)


def _without_bias(use: Use, why: str, beside: dict[Path, str]) -> Use:
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


def _with_roles(use: Use, widest: Use) -> Use:
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


def outputs_of(walk: Walk) -> frozenset[int]:
    """The uses that are registered losses on which the loss's derivative depends."""
    return frozenset(i for i in walk.behind(walk.live) if walk.uses[i].info["mark"] is marks.OUTPUT)


def stack_of(use: Use) -> tuple[tuple[int, int], ...]:
    """((axis of the kernel, size), ...) of the stacked axes, outermost first."""
    trail = use.trail
    assert trail is not None
    mapped = [size for size, is_mapped in reversed(use.info["vmaps"]) if is_mapped[2]]
    return (*trail.stack, *zip(trail.dims, mapped, strict=False))


def spread_of(use: Use) -> list[Any]:
    """The vmaps that map the layer's data but not its parameters: around one example, they broadcast the parameters."""
    return [m for m in use.info["vmaps"] if not m[1][2]]
