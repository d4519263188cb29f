"""`scale_by_kronecker`: preconditioning with the damped inverse of any factors, A⊗B or A⊗B + C⊗D."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from kfe_optax import factors as factors_lib
from kfe_optax._jax import checks
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker
from kfe_optax._linalg.devices import Distribute
from kfe_optax._methods import layerwise, periods, refreshes, roots
from kfe_optax._methods.layerwise import Matrices, ScalarOrSchedule, Step
from kfe_optax._methods.roots import DampingType, Denominators
from kfe_optax.factors.base import Factors


class KroneckerState(NamedTuple):
    """State of `scale_by_kronecker` (inside a `LayerwiseState`).

    Attributes:
      factors: the state of the factors (running averages).
      roots: {layer: (input side, output side)}: damped inverses (rank 1), eigenbases ("exact"), or the simultaneous
        diagonalizations of a rank-2 sum.
      damping: λ of the last step; where it is relative, as a multiple of each layer's mean curvature.
      failures: by reason (`kfe.Failure`), int32: factors and factorizations that failed; the last good one was kept.
      last_refresh: int32, the step of the last refresh of the roots.
    """

    factors: Any
    roots: dict[str, Any]
    damping: jax.Array
    failures: jax.Array
    last_refresh: jax.Array


def scale_by_kronecker(
    layers: Layers,
    damping: ScalarOrSchedule,
    *,
    factors: Factors | None = None,
    damping_type: DampingType = "factored",
    relative_damping: bool = False,
    denominators: Denominators = "clip",
    floor: float = 0.1,
    factor_update_period: int = 10,
    inverse_update_period: int = 50,
    initial_refreshes: int = 3,
    refreshes_per_doubling: int = 0,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient with the damped inverse of its Kronecker factors, of rank 1 or 2.

    Rank 1, F ≈ A⊗B: (A + a I)⁻¹ V (B + b I)⁻¹. Rank 2, F ≈ A⊗B + C⊗D with the first term damped: K₁[(K₁ᵀ V K₂) ⊘ d]K₂ᵀ, where
    K₁ᵀ(A + a I)K₁ = I, K₁ᵀ C K₁ = diag(s₁), likewise K₂ and s₂, and d = 1 + s₁ s₂ᵀ is kept positive (Koroko et al. 2022, section
    3.5). a and b follow from λ:

    * "factored": a = π√λ, b = √λ/π, π = sqrt[(tr A/d_in)/(tr B/d_out)] (Martens & Grosse 2015, section 6.3);
    * "sqrt": a = b = √λ;
    * "linear": a = b = λ, with which Koroko et al. ran their methods of rank 2;
    * "exact", for rank 1: (A⊗B + λI)⁻¹ through the eigenvectors, where a changing λ acts at once.

    Args:
      layers: what `kfe.find_layers` returned.
      damping: λ > 0, in units of the loss's curvature; a scalar or a schedule of the step.
      factors: one of `kfe.factors`; `kfe.factors.kfac()` by default.
      damping_type: see above.
      relative_damping: whether λ is `damping` times each layer's own mean curvature, so that it does not depend on the scale of
        the loss nor on that of the layer; `damping` is then a number without a unit, such as 0.1.
        With "factored" it adds √damping times the mean eigenvalue to each factor; "sqrt" and "linear" have no such form.
      denominators: for rank 2, "clip": d = max(1 + s₁ s₂ᵀ, floor), the exact inverse where the sum is well above zero;
        "absolute": d = 1 + |s₁||s₂|ᵀ, as the authors' code has it.
      floor: of "clip", in (0, 1]: what is inverted is at least floor times the damped first term, and so positive definite.
      factor_update_period: steps between updates of the factors, each one more backward pass (none for gradient factors).
      inverse_update_period: steps between refreshes of the inverses.
      initial_refreshes: the first steps, in each of which everything is refreshed.
      refreshes_per_doubling: n > 0: periods begin at a fifth of what they are, and grow: n refreshes while the number of steps
        doubles. Curvature changes fastest in the beginning. 0: the periods as they are.
      max_dim: a side larger than this is treated as diagonal; None: 8192.
      distribute: how devices that take the same step share its linear algebra. "none": each does all of it. "inverses": each has
        1/n of the factorizations of a refresh, and the results are gathered in the refresh. "inverses_and_apply": each also
        preconditions its share of the layers, and the updates are gathered in every step. The devices are those of the taps'
        `axis_name` in `pmap` and `shard_map`, and under a plain `jit` those of the mesh in context (`jax.set_mesh`); one alone
        does everything in any case. Power iterations (`kfe.factors.kpsvd` and its like) are not divided: there each device
        multiplies with its own examples as it is.
      rest: the transformation of the parameters outside the layers; `optax.scale_by_adam()` by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)` (no taps for `kfe.factors.gradient()`). Factors and inverses
      are float32 (float64 for float64 parameters). An estimate or a factorization that fails keeps the last good one and is
      counted (`kfe.info`). A layer whose factors are zero passes its gradient on.

    Raises:
      ValueError: a damping that is not positive, factors of a rank above 2, an option that does not exist or does not fit the
        rank, a period that is not a positive whole number; in `update`: no taps, taps of other layers, a changed or partly
        masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, y):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z, y).sum(-1).mean()
      >>> params, x, y = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.zeros((3, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, y)
      >>> tx = kfe.scale_by_kronecker(layers, damping=1e-3, factors=kfe.factors.lanczos())
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, y, key=jax.random.key(0))
      >>> updates, state = tx.update(grads, tx.init(params), params, taps=taps)
      >>> updates["kernel"].shape, int(kfe.info(state).failures)
      ((3, 2), 0)
    """
    if factors is None:
        factors = factors_lib.kfac()
    if not callable(getattr(factors, "terms", None)):
        raise TypeError(f"factors must be one of kfe.factors, such as kfe.factors.kpsvd(), not {factors!r}.")
    checks.positive(damping=damping)
    form = _form(factors, damping_type, relative_damping, denominators, floor)
    checks.refreshes(
        initial_refreshes,
        refreshes_per_doubling,
        factor_update_period=factor_update_period,
        inverse_update_period=inverse_update_period,
    )
    method = _Kronecker(
        layers,
        factors,
        form,
        damping,
        relative_damping,
        factor_update_period,
        inverse_update_period,
        periods.Early(initial_refreshes, refreshes_per_doubling),
        max_dim,
    )
    return layerwise.layerwise(layers, method, rest, distribute)


