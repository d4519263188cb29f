"""What a walk through a jaxpr finds (see `kfe_optax._tracing.jaxprs`): the uses of parameters, and what lies between them."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from kfe_optax._layers.views import View
from kfe_optax._tracing.batch_axes import UNKNOWN, Labels
from kfe_optax._tracing.origins import NOWHERE, Origins

Live = frozenset[tuple[int, int]]
"""Uses whose outputs a derivative reaches with no other use between, each with the derivative's sign, 0 where it is not known."""


@dataclasses.dataclass(frozen=True)
class Trail:
    """What happened to a parameter so far.

    Attributes:
      path: its key path.
      dims: the parameter's axes that the variable still has, in its order; −1 for one that was added. Behind a reshape they are
        those of the last view.
      views: the reshapes so far.
      stack: the (axis, size) pairs that scans consumed, outermost first.
      route: for each scan around, outermost first, whether it is one of those.
      broadcast: True inside a loop that uses the same value in each iteration.
      factor: the number that it was multiplied with.
      flipped: the parameter's axes that run backwards.
      kept: (place, operand) of the data that it was multiplied with before: x (m γ) is (x m) γ.
      stopped: True behind a stop_gradient.
      lost: the operation that ended the trail.
    """

    path: tuple[str | int, ...]
    dims: tuple[int, ...]
    stack: tuple[tuple[int, int], ...] = ()
    route: tuple[bool, ...] = ()
    views: tuple[View, ...] = ()
    broadcast: bool = False
    factor: float = 1.0
    flipped: tuple[int, ...] = ()
    kept: tuple[int, int] | None = None
    stopped: bool = False
    lost: str | None = None


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a layer, one of a parameter by no rule (`marks.MET`), or a registered loss.

    Attributes:
      trail: that of its kernel (its first parameter); None where none reaches it.
      parameters: those of the parameters that the layer used.
      info: what the mark holds: "mark", of a layer "kind", "roles", "shapes", "masked", "vmaps" and "divided".
      place: where it stands in the program (see `equations.places`).
      loops: how many loops it is in.
      constant: whether the layer's input depends on neither data nor parameters.
      fixed: whether it depends on no data.
      first: the uses, and the data, that its input comes from, in the first iteration of its loop.
      later: the same in the iterations after that.
      loop: the scan that it is directly in, by number; 0 outside loops, in a `while` and in a scan that runs backwards.
      live: the uses that the derivative of its y (or z, or loss) reaches with no other use between.
      batch: the labels of the layer's input, of the registered output, or of the data that a use by no rule meets.
    """

    trail: Trail | None
    parameters: tuple[Trail | None, ...]
    info: dict[str, Any]
    place: int
    loops: int
    constant: bool = False
    fixed: bool = False
    first: Origins = NOWHERE
    later: Origins = NOWHERE
    loop: int = 0
    live: Live = frozenset()
    batch: Labels = UNKNOWN


@dataclasses.dataclass
class Walk:
    """What was met on the way.

    Attributes:
      uses: the marks, in order of execution.
      others: for parameters that meet data where no rule knows their use, the first such equation.
      masked: whether a row mask of the whole batch is in force.
      masks: {serial number of a `row_mask` inside the loss: the place of its mark, and the calls around that}.
      scoped: the `row_mask` that a call around is in, which the equations in the call do not say.
      divided: whether a `shard_map` is around, in which each device has its share of the examples.
      loss: what the program's output comes from directly.
      live: the uses that the output's derivative reaches.
      scope: the calls around what is being walked.
      multiplied: {product in it that another product alone reads: what that multiplies it with}.
      place: how many places were passed.
      readers: how many equations read the output of each use that no tag has marked, as it is or moved.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    others: dict[Any, str] = dataclasses.field(default_factory=dict)
    masked: bool = False
    masks: dict[str, tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    scoped: str | None = None
    divided: bool = False
    loss: Origins = NOWHERE
    live: Live = frozenset()
    scope: tuple[int, ...] = ()
    multiplied: dict[Any, Any] = dataclasses.field(default_factory=dict)
    place: int = 0
    readers: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def behind(self, live: Live) -> frozenset[int]:
        """These uses and all that their derivatives reach."""
        found: set[int] = set()
        pending = [use for use, _ in live]
        while pending:
            use = pending.pop()
            if use not in found:
                found.add(use)
                pending += [before for before, _ in self.uses[use].live]
        return frozenset(found)
