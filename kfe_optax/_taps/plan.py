"""What is static about taps, and the forward passes that something is read from."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from kfe_optax._jax import explicit_axes
from kfe_optax._layers.layers import Layers
from kfe_optax._taps.forward import Forward, Swaps

Fisher = Literal["sampled", "empirical", "exact"]


class Passage(NamedTuple):
    """One forward pass, of the whole batch, of a microbatch or of a part of the batch."""

    leaves: list[Any]
    cotangent: jax.Array
    swaps: Swaps
    microbatch: Any  # its number among those that the batch was divided into

    def pull(self, swapped: list[Any], start: float = 1.0) -> tuple[Any, Any]:
        """The cotangents of parameters and riders, from leaves of which some are swapped and this cotangent of the loss."""
        structure, known = self.swaps.structure, self.swaps.shardings

        def run(cotangent, *leaves):
            return jax.tree.unflatten(structure, leaves)(cotangent)

        shardings = None if known is None else (known[-1], *known[:-1])
        return explicit_axes.as_typed(run, shardings, self.cotangent * start, *swapped)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about the statistics: what makes them, and for which layers.

    Attributes:
      forward: the pass that they are read from.
      fisher, num_samples: see `value_grad_and_taps`.
      parameters: the tree structure of the parameters.
    """

    forward: Forward
    fisher: Fisher
    num_samples: int
    parameters: Any

    @property
    def layers(self) -> Layers:
        return self.forward.layers

    @property
    def axis_name(self) -> Any:
        return self.forward.place.axis_name

    @property
    def draws(self) -> int:
        """The number of Fisher pulls whose sum (or mean) is the estimate."""
        if self.fisher == "exact":
            return sum(output.columns for output in self.layers.outputs)
        return self.num_samples if self.fisher == "sampled" else 1
