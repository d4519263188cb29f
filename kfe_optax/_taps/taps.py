"""Taps: every layer's curvature statistics of one step, in a lazy form.

They carry what the step was given; whoever reads a statistic runs the forward pass and the pull (its `jax.vjp`) again, with the
loss's mode swapped, inside its own `lax.cond`, so that a step that refreshes nothing costs a plain gradient. With
`recompute=False` they carry the pull's residuals instead, and the forward pass does not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax._jax import varying_axes
from kfe_optax._layers.layers import Layers
from kfe_optax._layers.paths import leaves_by_path
from kfe_optax._marks import loss_tags
from kfe_optax._statistics.statistics import Statistics, make_statistics
from kfe_optax._taps import accumulation
from kfe_optax._taps.plan import Passage, Plan
from kfe_optax._taps.reductions import Pulled
from kfe_optax._taps.source import Source
from kfe_optax._taps.tap import Tap

if TYPE_CHECKING:
    from jaxtyping import Array, Float

T = TypeVar("T")


class Model(NamedTuple):
    """What the quadratic model knows: the loss, and the passes of products with the Fisher and of the loss elsewhere."""

    loss: jax.Array
    products: Source
    whole: Source


@jax.tree_util.register_pytree_node_class
class Taps:
    """The layers' statistics of one step, lazily; `taps[name]` is a layer's tap.

    A pytree of arrays (what the step was given, or the residuals of its backward pass), so that it passes through `jit`, `scan`,
    `pmap` and every Optax wrapper as an extra argument. It lives as long as the step.
    """

    def __init__(self, source: Source, model: Model | None, seed: Any, weights: Any, plan: Plan):
        self._source = source  # of the statistics
        self._model = model
        self._seed = seed
        self._weights = weights
        self.plan = plan  # what is static about them
        self.loss_fn: Any = None  # which must live as long as the taps do: what is compiled holds it weakly

    def tree_flatten(self):
        # A pass that serves several purposes is carried once.
        used = (self._source,) if self._model is None else (self._source, *self._model[1:])
        sources = list(dict.fromkeys(used))
        loss = None if self._model is None else self._model.loss
        return (sources, loss, self._seed, self._weights), (tuple(map(sources.index, used)), self.plan)

    @classmethod
    def tree_unflatten(cls, static, children):
        (places, plan), (sources, loss, seed, weights) = static, children
        source, *model = (sources[place] for place in places)
        return cls(source, Model(loss, *model) if model else None, seed, weights, plan)

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

    def mean_over_microbatches(self, function: Callable[[Passage], T]) -> T:
        """The mean of `function` over the forward passes: the one that was, or one of each microbatch that runs again."""
        return self._source.mean(function)

    def draw(self, index: Any, passage: Passage | None = None) -> dict[str, Statistics]:
        """One Fisher draw (a sample of the targets, or a column) for every layer, undivided by the number of samples."""
        plan = self.plan
        passage = self._source.passage() if passage is None else passage
        leaves, start = self._leaves(passage), 1.0
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
        empirical, scale = plan.fisher == "empirical", self._source.scale
        return {
            layer.name: make_statistics(layer, rider, empirical, scale)
            for layer, rider in zip(plan.layers.values(), riders["layers"], strict=True)
        }

    def _leaves(self, passage: Passage) -> list[Any]:
        """Those of the passage; one that sees a part of the batch alone stands for all of it."""
        leaves = list(passage.leaves)
        if not passage.swaps.shares or self._weights is None:
            return leaves
        _, cotangents = passage.pull(leaves)
        part, whole = accumulation.weights_of(cotangents)[:, 0], self._weights[:, 0]
        shares = jnp.where((part > 0) & (whole > 0), part / whole, 1)  # 1 for a mean, 1/k for a sum
        for share, places in zip(shares, passage.swaps.shares, strict=True):
            for leaf in places:
                leaves[leaf] = varying_axes.like(share.astype(leaves[leaf].dtype), leaves[leaf])
        return leaves

    @property
    def loss(self) -> Float[Array, ""]:
        """The loss at the step's parameters, averaged over devices."""
        return self.mean_over_devices(self._checked().loss)

    def loss_at(self, parameters: Any) -> Float[Array, ""]:
        """The loss of the step's batch at other parameters, averaged over devices.

        They are a tree like the gradient; what is not in it (as under `optax.masked`) stays as it was.
        """
        whole = self._checked().whole
        there = self._like_parameters(parameters, whole.parameters)
        return self.mean_over_devices(whole.loss(there))

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
        source = self._checked().products
        vector = self._like_parameters(vector, jax.tree.map(jnp.zeros_like, source.parameters))
        root = source.microbatches**-0.5
        if source.scale is not None:
            root = root * source.scale**-0.5

        scaled = jax.tree.map(lambda v: v * jnp.asarray(root, v.dtype), vector)
        return source.each(lambda passage: _tangent(passage, self._leaves(passage), scaled))

    def fisher_products(self, *tangents: list[jax.Array]) -> jax.Array:
        """vᵢᵀF vⱼ, (k, k), from the vectors' tangents; F is the exact Fisher over all parameters, averaged over devices."""

        def product(v, u):
            return sum(jnp.vdot(a, b) for a, b in zip(v, u, strict=True))

        return self.mean_over_devices(symmetric(product, tangents))

    @property
    def has_quadratic_model(self) -> bool:
        """Whether they know the loss, also at other parameters, and products with the Fisher."""
        return self._model is not None

    def check_quadratic_model(self) -> None:
        """Raises ValueError for taps that were not asked for the quadratic model."""
        self._checked()

    def _checked(self) -> Model:
        if self._model is None:
            raise ValueError(
                "These taps know neither the loss at other parameters nor products with the Fisher: ask for them with "
                "kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True)."
            )
        return self._model

    def mean_over_devices(self, value: jax.Array) -> jax.Array:
        """The mean over the mapped axis that the taps were made for; the value itself where there is none."""
        axis = self.plan.axis_name
        return value if axis is None else jax.lax.pmean(value, axis)

    def pulled(self) -> Pulled:
        """The taps with the pull run, when a single draw makes the estimate, so that several reductions share it."""
        single = self.plan.draws == 1 and self._source.microbatches == 1
        return Pulled(self, self.draw(0) if single else None)

    @property
    def gradient_weight(self) -> Any:
        """Σc / Σc² over the loss's elements, N for a mean over N: the factor from squared mean gradients to the Fisher.

        With independent elements of weight c, E[(Σ c ∇)²] = Σ c² E[∇²] where the Fisher's diagonal is Σ c E[∇²]. None when
        the loss registers nothing.
        """
        if self._weights is None:
            return None
        total, square, _ = self._weights.sum(0)
        devices: Any = 1
        if self.plan.axis_name is not None:
            # The loss is the mean over devices, whose weights may differ (masks).
            devices, total, square = jax.lax.psum((1, total, square), self.plan.axis_name)
        return devices * total / jnp.maximum(square, jnp.finfo(jnp.float32).tiny)

    def examples_of(self, name: str) -> Float[Array, ""]:
        """N, the examples that a layer saw in all microbatches and on all devices: its `gradient_weight` for a mean over them."""
        here = jnp.asarray(self.layers[name].examples * self.plan.forward.place.microbatches, jnp.float32)
        return here if self.plan.axis_name is None else jax.lax.psum(here, self.plan.axis_name)

    @property
    def negative_weights(self) -> jax.Array:
        """Whether an element of a registered loss has a negative weight in the loss, which counts as zero in the Fisher."""
        known = self.plan.fisher == "empirical" or all(o.positive for o in self.layers.outputs)
        if self._weights is None or known:
            return jnp.zeros((), bool)
        number = self._weights[:, 2].sum()
        return (number if self.plan.axis_name is None else jax.lax.psum(number, self.plan.axis_name)) > 0


def _tangent(passage: Passage, residuals: list[Any], vector: Any) -> list[jax.Array]:
    """√c B J v by transposing the pull."""
    swaps = passage.swaps

    def pull(cotangents):
        leaves = list(residuals)
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