def _form(factors: Factors, damping_type: Any, relative: bool, denominators: Any, floor: Any) -> roots.Form:
    if factors.rank > 2:
        raise ValueError(
            f"A sum of {factors.rank} Kronecker products has no inverse in closed form; choose factors of rank 1 or 2 here, "
            "or take the basis of their leading term with kfe.in_kfe."
        )
    checks.one_of("damping_type", damping_type, DampingType)
    checks.one_of("denominators", denominators, Denominators)
    checks.fraction("keeps the inverse positive", floor=floor)
    if relative and damping_type not in ("factored", "exact"):
        raise ValueError(
            "relative_damping goes with damping_type='factored' or 'exact': "
            f"{damping_type!r} adds the same number to both factors."
        )
    if factors.rank == 1:
        return (
            roots.Eigenbases(relative) if damping_type == "exact" else roots.Inverses(damping_type, relative)
        )
    if damping_type == "exact":
        raise ValueError(
            "damping_type='exact' needs the eigenvectors of one Kronecker product, and these factors are a sum of two; "
            "choose 'factored', 'sqrt' or 'linear', which damp the first."
        )
    return roots.Pencils(damping_type, denominators, floor, relative)


class _Kronecker(NamedTuple):
    layers: Layers
    factors: Factors
    form: roots.Form
    damping: ScalarOrSchedule
    relative: bool
    factor_update_period: Any
    inverse_update_period: Any
    early: periods.Early
    max_dim: int | None

    reads_parameters = False

    @property
    def needs_taps(self) -> bool:
        return self.factors.needs_taps

    def init(self, layers: list[Layer]) -> KroneckerState:
        factors = self.factors.init(layers, self.max_dim)
        terms = self.factors.terms(factors, self.layers)
        first = {layer.name: self.form.init(terms[layer.name][0], len(layer.stack_shape)) for layer in layers}
        return KroneckerState(factors, first, *layerwise.counters())

    def update(self, state: KroneckerState, step: Step) -> tuple[Matrices, KroneckerState]:
        damping = step.damping_of(self.damping, self.relative)

        def invert(factors: Any) -> Any:
            # The terms are formed inside: where that takes arithmetic, a step without a refresh does not pay for it.
            terms = self.factors.terms(factors, self.layers)
            return self.form.refresh(self.layers, terms, state.roots, damping, step.devices.inverses)

        now = refreshes.refreshed(self, state, step, invert)
        wide = {name: v.astype(self.layers[name].factor_dtype) for name, v in step.gradients.items()}
        new = kronecker.each(
            lambda v, root: self.form.apply(v, root, damping, v.ndim - 2),
            {name: (v, now.roots[name]) for name, v in wide.items()},
            step.devices.products,
        )
        return new, KroneckerState(now.factors, now.roots, damping, now.failures, now.last_refresh)
