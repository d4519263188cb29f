"""`two_level`: a correction in a coarse space that couples the layers, added to any fine preconditioner."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import optax

from kfe_optax._jax import checks, explicit_axes
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._layers.paths import leaves_by_path
from kfe_optax._linalg import devices as devices_lib
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods import given, layerwise, periods
from kfe_optax._methods import request as request_lib
from kfe_optax._methods.kfac import scale_by_kfac
from kfe_optax._methods.layerwise import LayerwiseState, ScalarOrSchedule, Step
from kfe_optax._methods.roots import DampingType
from kfe_optax.contrib.coarse import options
from kfe_optax.contrib.coarse.grids import Choice
from kfe_optax.contrib.coarse.level import CoarseState, Level
from kfe_optax.contrib.coarse.options import FormName, SpaceName
from kfe_optax.factors import base


class TwoLevelState(NamedTuple):
    """State of `two_level`: the fine preconditioner's, with which it shares the step count, and the coarse level's.

    Attributes:
      version, count, method, rest, nonfinite, negative_weights: as in `LayerwiseState`, of the fine preconditioner.
      coarse: the coarse level.
    """

    version: jax.Array
    count: jax.Array
    method: Any
    rest: Any
    nonfinite: jax.Array
    negative_weights: jax.Array
    coarse: CoarseState

    @property
    def fine(self) -> LayerwiseState:
        """The state of the fine preconditioner."""
        fields = (self.version, self.count, self.method, self.rest, self.nonfinite, self.negative_weights)
        return LayerwiseState(*fields)


def two_level(
    fine: optax.GradientTransformation,
    layers: Layers,
    *,
    coarse: SpaceName = "constant",
    groups: int | None = None,
    count: int | None = None,
    form: FormName | None = None,
    grid: Choice = "finest",
    damping: ScalarOrSchedule = 1e-2,
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 100,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """Adds a coarse correction to a fine preconditioner: F̂⁻¹∇ + Zᵀ F_c⁻¹ Z∇, F_c = Z F Zᵀ + λI (Tselepidis et al. 2020).

    The rows of Z are a few coarse vectors of every layer (one set for each layer of a stack), so that F_c is small and holds the
    curvature *between* layers, which block-diagonal preconditioners leave out. The spaces:

    * "constant": one all-ones matrix a layer, so that Z∇ sums the gradients of each layer's parameters (the paper's);
    * "outputs": `groups` of them, each with ones for its share of the layer's output units (those of every block, where a layer
      has blocks);
    * "eigenvectors": the `count` eigenvectors p qᵀ of a layer's A⊗G with the largest eigenvalues, from K-FAC factors of its own;
    * "residual": one matrix a layer, its part of r = ∇ − (F + λI)Δ, normalized, where Δ is the fine update and F the exact
      Fisher of the batch, of the last refresh: the direction that the fine level left, layers taken together.

    The forms:

    * "factored", the default for all but the last: E[mean_t α_k α_l] · E[Σ_t γ_k γ_l] with α = pᵀā and γ = qᵀg, which is Z F̃ Zᵀ
      for F̃_ij = A_ij⊗G_ij without any cross-layer covariance of the size of a layer: two averages of the size of F_c;
    * "exact": E[ζ_k ζ_l] with ζ the projections of per-example gradients, which is Z F Zᵀ.

    Where layers share their parameters over positions (convolutions, tokens), the factored form needs one grid for all: at each
    of its positions every layer counts with the nearest of its own. "finest" repeats the positions of coarser layers, which keeps
    [F_c]_kk = pᵀAp · qᵀGq; "coarsest" leaves positions out, down to one where there is a layer with one position. α and γ are
    scaled so that a layer's mean over its T positions in A, and its sum in G, stay what they are: a pair with T and T' ≤ T
    positions counts √(T/T') times E[mean_t α_k α_l] · E[Σ_t' γ_k γ_l] of the coarser grid.

    Args:
      fine: a preconditioner of this package, such as `kfe.scale_by_kfac(...)`; clip and momentum go around the outcome.
      layers: what `kfe.find_layers` returned, the same as that of `fine`. Layers whose input is the same for all examples have
        no coarse vectors.
      coarse: the space, see above.
      groups: of "outputs"; 4 by default, fewer where a layer has fewer units.
      count: of "eigenvectors"; 4 by default.
      form: see above.
      grid: see above.
      damping: λ > 0 of the coarse level, a scalar or a schedule of the step; a change acts at once.
      relative_damping: whether λ is `damping` times the mean eigenvalue of F_c; not for "residual", whose r has a λ in it.
      decay: ρ of the running averages; the k-th update uses min(1 − 1/k, ρ). Where the coarse vectors change, at a refresh of
        "eigenvectors" and "residual", the averages start anew.
      factor_update_period: steps between updates of the averages, each one more backward pass.
      inverse_update_period: steps between eigendecompositions of F_c, and refreshes of the coarse vectors.
      initial_refreshes: the first steps, in each of which everything is refreshed.
      refreshes_per_doubling: n > 0: periods begin at a fifth of what they are, and grow: n refreshes while the number of steps
        doubles. Curvature changes fastest in the beginning. 0: the periods as they are.
      max_dim: a side larger than this has unit vectors for eigenvectors, for "eigenvectors"; None: 8192.
      distribute: how devices share the eigendecompositions of A and G, for "eigenvectors"; see `scale_by_kronecker`. `fine` has
        an option of its own, and F_c is one small matrix, which is not divided.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`, which hands further arguments on to `fine`. Its state is that
      of `fine` with a field `coarse`. A coarse vector without curvature corrects nothing. An estimate or a factorization that
      fails keeps the last good one and is counted.

    Raises:
      TypeError: `fine` is no preconditioner of this package, or layers that are none.
      ValueError: an option that does not exist or does not belong to the space, a damping that is not positive, a decay outside
        [0, 1], a period that is not a positive whole number; in `init`: "factored" and a layer that is used more than once; in
        `update`: no taps, or taps of other layers.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     for layer in params:
      ...         x = kfe.tag_dense(x, x @ layer["kernel"], layer)
      ...     return kfe.losses.l2_loss(x, y).sum(-1).mean()
      >>> params, x, y = [{"kernel": jnp.eye(3)}, {"kernel": jnp.ones((3, 2))}], jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> tx = kfe.two_level(kfe.scale_by_kfac(layers, damping=1e-2), layers, coarse="outputs", groups=2)
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, y)
      >>> updates, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> state.coarse.basis.values.shape, updates[0]["kernel"].shape
      ((4,), (3, 3))
    """
    if not (callable(getattr(fine, "init", None)) and callable(getattr(fine, "update", None))):
        raise TypeError(
            f"fine must be a preconditioner such as kfe.scale_by_kfac(layers, ...), not {fine!r}; the layers come second."
        )
    require_layers(layers)
    checks.positive(damping=damping)
    checks.decay("decay", decay)
    checks.refreshes(
        initial_refreshes,
        refreshes_per_doubling,
        factor_update_period=factor_update_period,
        inverse_update_period=inverse_update_period,
    )
    base.check_max_dim(max_dim)
    space = options.space_of(coarse, groups, count, decay, max_dim)
    level = Level(
        layers,
        space,
        options.form_of(space, coarse, form, grid),
        damping,
        relative_damping,
        decay,
        factor_update_period,
        inverse_update_period,
        periods.Early(initial_refreshes, refreshes_per_doubling),
    )
    if relative_damping and coarse == "residual":
        raise ValueError(
            "coarse='residual' takes a damping in the loss's units: take relative_damping=False."
        )
    devices_lib.check_distribute(distribute)
    return _added(optax.with_extra_args_support(fine), layers, level, distribute)


def _added(
    fine: optax.GradientTransformationExtraArgs, layers: Layers, level: Level, distribute: Distribute
) -> optax.GradientTransformationExtraArgs:
    """The sum of the fine update and the coarse level's correction."""

    def init(params):
        state: Any = fine.init(params)
        if not isinstance(state, LayerwiseState):
            raise TypeError(
                "fine must be a preconditioner of this package, such as kfe.scale_by_kfac(layers, ...), not a transformation "
                f"with a {type(state).__name__} as its state; put two_level inside chains, clips and wrappers."
            )
        return TwoLevelState(*state, level.init(level.present(given.leaves_at_start(level.layers, params))))

    def update(updates, state, params=None, *, taps=None, request=None, **extra):
        checks.state(state, TwoLevelState)
        given.check_taps(layers, taps)
        request = request_lib.checked(request)
        result: Any = fine.update(updates, state.fine, params, taps=taps, request=request, **extra)
        new, fine_state = result
        leaves, fine_leaves = leaves_by_path(updates), leaves_by_path(new)
        present = level.present(leaves)
        again = request.first is not None
        added, coarse = _step(
            again,
            devices_lib.division(distribute, layerwise.axis_of(taps)),
            state.coarse,
            state.count - again,
            layerwise.matrices_of(present, leaves),
            layerwise.matrices_of(present, fine_leaves),
            layerwise.all_finite(leaves.values()),
            taps,
        )
        for layer in present:
            for path, leaf in layer.from_matrix(added[layer.name]).items():
                fine_leaf = fine_leaves[path]
                fine_leaves[path] = layerwise.narrowed(leaf + fine_leaf, fine_leaf.dtype)
        # Flattening order is that of the paths.
        ordered = list(fine_leaves.values())
        return jax.tree.unflatten(jax.tree.structure(new), ordered), TwoLevelState(*fine_state, coarse)

    # Compiled by itself, as the step of `layerwise` is.
    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _step(again, division, state, count, gradients, fine_updates, finite, taps):
        step = Step(count, gradients, finite, taps, None, {}, None, again, division)
        return level.update(state, step, fine_updates)

    return optax.GradientTransformationExtraArgs(init, explicit_axes.on_any_mesh(update))


def scale_by_two_level_kfac(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    coarse: SpaceName = "constant",
    groups: int | None = None,
    count: int | None = None,
    form: FormName | None = None,
    grid: Choice = "finest",
    coarse_damping: ScalarOrSchedule = 1e-2,
    damping_type: DampingType = "factored",
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Two-level K-FAC (Tselepidis et al. 2020): `two_level` around `scale_by_kfac`, both with the same periods and decay.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ of K-FAC, a scalar or a schedule of the step.
      coarse, groups, count, form, grid: see `two_level`.
      coarse_damping: λ of the coarse level.
      damping_type, relative_damping, decay, factor_update_period, inverse_update_period, initial_refreshes,
        refreshes_per_doubling, max_dim, distribute, rest: see `scale_by_kfac`; of both levels.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`.

    Raises:
      TypeError, ValueError: as `scale_by_kfac` and `two_level` do.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> tx = kfe.scale_by_two_level_kfac(layers, damping=1e-2, coarse_damping=0.1)
      >>> tx.init(params).coarse.basis.values.shape
      (1,)
    """
    checks.positive(coarse_damping=coarse_damping)
    shared = {
        "decay": decay,
        "factor_update_period": factor_update_period,
        "inverse_update_period": inverse_update_period,
        "initial_refreshes": initial_refreshes,
        "refreshes_per_doubling": refreshes_per_doubling,
        "max_dim": max_dim,
        "distribute": distribute,
    }
    shared["relative_damping"] = relative_damping
    fine = scale_by_kfac(layers, damping, damping_type=damping_type, rest=rest, **shared)
    return two_level(
        fine,
        layers,
        coarse=coarse,
        groups=groups,
        count=count,
        form=form,
        grid=grid,
        damping=coarse_damping,
        **shared,
    )
