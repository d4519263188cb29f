"""`dot_general` is a dense layer, in any axes and orientation; its batch axes are blocks."""

from __future__ import annotations

from kfe_optax._layers.kinds import Dense
from kfe_optax._tracing.rules.base import Found, Rule, shapes

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class DotGeneral(Rule):
    """y = x W along any axes."""

    primitive = "dot_general"

    def use(self, equation, side, trail):
        operands = [v.aval for v in equation.invars]
        contracted, batch = equation.params["dimension_numbers"]
        if min(trail.dims) < 0 or not contracted[0]:
            return None
        letters = iter(_LETTERS)
        names: list[list[str]] = [[""] * operand.ndim for operand in operands]
        for pairs in (batch, contracted):
            for first, second in zip(*pairs, strict=True):
                names[0][first] = names[1][second] = next(letters)
        for own in names:
            own[:] = [name or next(letters) for name in own]
        outputs = [names[0][axis] for axis in batch[0]]
        for own, *taken in zip(names, contracted, batch, strict=True):
            outputs += [name for axis, name in enumerate(own) if not any(axis in axes for axes in taken)]
        # The kernel's letters in the order of the parameter's own axes, those of stacks left out.
        order = sorted(range(len(trail.dims)), key=lambda axis: trail.dims[axis])
        kernel = "".join(names[side][axis] for axis in order)
        kind = _short("".join(names[1 - side]), kernel, "".join(outputs))
        x = operands[1 - side]
        axes = tuple(kernel.find(name) for name in outputs)
        return Found(kind, trail, 1 - side, shapes(x, equation.outvars[0].aval), axes, tuple(range(x.ndim)))


def _short(inputs: str, kernel: str, outputs: str) -> Dense:
    """With "..." for the leading axes that input and output have in common, so that inputs of any rank are one kind."""
    common = 0
    for a, b in zip(inputs, outputs, strict=False):
        if a != b or a in kernel:
            break
        common += 1
    letters = dict.fromkeys(kernel + inputs[common:] + outputs[common:])
    canonical = dict(zip(letters, _LETTERS, strict=False))

    def renamed(labels: str) -> str:
        return "".join(canonical[c] for c in labels)

    # An input without a batch has them, too.
    prefix = "..." if common or all(c in kernel for c in inputs) else ""
    return Dense(
        kernel=renamed(kernel),
        inputs=prefix + renamed(inputs[common:]),
        outputs=prefix + renamed(outputs[common:]),
        bias=renamed("".join(c for c in outputs if c in kernel)),
    )
