"""What a rule says: which equation of a traced loss uses a parameter as a layer does, without a mark."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from kfe_optax._layers.kinds import Dense, Kind
from kfe_optax._marks.marks import Vmaps
from kfe_optax._tracing.batch_axes import UNKNOWN, Labels
from kfe_optax._tracing.findings import Trail
from kfe_optax._tracing.orientation import Moves


class Output(NamedTuple):
    """The output of a use, as it is or with its axes moved.

    Attributes:
      use: the number of the use.
      axes: for each axis, the kernel's own axis (as the layer uses it) that it is, −1 for the examples and positions.
    """

    use: int
    axes: tuple[int, ...]


class Found(NamedTuple):
    """A use by a rule.

    Attributes:
      kind: the kind of layer.
      trail: the parameter's, perhaps with one more view of it.
      x: which operand is the layer's input.
      shapes: (x's shape, y's, x's dtype, y's, label), in the order of axes that the kind has.
      axes: of the equation's output, see `Output`; examples and positions in the order of the kind's input.
      order: the axes of that operand in the order of the kind's input; −1 for one that the kind's input lacks.
      role: of the parameter.
      vmaps: those around it (see `kfe_optax._marks.marks`): input and output, as `Rule.layout` has them, have the mapped axes in
        front, outermost first; `shapes` are without them.
    """

    kind: Kind
    trail: Trail
    x: int
    shapes: tuple[tuple[int, ...], tuple[int, ...], str, str, str]
    axes: tuple[int, ...]
    order: tuple[int, ...]
    role: str = "kernel"
    vmaps: Vmaps = ()

    def output(self, use: int) -> Output:
        return Output(use, self.axes)

    def labels(self, labels: Labels) -> Labels:
        """Those of the operand, as those of the kind's input."""
        kept = [label for label in labels if label.axis in self.order]
        return frozenset(label._replace(axis=self.order.index(label.axis)) for label in kept)

    def labels_behind(self, labels: Labels) -> Labels:
        """Those of the output, where a dense layer's equation is none that `batch_axes` knows."""
        if not isinstance(self.kind, Dense):
            return UNKNOWN
        letters = self.kind.expanded(self.kind.inputs, len(self.order))
        free = [axis for axis, c in zip(self.order, letters, strict=True) if c not in self.kind.kernel]
        places = dict(zip(free, (axis for axis, own in enumerate(self.axes) if own < 0), strict=True))
        return frozenset(label._replace(axis=places[label.axis]) for label in labels if label.axis in places)


class Layout(NamedTuple):
    """How a use looks to its kind.

    Attributes:
      input: the layer's input.
      outward: the equation's output to the kind's.
      back: and back.
    """

    input: jax.Array
    outward: Callable[[jax.Array], jax.Array]
    back: Callable[[jax.Array], jax.Array]

    def then(self, moves: Moves) -> Layout:
        """With the axes of the kind's input and output in the order of a layer that is used in several layouts."""
        behind = moved(self.input, *moves)
        return Layout(
            behind.input,
            lambda y: behind.outward(self.outward(y)),
            lambda y: self.back(behind.back(y)),
        )


class Rule(abc.ABC):
    """One primitive that uses a parameter as a layer does; one object a file, one line in `RULES`.

    Attributes:
      primitive: its name, as a jaxpr prints it.
      flips: whether it knows parameters of which axes run backwards (`trail.flipped`).
    """

    primitive: ClassVar[str]
    flips: ClassVar[bool] = False

    @abc.abstractmethod
    def use(self, equation: Any, side: int, trail: Trail) -> Found | None:
        """The use that an equation of this primitive makes of the parameter among its operands; None where it is none.

        Args:
          equation: of the jaxpr; it has one output.
          side: which operand is the parameter.
          trail: what happened to the parameter so far; `trail.dims` are the parameter's own axes, −1 for one that was added.
        """

    def layout(self, equation: Any, x: int, operands: list[Any]) -> Layout:
        """How the use looks to its kind: as it is, unless a rule says otherwise.

        Args:
          equation: as before.
          x: which operand is the layer's input.
          operands: their values.
        """
        del equation
        return Layout(operands[x], _same, _same)


def moved(x: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Layout:
    """A layout with the axes of input and output in these orders."""
    inverse = sorted(range(len(outputs)), key=lambda axis: outputs[axis])
    return Layout(x.transpose(inputs), lambda y: y.transpose(outputs), lambda y: y.transpose(inverse))


def shapes(x: Any, y: Any, label: str = "") -> Any:
    """`Found.shapes` of an input and output that lie as their kind has them."""
    return (x.shape, y.shape, np.dtype(x.dtype).name, np.dtype(y.dtype).name, label)


def _same(y: jax.Array) -> jax.Array:
    return y
