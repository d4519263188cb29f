"""Which linear maps of one kernel are dense layers: the letters of their axes (see `kinds.Dense`)."""

from __future__ import annotations

from collections.abc import Sequence

from kfe_optax._layers.kinds import Dense

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def general(rank: int, axes: Sequence[int], features: int, batch: Sequence[int]) -> Dense | None:
    """A `DenseGeneral` on an input of `rank` axes that contracts `axes`, makes `features` new axes and pairs those in `batch`.

    Its kernel is (*batch, *contracted, *features), its bias (*batch, *features), its output (*batch, *others, *features).
    """
    # Flax sorts them, and the kernel has them in that order.
    axes, batch = (sorted(a % rank for a in group) for group in (axes, batch))
    letters = iter(_LETTERS)
    names = [next(letters) for _ in range(rank)]
    new = [next(letters) for _ in range(features)]
    others = [names[i] for i in range(rank) if i not in axes and i not in batch]
    paired, contracted = [names[i] for i in batch], [names[i] for i in axes]
    return _short(
        "".join(names),
        "".join([*paired, *contracted, *new]),
        "".join([*paired, *others, *new]),
        "".join([*paired, *new]),
    )


def einsum(inputs: str, kernel: str, outputs: str) -> Dense | None:
    """An einsum of an input and a kernel with the bias that Flax gives it; None where it is no linear map of whole kernels."""
    for operand in (inputs, kernel, outputs):
        if len(set(operand)) < len(operand):
            return None  # a diagonal
    if any(c not in inputs and c not in outputs for c in kernel) or any(
        c not in kernel and c not in outputs for c in inputs
    ):
        return None  # an axis that is summed away
    return _short(inputs, kernel, outputs, "".join(c for c in outputs if c in kernel))


def _short(inputs: str, kernel: str, outputs: str, bias: str) -> Dense | None:
    """With "..." for the leading axes that input and output have in common, so that inputs of any rank are one kind."""
    common = 0
    for a, b in zip(inputs, outputs, strict=False):
        if a != b or a in kernel:
            break
        common += 1
    canonical = dict(zip(dict.fromkeys(kernel + inputs[common:] + outputs[common:]), _LETTERS, strict=False))

    def renamed(labels: str) -> str:
        return "".join(canonical[c] for c in labels)

    prefix = "..." if common else ""
    if not any(c not in kernel for c in inputs):
        prefix = "..."  # an input without a batch
    return Dense(
        kernel=renamed(kernel),
        inputs=prefix + renamed(inputs[common:]),
        outputs=prefix + renamed(outputs[common:]),
        bias=renamed(bias),
    )
