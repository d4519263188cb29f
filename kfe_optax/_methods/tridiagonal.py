"""`scale_by_block_tridiagonal`: K-FAC with a block-tridiagonal inverse, in which neighboring layers know of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks
from kfe_optax._layers.chains import Chains, Element, Plan, find_chains
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Devices, Distribute
from kfe_optax._methods import chain_roots, layerwise, periods, refreshes
from kfe_optax._methods.chain_roots import ChainRoots
from kfe_optax._methods.layerwise import Matrices, ScalarOrSchedule, Step
from kfe_optax._methods.roots import Inverses
from kfe_optax.factors import base
from kfe_optax.factors.chained import Chained, ChainedState


class TridiagonalRoots(NamedTuple):
    """Inverses, of one refresh each.

    Attributes:
      chains: what the chains apply, by the name of the chain.
      alone: {layer: (A⁻¹, G⁻¹)}, damped, of the layers that are chains of one.
    """

    chains: dict[str, ChainRoots]
    alone: dict[str, Any]


class TridiagonalState(NamedTuple):
    """State of `scale_by_block_tridiagonal` (inside a `LayerwiseState`).

    Attributes:
      factors: running averages of the factors.
      roots: the inverses.
      damping: λ of the last step.
      failures: by reason (`kfe.Failure`), int32: factors and factorizations that failed; the last good ones were kept, of a
        chain all or none.
      last_refresh: int32, the step of the last refresh of the roots.
    """

    factors: ChainedState
    roots: TridiagonalRoots
    damping: jax.Array
    failures: jax.Array
    last_refresh: jax.Array


def scale_by_block_tridiagonal(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    relative_damping: bool = False,
    chains: Chains = "whole",
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    floor: float = 1e-4,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions with K-FAC's block-tridiagonal inverse (Martens & Grosse 2015, section 4.3), exact where layers form a chain.

    F̂ has the blocks A_ij⊗G_ij of neighboring layers, A_ij = E[ā_i ā_jᵀ] and G_ij = E[g_i g_jᵀ], and a block-tridiagonal inverse
    F̂⁻¹ = Ξᵀ Λ Ξ. With Ψ^A_i = A_{i,i+1} A_{i+1,i+1}⁻¹, likewise Ψ^G_i:

    1. V_i ← V_i − Ψ^A_i V_{i+1} Ψ^G_iᵀ, but for the last layer;
    2. V_i ← Σ_i⁻¹ V_i, Σ_i = A_ii⊗G_ii − (Ψ^A_i A_{i+1,i+1} Ψ^A_iᵀ)⊗(Ψ^G_i G_{i+1,i+1} Ψ^G_iᵀ), of the last layer A⊗G;
    3. V_i ← V_i − Ψ^A_{i−1}ᵀ V_{i−1} Ψ^G_{i−1} with the V_{i−1} of step 2, but for the first layer.

    Diagonal blocks are damped as in `scale_by_kfac`, A + π√λ I and G + (√λ/π) I, wherever they appear, the others never. A layer
    that is a chain of one is preconditioned as by `scale_by_kfac`. Layers with several positions an example (dense layers on
    tokens, convolutions of one resolution) are paired position by position, A_ij = E[mean_t ā_i ā_jᵀ], G_ij = E[Σ_t g_i g_jᵀ].

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0, in units of the loss's curvature; a scalar or a schedule of the step.
      relative_damping: whether λ is `damping` times each layer's own mean curvature, so that it does not depend on the scale of
        the loss nor on that of the layer; `damping` is then a number without a unit, such as 0.1.
      chains: "whole": the network is one chain: the data feed the first layer alone, each layer the next one alone, the last
        one the loss. "split": the chains that it contains; what cannot be in one is a chain of one. Or the names of the layers
        of each chain, in order and whatever feeds them, such as [["encoder_0", "encoder_1"], ["decoder_0", "decoder_1"]].
        Layers that `nn.scan` stacks are taken apart, layer by layer. Data that only mask a layer's output (random bits,
        comparisons, indices), scale all features of a row alike, or are the same for all examples do not feed a layer.
      decay: ρ of the factors' running averages; the k-th update uses min(1 − 1/k, ρ).
      factor_update_period: steps between updates of the factors, each one more backward pass.
      inverse_update_period: steps between refreshes of the inverses.
      initial_refreshes: the first steps, in each of which everything is refreshed.
      refreshes_per_doubling: n > 0: periods begin at a fifth of what they are, and grow: n refreshes while the number of steps
        doubles. Curvature changes fastest in the beginning. 0: the periods as they are.
      floor: in (0, 1]: of Σ_i at least floor · A_ii⊗G_ii is inverted. In deep linear networks without damping Σ_i has a null
        space: the next layer explains all of this one.
      max_dim: a side larger than this is treated as diagonal, and its layer is a chain of one; None:
        8192.
      distribute: "none": every device factorizes everything; "inverses": each device factorizes its share, and all get the
        results; "inverses_and_apply": likewise each device preconditions its share in every step. See `scale_by_kronecker`.
      rest: the transformation of the parameters outside the layers; `optax.scale_by_adam()` by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`. Factors and inverses are float32 (float64 for float64
      parameters). A factorization that fails keeps the last good roots of its whole chain and is counted (`kfe.info`). A layer
      whose factors are zero passes its gradient on.

    Raises:
      TypeError: layers or chains that are none.
      ValueError: the layers are not such chains (the message names the layer), a damping that is not positive, a decay outside
        [0, 1], a floor outside (0, 1], a period that is not a positive whole number; in `update`: no taps, taps of other layers,
        a changed or partly masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3), nn.tanh, nn.Dense(2)])
      >>> x, labels = jax.random.normal(jax.random.key(0), (8, 5)), jnp.arange(8) % 2
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> def loss_fn(params):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params)
      >>> layers["layers_2"].inputs_from
      ('layers_0',)
      >>> tx = kfe.scale_by_block_tridiagonal(layers, damping=1e-2)
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, key=jax.random.key(2))
      >>> updates, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> updates["layers_0"]["kernel"].shape, int(kfe.info(state).failures)
      ((5, 4), 0)
    """
    checks.positive(damping=damping)
    checks.decay("decay", decay)
    checks.refreshes(
        initial_refreshes,
        refreshes_per_doubling,
        factor_update_period=factor_update_period,
        inverse_update_period=inverse_update_period,
    )
    checks.fraction("keeps the inverse positive and bounded", floor=floor)
    base.check_max_dim(max_dim)
    require_layers(layers)
    plan = find_chains(layers, chains, max_dim)
    method = _Tridiagonal(
        layers,
        plan,
        Chained(plan, decay),
        damping,
        relative_damping,
        floor,
        factor_update_period,
        inverse_update_period,
        periods.Early(initial_refreshes, refreshes_per_doubling),
        max_dim,
    )
    return layerwise.layerwise(layers, method, rest, distribute)


