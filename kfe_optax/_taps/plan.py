"""What taps are made of: a forward pass, what the step was given, and what is static about both."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from kfe_optax._jax import explicit_axes
from kfe_optax._layers.layers import Layers
from kfe_optax._taps.forward import Forward, Swaps

Fisher = Literal["sampled", "empirical", "exact"]


class Passage(NamedTuple):
    """One forward pass, of the whole batch or of a microbatch."""

    leaves: list[Any]
    cotangent: jax.Array
    swaps: Swaps
    microbatch: Any

    def pull(self, swapped: list[Any], start: float = 1.0) -> tuple[Any, Any]:
        """The cotangents of parameters and riders, from leaves of which some are swapped and this cotangent of the loss."""
        structure, known = self.swaps.structure, self.swaps.shardings

        def run(cotangent, *leaves):
            return jax.tree.unflatten(structure, leaves)(cotangent)

        shardings = None if known is None else (known[-1], *known[:-1])
        return explicit_axes.as_typed(run, shardings, self.cotangent * start, *swapped)


class Given(NamedTuple):
    """What the step was given, for what runs the forward pass again."""

    parameters: Any
    arrays: list[Any]  # those that `Plan.stacked` names with a leading axis of microbatches
    row_mask: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about taps: how to run the pull, and for which layers."""

    forward: Forward
    swaps: Swaps | None  # None: the forward pass runs again, in microbatches or not
    fisher: Fisher
    num_samples: int
    stacked: tuple[bool, ...]
    parameters: Any  # the tree structure of the parameters

    @property
    def layers(self) -> Layers:
        return self.forward.layers

    @property
    def axis_name(self) -> Any:
        return self.forward.place.axis_name

    @property
    def microbatches(self) -> int:
        return self.forward.place.microbatches

    @property
    def draws(self) -> int:
        """The number of Fisher pulls whose sum (or mean) is the estimate."""
        if self.fisher == "exact":
            return sum(output.columns for output in self.layers.outputs)
        return self.num_samples if self.fisher == "sampled" else 1
