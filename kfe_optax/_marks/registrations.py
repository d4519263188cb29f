"""What a registered loss or output is, and how discovery found it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax

from kfe_optax.distributions import Distribution


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a registered loss is, statically.

    Attributes:
      name: for messages.
      distribution: the predictive distribution p(y|z).
      loss: (z, *args) → the loss of each event; None for `register_output`, whose args are (weights,).
      mass: (z, *args) → the factor of the distribution's Fisher in the loss's Gauss–Newton matrix (soft labels that do
        not sum to one), or None for 1.
      outputs: (z, *args) → the distribution's own parameters when they are not z itself (classes left out), or None.
      signed: whether `mass` may be negative.
    """

    name: str
    distribution: Distribution
    loss: Callable[..., jax.Array] | None
    mass: Callable[..., jax.Array] | None = None
    outputs: Callable[..., jax.Array] | None = None
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Output:
    """A registered loss as discovery found it: `serial` counts registrations in the order of tracing.

    Attributes:
      shape: the shape of z where it was registered.
      mapped: sizes of the vmaps around it.
      nested: True inside a vmap or a loop, or when reached more than once: its draws are told apart by the data.
      looped: True inside a loop.
      subtracted: True where the loss subtracts it, whatever the data.
      positive: True where none of its weights is negative, whatever the data: nothing is to be counted.
      places: where it stands in the program (see `equations.places`).
    """

    serial: int
    spec: Spec
    shape: tuple[int, ...]
    mapped: tuple[int, ...]
    nested: bool
    looped: bool
    subtracted: bool = False
    positive: bool = False
    places: tuple[int, ...] = ()

    @property
    def batched(self) -> bool:
        """Whether the first axis of z is the batch."""
        free = len(self.shape) - self.spec.distribution.event_ndim
        return not self.mapped and free > (1 if self.looped and free == len(self.shape) else 0)

    @property
    def examples(self) -> int:
        return math.prod(self.mapped) if self.mapped else (self.shape[0] if self.batched else 1)

    @property
    def batches(self) -> set[int]:
        """Sizes that the batch may have: a vmap around the loss maps its examples, or members of an ensemble."""
        free = len(self.shape) - self.spec.distribution.event_ndim
        return {self.examples, self.shape[0]} if self.mapped and free else {self.examples}

    @property
    def columns(self) -> int:
        """The number of exact Fisher columns an example has."""
        return math.prod(self.shape[1:] if self.batched else self.shape)
