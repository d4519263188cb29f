"""Why uses form no layer."""

from __future__ import annotations

from kfe_optax._tracing.counting import stack_of
from kfe_optax._tracing.findings import Use
from kfe_optax._tracing.matching import GONE


def trouble(use: Use) -> str | None:
    """What is wrong with one use."""
    trail = use.trail
    assert trail is not None
    if trail.lost:
        return f"changed before the layer uses it ({trail.lost})"
    stack = stack_of(use)
    if use.info.get("mask") == GONE:
        return "in a row_mask that a derivative inside the loss leaves behind: open it around the derivative"
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
        if (own.views or own.flipped) and "rule" not in use.info:
            return f"{which}changed before the layer uses it ({'reshape' if own.views else 'rev'})"
        axes = (*(axis for axis, _ in own.stack), *own.dims[:mapped])
        rank = sum(axis >= 0 for axis in own.dims) + len(own.stack)
        if axes != tuple(min(axis, rank - 1) for axis, _ in stack):
            return "stacked along other axes than the layer's other parameters"
    inner = trail.dims[len(trail.dims) - _inner_rank(use) :]
    if "rule" not in use.info and inner != tuple(sorted(inner)):
        return "transposed before the layer uses it"
    return None


def _inner_rank(use: Use) -> int:
    trail = use.trail
    assert trail is not None
    return len(trail.dims) - sum(mapped[2] for _, mapped in use.info["vmaps"])


def disagreement(group: list[Use]) -> str | None:
    """What is wrong with several uses of one kernel."""
    if len({(use.info["kind"], stack_of(use)) for use in group}) > 1:
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


def unknown_examples(group: list[Use], single: bool, batches: set[int], shown: int | None) -> str | None:
    """Why a kind that keeps a row an example cannot do so."""
    if not single:
        return "applied to single examples or parts of the batch (vmap, map): its examples are not known"
    kind = group[0].info["kind"]
    if len({kind.free(x, y)[0] for x, y, *_ in (use.info["shapes"] for use in group)}) > 1:
        return "applied to batches of different sizes: its examples are not known"
    if batches and shown is None and not all(use.fixed for use in group):
        return "its leading axis is not shown to be the batch: its examples are not known"
    return None