class _Tridiagonal(NamedTuple):
    layers: Layers
    plan: Plan
    factors: Chained
    damping: ScalarOrSchedule
    relative: bool
    floor: Any
    factor_update_period: Any
    inverse_update_period: Any
    early: periods.Early
    max_dim: int | None

    needs_taps = True
    reads_parameters = False

    @property
    def alone(self) -> Inverses:
        """The inverses of layers that are chains of one."""
        return Inverses("factored", self.relative)

    def init(self, layers: list[Layer]) -> TridiagonalState:
        factors = self.factors.init(layers, self.max_dim)
        roots = TridiagonalRoots(
            {name: chain_roots.unit(chain) for name, chain in factors.chains.items()},
            {n: self.alone.init(t, len(self.layers[n].stack_shape)) for n, t in factors.alone.items()},
        )
        return TridiagonalState(factors, roots, *layerwise.counters())

    def update(self, state: TridiagonalState, step: Step) -> tuple[Matrices, TridiagonalState]:
        damping = step.damping_of(self.damping, self.relative)
        now = refreshes.refreshed(
            self,
            state,
            step,
            lambda factors: self._refresh(factors, state.roots, damping, step.devices.inverses),
        )
        new = self._apply(now.factors, now.roots, step, damping)
        return new, TridiagonalState(now.factors, now.roots, damping, now.failures, now.last_refresh)

    def _refresh(
        self, factors: ChainedState, old: TridiagonalRoots, damping: jax.Array, devices: Devices
    ) -> tuple[TridiagonalRoots, jax.Array]:
        chains, chain_failures = chain_roots.refresh(
            factors.chains, old.chains, damping, devices, self.relative
        )
        terms = {name: (term,) for name, term in factors.alone.items()}
        alone, failures = self.alone.refresh(self.layers, terms, old.alone, damping, devices)
        return TridiagonalRoots(chains, alone), failures + chain_failures

    def _apply(
        self,
        factors: ChainedState,
        roots: TridiagonalRoots,
        step: Step,
        damping: jax.Array,
    ) -> Matrices:
        wide = {name: v.astype(self.layers[name].factor_dtype) for name, v in step.gradients.items()}
        chains = {str(chain[0]): chain for chain in self.plan.among(wide).chains}
        given = {
            name: [wide[e.layer] if e.index is None else wide[e.layer][e.index] for e in chain]
            for name, chain in chains.items()
        }
        results = chain_roots.apply(roots.chains, given, self.floor, step.devices.products)
        new: dict[Element, jax.Array] = {}
        for name, chain in chains.items():
            own = factors.chains[name]
            for i, element in enumerate(chain):
                # A layer without curvature passes its gradient on.
                alive = (jnp.trace(own.input[i]) > 0) & (jnp.trace(own.output[i]) > 0)
                new[element] = jnp.where(alive, results[name][i], given[name][i])
        whole = _stacked(new)
        alone = kronecker.each(
            lambda v, root: self.alone.apply(v, root, damping, v.ndim - 2),
            {name: (wide[name], roots.alone[name]) for name in factors.alone},
            step.devices.products,
        )
        return whole | alone


def _stacked(elements: Mapping[Element, jax.Array]) -> Matrices:
    """{layer: the matrices of its elements, stacked where it is}."""
    parts: dict[str, dict[int | None, jax.Array]] = {}
    for element, matrix in elements.items():
        parts.setdefault(element.layer, {})[element.index] = matrix
    return {
        name: own[None] if None in own else jnp.stack([own[i] for i in range(len(own))])
        for name, own in parts.items()
    }
