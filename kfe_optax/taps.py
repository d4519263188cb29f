"""Taps: every layer's curvature statistics of one step, in a lazy form.

They carry the pull (the residuals of the step's `jax.vjp`); whoever reads a statistic runs the pull again with the loss's mode
swapped, inside its own `lax.cond`, so that a step that refreshes nothing costs a plain gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax import outputs
from kfe_optax.layer import leaves_by_path
from kfe_optax.layers import Layers
from kfe_optax.statistics import Statistics, make_statistics
from kfe_optax.tap import Tap

Fisher = Literal["sampled", "empirical", "exact"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What is static about the loss of a step: the function (held weakly) and what of its arguments is no array."""

    reference: Any
    rebuild: Callable[..., Any]
    static: Any
    has_aux: bool

    def __call__(self, parameters: Any, arrays: Any) -> jax.Array:
        """The loss at these parameters; mutable state moves on in a copy."""
        loss_fn = self.reference()
        if loss_fn is None:
            raise ReferenceError(
                "The loss function of these taps is gone: keep a reference to it as long as to the taps."
            )
        other, args, kwargs = self.static(arrays)
        loss = loss_fn(self.rebuild(parameters, other, {}), *args, **kwargs)
        return loss[0] if self.has_aux else loss


class Trial(NamedTuple):
    """What the quadratic model needs besides the pull: the loss, and the step's parameters and other arrays."""

    loss: jax.Array
    parameters: Any
    arrays: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about taps: how to run the pull, and for which layers."""

    structure: Any  # the pull's tree structure
    modes: tuple[tuple[int, ...], ...]  # for each registered loss, which of the pull's leaves are its mode
    seeds: tuple[tuple[int, ...], ...]
    tangents: tuple[tuple[int, ...], ...]  # likewise, the cotangents that are swapped for products with J
    layers: Layers
    fisher: Fisher
    num_samples: int
    axis_name: Any
    evaluate: Evaluate | None
    parameters: Any  # the tree structure of the parameters

    @property
    def draws(self) -> int:
        """The number of Fisher pulls whose sum (or mean) is the estimate."""
        if self.fisher == "exact":
            return sum(output.columns for output in self.layers.outputs)
        return self.num_samples if self.fisher == "sampled" else 1


@jax.tree_util.register_pytree_node_class
class Taps:
    """The layers' statistics of one step, lazily; `taps[name]` is a layer's tap.

    A pytree of arrays (the residuals of the step's backward pass), so that it passes through `jit`, `scan`, `pmap` and every
    Optax wrapper as an extra argument. It lives as long as the step.
    """

    def __init__(self, leaves: list[Any], cotangent: Any, seed: Any, weights: Any, trial: Any, plan: Plan):
        self._leaves = leaves
        self._cotangent = cotangent
        self._seed = seed
        self._weights = weights
        self._trial = trial
        self._plan = plan

    def tree_flatten(self):
        return (self._leaves, self._cotangent, self._seed, self._weights, self._trial), self._plan

    @classmethod
    def tree_unflatten(cls, plan, children):
        return cls(*children, plan)

    @property
    def layers(self) -> Layers:
        """The layers, with the shapes of this step's batch."""
        return self._plan.layers

    def __getitem__(self, name: str) -> Tap:
        if name not in self.layers:
            raise KeyError(f"no tap {name!r}; the layers are {', '.join(self.layers)}")
        return Tap(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Taps({', '.join(self.layers)}; fisher={self._plan.fisher!r})"

    def draw(self, index: Any) -> dict[str, Statistics]:
        """One Fisher draw (a sample of the targets, or a column) for every layer, undivided by the number of samples."""
        plan = self._plan
        leaves = list(self._leaves)
        if plan.fisher != "empirical":
            key = jax.random.wrap_key_data(self._seed, impl="threefry2x32")
            first = 0
            for output, modes, seeds in zip(plan.layers.outputs, plan.modes, plan.seeds, strict=True):
                if plan.fisher == "exact":
                    column = index - first
                    inside = (column >= 0) & (column < output.columns)
                    mode = jnp.stack([jnp.where(inside, outputs.EXACT, outputs.SILENT), column])
                    first += output.columns
                else:
                    mode = jnp.array([outputs.SAMPLED, 0])
                folded = jax.random.fold_in(jax.random.fold_in(key, output.serial), index)
                for leaf in modes:
                    leaves[leaf] = mode.astype(jnp.int32)
                for leaf in seeds:
                    leaves[leaf] = jax.random.key_data(folded)
        pull = jax.tree.unflatten(plan.structure, leaves)
        _, riders = pull(self._cotangent)
        empirical = plan.fisher == "empirical"
        return {
            layer.name: make_statistics(layer, rider, empirical)
            for layer, rider in zip(plan.layers.values(), riders["layers"], strict=True)
        }

    @property
    def loss(self) -> jax.Array:
        """The loss at the step's parameters, averaged over devices."""
        self.check_quadratic_model()
        return self.mean_over_devices(self._trial.loss)

    def loss_at(self, parameters: Any) -> jax.Array:
        """The loss of the step's batch at other parameters, averaged over devices.

        They are a tree like the gradient; what is not in it (as under `optax.masked`) stays as it was.
        """
        self.check_quadratic_model()
        there = self._like_parameters(parameters, self._trial.parameters)
        return self.mean_over_devices(self._plan.evaluate(there, self._trial.arrays))  # ty: ignore

    def _like_parameters(self, tree: Any, default: Any) -> Any:
        """A tree in the container of the parameters: Optax's wrappers and NNX's optimizer hand on others."""
        given = leaves_by_path(tree)
        leaves = [
            given.get(path, other).astype(other.dtype) for path, other in leaves_by_path(default).items()
        ]
        return jax.tree.unflatten(self._plan.parameters, leaves)

    def tangent(self, vector: Any) -> list[jax.Array]:
        """√c B J v at each registered output, BᵀB its Fisher and c its weight in the loss, for a tree v like the gradient.

        J v is the transpose of the pull, so that the forward pass is shared (Martens & Grosse 2015, section 6.4 and appendix C).
        """
        self.check_quadratic_model()
        plan = self._plan

        def pull(cotangents):
            leaves = list(self._leaves)
            for new, modes, places in zip(cotangents, plan.modes, plan.tangents, strict=True):
                for leaf in modes:
                    leaves[leaf] = jnp.array([outputs.TANGENT, 0], jnp.int32)
                for leaf in places:
                    leaves[leaf] = new
            return jax.tree.unflatten(plan.structure, leaves)(self._cotangent)[0]

        zeros = [self._leaves[places[0]] for places in plan.tangents]
        nothing = jax.tree.map(jnp.zeros_like, self._trial.parameters)
        return jax.linear_transpose(pull, zeros)(self._like_parameters(vector, nothing))[0]

    def fisher_products(self, *tangents: list[jax.Array]) -> jax.Array:
        """vᵢᵀF vⱼ, (k, k), from the vectors' tangents; F is the exact Fisher over all parameters, averaged over devices."""

        def product(v, u):
            return sum(jnp.vdot(a, b) for a, b in zip(v, u, strict=True))

        return self.mean_over_devices(symmetric(product, tangents))

    def check_quadratic_model(self) -> None:
        """Raises ValueError for taps that were not asked for the quadratic model."""
        if self._trial is None:
            raise ValueError(
                "These taps know neither the loss at other parameters nor products with the Fisher: ask for them with "
                "kfe.value_grad_and_taps(loss_fn, layers, quadratic_model=True)."
            )

    def mean_over_devices(self, value: jax.Array) -> jax.Array:
        """The mean over the mapped axis that the taps were made for; the value itself where there is none."""
        axis = self._plan.axis_name
        return value if axis is None else jax.lax.pmean(value, axis)

    def pulled(self) -> Pulled:
        """The taps with the pull run, when a single draw makes the estimate, so that several reductions share it."""
        return Pulled(self, self.draw(0) if self._plan.draws == 1 else None)

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
        if self._plan.axis_name is not None:
            # The loss is the mean over devices, whose weights may differ (masks).
            devices, total, square = jax.lax.psum((1, total, square), self._plan.axis_name)
        return devices * total / jnp.maximum(square, jnp.finfo(jnp.float32).tiny)


def symmetric(product: Callable[[Any, Any], jax.Array], vectors: Sequence[Any]) -> jax.Array:
    """The matrix of all products of k vectors, (k, k), each pair taken once."""
    pairs = {(i, j): product(v, vectors[j]) for i, v in enumerate(vectors) for j in range(i + 1)}
    size = range(len(vectors))
    return jnp.stack([jnp.stack([pairs[max(i, j), min(i, j)] for j in size]) for i in size])


class Pulled:
    """Taps inside one refresh (see `Taps.pulled`)."""

    def __init__(self, taps: Taps, statistics: dict[str, Statistics] | None):
        self._taps = taps
        self._statistics = statistics

    def inputs(self, function: Callable[[dict[str, Statistics]], T]) -> T:
        """`function(statistics by layer)` averaged over devices, for what depends on the inputs ā alone."""
        plan = self._taps._plan
        value = function(self._taps.draw(0) if self._statistics is None else self._statistics)
        return value if plan.axis_name is None else jax.lax.pmean(value, plan.axis_name)

    def reduce(self, function: Callable[[dict[str, Statistics]], T]) -> T:
        """Σ over exact columns, or the mean over samples, of `function(statistics by layer)`, averaged over devices.

        `function` maps the statistics of one draw to a pytree of arrays that are quadratic in g.
        """
        plan = self._taps._plan
        total = self._loop(function) if self._statistics is None else function(self._statistics)
        if plan.axis_name is not None:
            total = jax.lax.pmean(total, plan.axis_name)
        return total

    def rows(self, name: str) -> tuple[jax.Array, jax.Array] | None:
        """ā (*stack, n, d_in) and g (*stack, n, d_out) of a layer with one position an example, F = (1/n) Σ (ā⊗g)(ā⊗g)ᵀ.

        None where they are not the whole of F: several draws, several devices, shared positions, statistics that are sums.
        """
        if self._statistics is None or self._taps._plan.axis_name is not None:
            return None
        layer = self._taps.layers[name]
        if not layer.has_rows or layer.positions > 1 or layer.kind.statistics != "rows":
            return None
        a, g = self._statistics[name].rows()
        return (a[..., 0, :], g[..., 0, :]) if a.shape[-2] == 1 else None

    def _loop(self, function: Callable[[dict[str, Statistics]], Any]) -> Any:
        plan = self._taps._plan
        shapes = jax.eval_shape(lambda: function(self._taps.draw(0)))

        def add(total, index):
            return jax.tree.map(jnp.add, total, function(self._taps.draw(index))), None

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, jnp.arange(plan.draws))
        return total if plan.fisher == "exact" else jax.tree.map(lambda v: v / plan.draws, total)
