"""`add` of a vector that is the same for all examples and no layer's bias is a shift."""

from __future__ import annotations

from kfe_optax._tracing.rules.base import Rule
from kfe_optax._tracing.rules.scale import features_of


class Add(Rule):
    """x + β, β one number a feature: the offset of a normalization that multiplies more than once, of gates that were split.

    A table of positions has more axes than that of the features, and is none.
    """

    primitive = "add"

    def use(self, equation, side, trail):
        found = features_of(equation, side, trail, "bias")
        return found if found and sum(axis >= 0 for axis in found.axes) == 1 + len(found.vmaps) else None
