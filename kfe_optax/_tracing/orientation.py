"""Uses of one kernel in other layouts than its layer's, or with input and output exchanged.

y = x W is a use; u = v Wᵀ, which is what reverse mode inside the loss and tied tables make of the same kernel, is a *transposed*
one: its part of the gradient is Σ (∂L/∂u) vᵀ, so that ∂L/∂u stands in the place of ā, and v in that of g. Of a convolution the
transposed use is one with the kernel flipped, and the patches of ∂L/∂u stand in the place of ā.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from kfe_optax._layers.kinds import Conv, Dense, Embedding, Kind
from kfe_optax._layers.kinds.base import TRANSPOSED
from kfe_optax._tracing.findings import Use


class Moves(NamedTuple):
    """How the operand and the result of an equation are moved to the layer's layout: the order of their axes."""

    operand: tuple[int, ...]
    result: tuple[int, ...]


def oriented(use: Use, kind: Kind) -> Use:
    """A use by a rule as one of a layer of this kind; as it was where it is none."""
    own = use.info["kind"]
    if "rule" not in use.info or own == kind:
        return use
    if isinstance(own, Conv) and isinstance(kind, Conv):
        return _reflected(use, own, kind)
    if not isinstance(own, Dense):
        return use
    if isinstance(kind, Embedding):
        attends = (own.kernel, own.inputs, own.outputs) == ("ab", "...b", "...a")
        shapes = (*use.info["shapes"][:4], TRANSPOSED)
        return dataclasses.replace(use, info=use.info | {"kind": kind, "shapes": shapes}) if attends else use
    biased = len(use.parameters) > 1
    if not isinstance(kind, Dense) or own.kernel != kind.kernel or (biased and own.bias != kind.bias):
        return use
    x, y, x_dtype, y_dtype, label = use.info["shapes"]
    blocks, ins, outs = map(set, own.labels)
    wanted = tuple(map(set, kind.labels))
    if wanted == (blocks, ins, outs):
        sides = kind.inputs, kind.outputs
    elif wanted == (blocks, outs, ins):
        sides, label = (kind.outputs, kind.inputs), TRANSPOSED
    else:
        return use
    names = own.expanded(own.inputs, len(x)), own.expanded(own.outputs, len(y))
    targets = tuple(kind.expanded(side, len(shape)) for side, shape in zip(sides, (x, y), strict=True))
    if [*map(len, targets)] != [*map(len, names)]:
        return use  # another number of positions than the layer's letters have
    free = ([c for c in letters if c not in own.kernel] for letters in (targets[0], names[0]))
    letter = dict(zip(*free, strict=True))
    moves = Moves(
        *(
            tuple(name.index(letter.get(c, c)) for c in target)
            for name, target in zip(names, targets, strict=True)
        )
    )
    x, y = (tuple(shape[axis] for axis in order) for shape, order in zip((x, y), moves, strict=True))
    shapes = (y, x, y_dtype, x_dtype, label) if label == TRANSPOSED else (x, y, x_dtype, y_dtype, label)
    examples = kind.free_labels(len(shapes[0]))[:1]
    first = names[0].index(letter[examples]) if examples else -1
    labels = (each._replace(axis=kind.batch_axis(shapes[0])) for each in use.batch if each.axis == first)
    info = use.info | {"kind": kind, "shapes": shapes, "moves": moves}
    return dataclasses.replace(use, info=info, batch=frozenset(labels))


def _reflected(use: Use, own: Conv, kind: Conv) -> Use:
    """The use of a flipped kernel as a transposed one of a layer of this kind; as it was where it is none."""
    v, u, v_dtype, u_dtype, _ = use.info["shapes"]
    grouped = max(own.feature_groups, kind.feature_groups) > 1
    if own.flipped == kind.flipped or grouped or len(use.parameters) > 1:
        return use
    if own.geometry != kind.geometry.transposed(u[1:-1], v[1:-1]):
        return use
    shapes = (u, v, u_dtype, v_dtype, TRANSPOSED)
    return dataclasses.replace(use, info=use.info | {"kind": kind, "shapes": shapes})
