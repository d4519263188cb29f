"""What the transformations around a preconditioner ask of it in a step: the one extra argument `request`.

Who asks whom: `adaptive_damping` gives λ to what is inside, and says what became of the last update; `scale_by_quadratic_model`
takes that as its own λ, and gives the preconditioner its damping γ², on a step of its search several, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax


class Request(NamedTuple):
    """What `update(grads, state, params, taps=taps, request=Request(...))` is asked for; None: nothing in particular.

    A preconditioner of this package reads `damping` and `first`, `scale_by_quadratic_model` all but `first`.

    Attributes:
      damping: λ of this step, in place of the transformation's own.
      first: the updates that this same step had with another damping. The step is taken once more: what the damping enters is
        formed anew, and the statistics, the count and the parameters outside the layers stay as they are.
      l2: η of this step, in place of the transformation's own.
      taken: whether the last update was taken, a boolean array; if not, it has no part in this one.
      back: whether the last update led astray, and is to be taken back now, a boolean array.
    """

    damping: Any = None
    first: Any = None
    l2: Any = None
    taken: Any = None
    back: Any = None


def checked(request: Any, extra: Mapping[str, Any] = MappingProxyType({})) -> Request:
    """The request of a step, an empty one where there is none; raises TypeError for anything else and for a damping beside it."""
    if "damping" in extra:
        raise TypeError(
            "update takes the damping of a step in a request: give request=kfe.Request(damping=...)."
        )
    if request is None:
        return Request()
    if not isinstance(request, Request):
        raise TypeError(f"request is a kfe.Request, such as kfe.Request(damping=0.1), not {request!r}.")
    return request


# Fields of a method's state that a step taken once more leaves as they are.
STATISTICS = ("factors", "basis", "scale")


def repeatable(state: Any) -> bool:
    """Whether this is the state of a preconditioner that has a damping, and so can take a step once more with another one."""
    return hasattr(getattr(state, "method", None), "damping")


def divided(state: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """What another damping changes in the state of a preconditioner, and how to put it back there."""
    changed = {name: own for name, own in state.method._asdict().items() if name not in STATISTICS}
    return changed, lambda new: state._replace(method=state.method._replace(**new))


def refreshed_at(state: Any, count: jax.Array) -> jax.Array:
    """Whether a preconditioner has refreshed its inverses at step `count`."""
    return state.method.last_refresh == count
