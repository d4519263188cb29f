"""Where statistics are read from: the step's forward pass, or one that runs again, on the batch, its microbatches or a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax._jax import explicit_axes
from kfe_optax._taps import microbatches
from kfe_optax._taps.forward import Forward, Swaps
from kfe_optax._taps.plan import Passage

T = TypeVar("T")


class Given(NamedTuple):
    """What the passes are given.

    Attributes:
      parameters: of the step.
      arrays: of the batch; those that `Source.stacked` names have a leading axis of microbatches.
      row_mask: likewise, or None.
      number: that of the part of the batch that it is, 0 where it is all of it.
    """

    parameters: Any
    arrays: list[Any]
    row_mask: Any
    number: Any = 0


@jax.tree_util.register_pytree_node_class
class Source:
    """The forward passes that something is read from.

    Attributes:
      residuals: (leaves, cotangent) of a pass that was; None where it runs again.
      given: what one that runs again is given; None where nothing does.
      scale: of the loss that was differentiated, None for 1.
      forward: the pass.
      swaps: of the residuals.
      stacked: which of the arrays have a leading axis of microbatches.
      shardings: in the types of what a pass is given, leaf by leaf (see `explicit_axes`): one that runs again inside an update
        has them again.
    """

    def __init__(
        self,
        residuals: Any,
        given: Given | None,
        scale: Any,
        forward: Forward,
        swaps: Swaps | None = None,
        stacked: tuple[bool, ...] = (),
        shardings: Any = None,
    ):
        self.residuals, self.given, self.scale = residuals, given, scale
        self.forward, self.swaps, self.stacked, self.shardings = forward, swaps, stacked, shardings
        self._kept: Passage | None = None

    def tree_flatten(self):
        static = self.forward, self.swaps, self.stacked, self.shardings
        return (self.residuals, self.given, self.scale), static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    @property
    def microbatches(self) -> int:
        """How many passes there are."""
        return self.forward.place.microbatches if any(self.stacked) else 1

    @property
    def parameters(self) -> Any:
        """Those that the passes are given."""
        assert self.given is not None
        return self.given.parameters

    def passage(self) -> Passage:
        """The one forward pass, which runs again where its residuals were not kept.

        Raises:
          ValueError: there are several.
        """
        if self.microbatches > 1:
            raise ValueError(
                f"These taps run in {self.microbatches} microbatches, and no single example's statistics are kept: leave "
                "microbatches at 1 for rows, example gradients and diagnostics."
            )
        if self.swaps is not None:
            return Passage(*self.residuals, self.swaps, 0)
        given = self.given
        assert given is not None
        if self._kept is not None:
            return self._kept
        passage = self._again((given.arrays, given.row_mask, given.number))
        # Outside of jit one pass serves all that is read.
        if not any(isinstance(leaf, core.Tracer) for leaf in (*passage.leaves, passage.cotangent)):
            self._kept = passage
        return passage

    def mean(self, function: Callable[[Passage], T]) -> T:
        """The mean of `function` over the passes."""
        if self.microbatches == 1:
            return function(self.passage())
        sums = microbatches.total(lambda part: function(self._again(part)), self._parts())
        return jax.tree.map(lambda v: v / self.microbatches, sums)

    def each(self, function: Callable[[Passage], Any]) -> Any:
        """`function` of the pass; of several, with a leading axis of them."""
        if self.microbatches == 1:
            return function(self.passage())
        return jax.lax.map(lambda part: function(self._again(part)), self._parts())

    def loss(self, parameters: Any) -> jax.Array:
        """The loss at other parameters, the mean over the passes, without its scale."""

        def one(part: Any) -> jax.Array:
            arrays, row_mask, _ = part
            return self._typed(lambda *given: self.forward.loss(*given[:2]), parameters, arrays, row_mask)

        if self.microbatches == 1:
            assert self.given is not None
            loss = one((self.given.arrays, self.given.row_mask, 0))
        else:
            loss = jax.lax.map(lambda part: one((self._arrays(part[0]), *part[1:])), self._parts()).mean()
        return loss if self.scale is None else loss / self.scale

    def _parts(self) -> Any:
        assert self.given is not None
        parts, _ = microbatches.separate(self.stacked, self.given.arrays)
        return parts, self.given.row_mask, jnp.arange(self.microbatches)

    def _arrays(self, parts: list[Any]) -> list[Any]:
        assert self.given is not None
        _, whole = microbatches.separate(self.stacked, self.given.arrays)
        return microbatches.merge(self.stacked, parts, whole)

    def _again(self, part: Any) -> Passage:
        arrays, row_mask, number = part
        if self.microbatches > 1:
            arrays = self._arrays(arrays)
        swaps: list[Swaps] = []

        def run(*given: Any) -> tuple[list[Any], jax.Array]:
            passed = self.forward(*given)
            swaps.append(passed.swaps)
            return passed.leaves, passed.cotangent

        leaves, cotangent = self._typed(run, self.parameters, arrays, row_mask)
        return Passage(leaves, cotangent, swaps[-1], number)

    def _typed(self, function: Callable[..., T], *given: Any) -> T:
        """`function(parameters, arrays, row mask, scale)` with their types of the step."""
        leaves, structure = jax.tree.flatten((*given, self.scale))

        def run(*leaves: Any) -> T:
            return function(*jax.tree.unflatten(structure, leaves))

        return explicit_axes.as_typed(run, self.shardings, *leaves)
