"""What feeds a layer with no other layer between: the data, or layers, iteration by iteration where a scan stacks them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

# When a value was made, seen from its reader: in the same iteration of a loop (or outside all loops), in the iteration before, in
# the last iteration of a loop that is over, in any iteration.
SAME, BEFORE, LAST, ANY = "same", "before", "last", "any"


class End(enum.Enum):
    """Where a network begins and where it ends."""

    DATA = "the data"
    LOSS = "the loss"

    def __str__(self) -> str:
        return self.value


class Source(NamedTuple):
    """A layer that feeds another one, or the data (but for masks, see `_tracing.origins`).

    Attributes:
      layer: its name, or `End.DATA`.
      when: which of its iterations, if it is stacked: `SAME`, `BEFORE`, `LAST` or `ANY`.
    """

    layer: Any
    when: str


class Flow(NamedTuple):
    """What feeds a layer.

    Attributes:
      first: in the first iteration of the scan that stacks the layer; of another layer, in its only call.
      later: in the iterations after that; of another layer, the same as `first`.
      loop: the scan that stacks the layer, by number; 0 for a layer that no scan stacks, or several, or one backwards.
      loss: what feeds the loss, the same in all flows of a network.
    """

    first: tuple[Source, ...] = ()
    later: tuple[Source, ...] = ()
    loop: int = 0
    loss: tuple[Source, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that feed it directly."""
        names = dict.fromkeys(source.layer for source in (*self.first, *self.later))
        return tuple(name for name in names if name is not End.DATA)

    def bypassing(self, gone: Mapping[Any, Flow]) -> Flow:
        """The flow when the layers in `gone`, with their own flows, are operations like any other."""
        return self._replace(
            first=_through(self.first, gone, first=True),
            later=_through(self.later, gone, first=False),
            loss=_through(self.loss, gone, first=False),
        )


def _through(sources: tuple[Source, ...], gone: Mapping[Any, Flow], first: bool) -> tuple[Source, ...]:
    found: dict[Source, None] = {}
    seen: set[Source] = set()
    pending = list(sources)
    while pending:
        source = pending.pop(0)
        if source in seen:
            continue
        seen.add(source)
        if source.layer not in gone:
            found[source] = None
            continue
        before = gone[source.layer]
        behind = (*before.first, *before.later)
        if source.when == SAME:
            behind = before.first if first else before.later
        pending += [Source(s.layer, _composed(source.when, s.when)) for s in behind]
    return tuple(found)


def _composed(outer: str, inner: str) -> str:
    """When something was made that was read at `inner` by what was made at `outer`."""
    if SAME in (outer, inner):
        return inner if outer == SAME else outer
    return ANY
