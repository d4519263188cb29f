"""Taps: every layer's curvature statistics of one step, in a lazy form.

They carry what the step was given; whoever reads a statistic runs the forward pass and the pull (its `jax.vjp`) again, with the
loss's mode swapped, inside its own `lax.cond`, so that a step that refreshes nothing costs a plain gradient. With
`recompute=False` they carry the pull's residuals instead, and the forward pass does not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax._jax import varying_axes
from kfe_optax._layers.layers import Layers
from kfe_optax._layers.paths import leaves_by_path
from kfe_optax._marks import loss_tags
from kfe_optax._statistics.statistics import Statistics, make_statistics
from kfe_optax._taps import microbatches
from kfe_optax._taps.plan import Given, Passage, Plan
from kfe_optax._taps.reductions import Pulled
from kfe_optax._taps.tap import Tap

if TYPE_CHECKING:
    from jaxtyping import Array, Float

T = TypeVar("T")


@jax.tree_util.register_pytree_node_class
class Taps:
    """The layers' statistics of one step, lazily; `taps[name]` is a layer's tap.

    A pytree of arrays (what the step was given, or the residuals of its backward pass), so that it passes through `jit`, `scan`,
    `pmap` and every Optax wrapper as an extra argument. It lives as long as the step.
    """

    def __init__(
        self, residuals: Any, given: Given | None, seed: Any, weights: Any, loss: Any, scale: Any, plan: Plan
    ):
        self._residuals = residuals  # (leaves, cotangent) of the one pass, None with microbatches
        self._given = given
        self._seed = seed
        self._weights = weights
        self._loss = loss
        self._scale = scale  # of the loss that was differentiated, None for 1
        self.plan = plan  # what is static about them
        self._kept: Passage | None = None
        self.loss_fn: Any = None  # which must live as long as the taps do: what is compiled holds it weakly

    def tree_flatten(self):
        return (self._residuals, self._given, self._seed, self._weights, self._loss, self._scale), self.plan

    @classmethod
    def tree_unflatten(cls, plan, children):
        return cls(*children, plan)

    @property
    def layers(self) -> Layers:
        """The layers, with the shapes of this step's batch."""
        return self.plan.layers

    def __getitem__(self, name: str) -> Tap:
        if name not in self.layers:
            raise KeyError(f"no tap {name!r}; the layers are {', '.join(self.layers)}")
        return Tap(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Taps({', '.join(self.layers)}; fisher={self.plan.fisher!r})"

    def _passage(self) -> Passage:
        """The step's one forward pass, which runs again where its residuals were not kept."""
        plan = self.plan
        if plan.microbatches > 1:
            raise ValueError(
                f"These taps run in {plan.microbatches} microbatches, and no single example's statistics are kept: leave "
                "microbatches at 1 for rows, example gradients and diagnostics."
            )
        if plan.swaps is not None:
            return Passage(*self._residuals, plan.swaps, 0)
        given = self._given
        assert given is not None
        if self._kept is not None:
            return self._kept
        passage = self._again((given.arrays, given.row_mask, 0))
        # Outside of jit one pass serves all that is read.
        if not any(isinstance(leaf, core.Tracer) for leaf in (*passage.leaves, passage.cotangent)):
            self._kept = passage
        return passage

    def mean_over_microbatches(self, function: Callable[[Passage], T]) -> T:
        """The mean of `function` over the forward passes: the one that was, or one of each microbatch that runs again."""
        plan = self.plan
        if plan.microbatches == 1:
            return function(self._passage())
        sums = microbatches.total(lambda part: function(self._again(part)), self._parts())
        return jax.tree.map(lambda v: v / plan.microbatches, sums)

    def _parts(self) -> Any:
        assert self._given is not None
        parts, _ = microbatches.separate(self.plan.stacked, self._given.arrays)
        return parts, self._given.row_mask, jnp.arange(self.plan.microbatches)

    def _arrays(self, parts: list[Any]) -> list[Any]:
        assert self._given is not None
        _, whole = microbatches.separate(self.plan.stacked, self._given.arrays)
        return microbatches.merge(self.plan.stacked, parts, whole)

    def _again(self, part: Any) -> Passage:
        assert self._given is not None
        arrays, row_mask, index = part
        if self.plan.microbatches > 1:
            arrays = self._arrays(arrays)
        passed = self.plan.forward(self._given.parameters, arrays, row_mask, self._scale)
        return Passage(passed.leaves, passed.cotangent, passed.swaps, index)

    def draw(self, index: Any, passage: Passage | None = None) -> dict[str, Statistics]:
        """One Fisher draw (a sample of the targets, or a column) for every layer, undivided by the number of samples."""
        plan = self.plan
        passage = self._passage() if passage is None else passage
        leaves, start = list(passage.leaves), 1.0
        if plan.fisher != "empirical":
            start = passage.swaps.start
            key = jax.random.wrap_key_data(self._seed, impl="threefry2x32")
            first = 0
            swaps = passage.swaps
            for output, modes, seeds in zip(plan.layers.outputs, swaps.modes, swaps.seeds, strict=True):
                if plan.fisher == "exact":
                    column = index - first
                    inside = (column >= 0) & (column < output.columns)
                    mode = jnp.stack([jnp.where(inside, loss_tags.EXACT, loss_tags.SILENT), column])
                    first += output.columns
                else:
                    mode = jnp.stack([jnp.asarray(loss_tags.SAMPLED), jnp.asarray(passage.microbatch)])
                folded = jax.random.fold_in(jax.random.fold_in(key, output.serial), index)
                for leaf in modes:
                    leaves[leaf] = varying_axes.like(mode.astype(jnp.int32), leaves[leaf])
                for leaf in seeds:
                    leaves[leaf] = varying_axes.like(jax.random.key_data(folded), leaves[leaf])
        _, riders = passage.pull(leaves, start)
        empirical = plan.fisher == "empirical"
        return {
            layer.name: make_statistics(layer, rider, empirical, self._scale)
            for layer, rider in zip(plan.layers.values(), riders["layers"], strict=True)
        }

    @property
    def loss(self) -> Float[Array, ""]:
        """The loss at the step's parameters, averaged over devices."""
        self._checked()
        return self.mean_over_devices(self._loss)

    def loss_at(self, parameters: Any) -> Float[Array, ""]:
        """The loss of the step's batch at other parameters, averaged over devices.

        They are a tree like the gradient; what is not in it (as under `optax.masked`) stays as it was.
        """
        given, plan = self._checked(), self.plan
        there = self._like_parameters(parameters, given.parameters)
        if plan.microbatches == 1:
            loss = plan.forward.loss(there, given.arrays)
        else:
            parts = self._parts()
            loss = jax.lax.map(lambda part: plan.forward.loss(there, self._arrays(part[0])), parts).mean()
        return self.mean_over_devices(loss if self._scale is None else loss / self._scale)

    def _like_parameters(self, tree: Any, default: Any) -> Any:
        """A tree in the container of the parameters: Optax's wrappers and NNX's optimizer hand on others."""
        given = leaves_by_path(tree)
        leaves = [
            given.get(path, other).astype(other.dtype) for path, other in leaves_by_path(default).items()
        ]
        return jax.tree.unflatten(self.plan.parameters, leaves)

    def tangent(self, vector: Any) -> list[jax.Array]:
        """√c B J v at each registered output, BᵀB its Fisher and c its weight in the loss, for a tree v like the gradient.

        J v is the transpose of the pull, so that the forward pass is shared (Martens & Grosse 2015, section 6.4 and appendix C);
        with microbatches it runs again, and each output has a leading axis of them.
        """
        given, plan = self._checked(), self.plan
        nothing = jax.tree.map(jnp.zeros_like, given.parameters)
        vector = self._like_parameters(vector, nothing)
        root = plan.microbatches**-0.5 if self._scale is None else (plan.microbatches * self._scale) ** -0.5
        scaled = jax.tree.map(lambda v: v * jnp.asarray(root, v.dtype), vector)
        if plan.microbatches == 1:
            return _tangent(self._passage(), scaled)
        return jax.lax.map(lambda part: _tangent(self._again(part), scaled), self._parts())

    def fisher_products(self, *tangents: list[jax.Array]) -> jax.Array:
        """vᵢᵀF vⱼ, (k, k), from the vectors' tangents; F is the exact Fisher over all parameters, averaged over devices."""

        def product(v, u):
            return sum(jnp.vdot(a, b) for a, b in zip(v, u, strict=True))

        return self.mean_over_devices(symmetric(product, tangents))

    @property
    def has_quadratic_model(self) -> bool:
        """Whether they know the loss, also at other parameters, and products with the Fisher."""
        return self._loss is not None

    def check_quadratic_model(self) -> None:
        """Raises ValueError for taps that were not asked for the quadratic model."""
        self._checked()

    def _checked(self) -> Given:
        if self._loss is None or self._given is None:
            raise ValueError(
                "These taps know neither the loss at other parameters nor products with the Fisher: ask for them with "
                "kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True)."
            )
        return self._given

    def mean_over_devices(self, value: jax.Array) -> jax.Array:
        """The mean over the mapped axis that the taps were made for; the value itself where there is none."""
        axis = self.plan.axis_name
        return value if axis is None else jax.lax.pmean(value, axis)

    def pulled(self) -> Pulled:
        """The taps with the pull run, when a single draw makes the estimate, so that several reductions share it."""
        single = self.plan.draws == 1 and self.plan.microbatches == 1
        return Pulled(self, self.draw(0) if single else None)

    @property
    def gradient_weight(self) -> Any:
        """Σc / Σc² over the loss's elements, N for a mean over N: the factor from squared mean gradients to the Fisher.

        With independent elements of weight c, E[(Σ c ∇)²] = Σ c² E[∇²] where the Fisher's diagonal is Σ c E[∇²]. None when
        the loss registers nothing.
        """
        if self._weights is None:
            return None
        total, square = self._weights[0], self._weights[1]
        devices: Any = 1
        if self.plan.axis_name is not None:
            # The loss is the mean over devices, whose weights may differ (masks).
            devices, total, square = jax.lax.psum((1, total, square), self.plan.axis_name)
        return devices * total / jnp.maximum(square, jnp.finfo(jnp.float32).tiny)

    def examples_of(self, name: str) -> Float[Array, ""]:
        """N, the examples that a layer saw in all microbatches and on all devices: its `gradient_weight` for a mean over them."""
        here = jnp.asarray(self.layers[name].examples * self.plan.microbatches, jnp.float32)
        return here if self.plan.axis_name is None else jax.lax.psum(here, self.plan.axis_name)

    @property
    def negative_weights(self) -> jax.Array:
        """Whether an element of a registered loss has a negative weight in the loss, which counts as zero in the Fisher."""
        known = self.plan.fisher == "empirical" or all(o.positive for o in self.layers.outputs)
        if self._weights is None or known:
            return jnp.zeros((), bool)
        number = self._weights[2]
        return (number if self.plan.axis_name is None else jax.lax.psum(number, self.plan.axis_name)) > 0


def _tangent(passage: Passage, vector: Any) -> list[jax.Array]:
    """√c B J v by transposing the pull."""
    swaps = passage.swaps

    def pull(cotangents):
        leaves = list(passage.leaves)
        for new, modes, places in zip(cotangents, swaps.modes, swaps.cotangents, strict=True):
            for leaf in modes:
                leaves[leaf] = varying_axes.like(jnp.array([loss_tags.TANGENT, 0], jnp.int32), leaves[leaf])
            for leaf in places:
                leaves[leaf] = new
        return passage.pull(leaves, swaps.start)[0]

    zeros = [passage.leaves[places[0]] for places in swaps.cotangents]
    vector = varying_axes.like(vector, zeros)
    return jax.linear_transpose(pull, zeros)(vector)[0]


def symmetric(product: Callable[[Any, Any], jax.Array], vectors: Sequence[Any]) -> jax.Array:
    """The matrix of all products of k vectors, (k, k), each pair taken once."""
    pairs = {(i, j): product(v, vectors[j]) for i, v in enumerate(vectors) for j in range(i + 1)}
    size = range(len(vectors))
    return jnp.stack([jnp.stack([pairs[max(i, j), min(i, j)] for j in size]) for i in size])
