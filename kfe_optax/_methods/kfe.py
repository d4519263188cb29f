"""`in_kfe`: any Optax transformation in the Kronecker-factored eigenbasis of any factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfe_optax import factors as factors_lib
from kfe_optax._jax import checks, counts, failures
from kfe_optax._jax.failures import Failure
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._linalg import kronecker, moving
from kfe_optax._linalg.devices import Devices, Distribute
from kfe_optax._linalg.moving import Pair
from kfe_optax._methods import basis as basis_lib
from kfe_optax._methods import layerwise, periods
from kfe_optax._methods.basis import Refresh
from kfe_optax._methods.layerwise import Matrices, Step
from kfe_optax._methods.refreshes import update_factors
from kfe_optax._methods.rest import sound
from kfe_optax.factors.base import Factors

Carry = Literal["first", "second", "columns", "keep"] | Callable[[jax.Array, Pair, Pair], jax.Array]

_MOVES: Mapping[str, Callable[..., jax.Array]] = {
    "first": moving.carry_first_moment,
    "second": moving.carry_second_moment,
    "columns": moving.carry_columns,
}
# How the fields of Optax's states move: what is linear in the gradient, and what is quadratic in it.
CARRY: Mapping[str, Carry] = {
    "mu": "first",
    "trace": "first",
    "ema": "first",
    "nu": "second",
    "nu_max": "second",
    "sum_of_squares": "second",
    "e_g": "second",
    "e_x": "second",
}


class KfeState(NamedTuple):
    """State of `in_kfe` (inside a `LayerwiseState`).

    Attributes:
      factors: the state of the factors.
      basis: {layer: (Eigenbasis of the input side, of the output side)}.
      inner: the state of the inner transformation, in the basis.
      failures: by reason (`kfe.Failure`), int32: factors, factorizations and inner states that failed; the last good one was
        kept.
      last_refresh: int32, the step of the last refresh of the basis.
    """

    factors: Any
    basis: dict[str, Any]
    inner: Any
    failures: jax.Array
    last_refresh: jax.Array


class KfeInfo(NamedTuple):
    """What an inner transformation is given as the extra argument `kfe`, if it takes extra arguments.

    Attributes:
      eigenvalues: {layer: s_A s_Bᵀ (*stack, d_in, d_out)} of the basis.
      first: whether this is the first step with a basis.
      gradient_weight: the factor from squared mean gradients to the Fisher (N for a mean over N); None with factors that read
        no taps.
    """

    eigenvalues: Matrices
    first: jax.Array
    gradient_weight: Any


def in_kfe(
    inner: optax.GradientTransformation,
    layers: Layers,
    *,
    basis: Factors | None = None,
    carry: Mapping[str, Carry] | None = None,
    factor_update_period: int = 10,
    basis_update_period: int = 50,
    initial_refreshes: int = 1,
    refreshes_per_doubling: int = 0,
    refresh: Refresh = "eigh",
    refresh_tolerance: float | None = None,
    max_dim: int | None = None,
    distribute: Distribute = "none",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs any Optax transformation in the Kronecker-factored eigenbasis: U_A · inner(U_Aᵀ V U_B) · U_Bᵀ.

    U_A and U_B are the eigenvectors of the leading term A⊗B of any factors. With `scale_by_adam` and `kfe.factors.gradient()` it
    is SOAP (Vyas et al. 2024); with a division by second moments it is EKFAC's running scale.

    When the basis changes, R = U_newᵀ U_old, the state of the inner transformation moves along: first moments as R_A m R_Bᵀ,
    second moments as (R_A∘R_A) v (R_B∘R_B)ᵀ, which keeps them positive and keeps their sum. The state's leaves are told apart by
    the name of their field: `mu`, `trace`, `ema` are first moments, `nu`, `nu_max`, `sum_of_squares`, `e_g`, `e_x` second ones.
    Leaves that have not the shape of a layer's matrix (counts, factored moments) stay as they are; so should Adamax's `nu`,
    which is a largest absolute value: `carry={"nu": "keep"}`.

    Args:
      inner: any Optax transformation of gradients, such as `optax.scale_by_adam()`, `scale_by_rms`, `scale_by_rss`,
        `scale_by_lion`, `trace`, or a chain of them. It sees {layer: (*stack, d_in, d_out)} for gradients and parameters, and the
        extra argument `kfe` (a `KfeInfo`) if it takes extra arguments. Its `init` sees zeros.
      layers: what `kfe.find_layers` returned.
      basis: one of `kfe.factors`; `kfe.factors.kfac()` by default.
      carry: {field: "first", "second", "columns" (entries go where the eigenvectors have gone, unturned), "keep", or a function
        (leaf, old basis, new basis) → leaf} for the fields of a state that is not Optax's, where a basis is the pair of
        `Eigenbasis` of the leaf's layer.
      factor_update_period: steps between updates of the factors, each one more backward pass (none for gradient factors).
      basis_update_period: steps between refreshes of the basis.
      initial_refreshes: the first steps, in each of which factors and basis are refreshed.
      refreshes_per_doubling: n > 0: periods begin at a fifth of what they are, and grow: n refreshes while the number of steps
        doubles. Curvature changes fastest in the beginning. 0: the periods as they are.
      refresh: "eigh", or "qr": after the first eigh, one power step and a QR with sorted columns, U ← qr(A U).
      refresh_tolerance: a side of the basis with ‖offdiag(UᵀAU)‖_F ≤ tolerance ‖A‖_F is not refreshed; None: all are.
      max_dim: a side larger than this keeps the identity as its basis; None: 8192.
      distribute: "none": every device factorizes everything; "inverses": each device factorizes its share, and all get the
        results; "inverses_and_apply": likewise each device takes its share of the gradients into the basis and
        back in every step. See `scale_by_kronecker`. The devices of a `pmap` or `shard_map` are known from the taps: pass them
        with `kfe.factors.gradient()` too.
      rest: the transformation of the parameters outside the layers; `inner`, without a basis and without `kfe`, by default.

    Returns:
      A transformation with `update(grads, state, params, *, taps)`; no taps for `kfe.factors.gradient()`.

    Raises:
      TypeError: `inner` is no Optax transformation.
      ValueError: in `init`, a field of the inner state that holds matrices of the layers and has no entry in `carry`; an
        option that does not exist; in `update`: no taps, taps of other layers, a changed or partly masked tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, labels):
      ...     logits = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> params, x, labels = {"kernel": jnp.ones((3, 2))}, jnp.eye(3), jnp.array([0, 1, 0])
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> soap = kfe.in_kfe(optax.scale_by_adam(), layers, basis=kfe.factors.gradient())
      >>> tx = optax.chain(soap, optax.scale_by_learning_rate(1e-3))
      >>> updates, state = tx.update(jax.grad(loss_fn)(params, x, labels), tx.init(params), params)
      >>> updates["kernel"].shape
      (3, 2)
    """
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise TypeError(
            f"inner must be an Optax transformation such as optax.scale_by_adam(), not {inner!r}; the layers come second."
        )
    checks.refreshes(
        initial_refreshes,
        refreshes_per_doubling,
        factor_update_period=factor_update_period,
        basis_update_period=basis_update_period,
    )
    basis_lib.check(refresh, refresh_tolerance)
    for field, how in (carry or {}).items():
        if not callable(how) and how != "keep" and how not in _MOVES:
            raise ValueError(
                f"carry[{field!r}] must be {', '.join(map(repr, _MOVES))}, 'keep' or a function, not {how!r}."
            )
    method = _InKfe(
        layers,
        factors_lib.kfac() if basis is None else basis,
        optax.with_extra_args_support(inner),
        {**CARRY, **(carry or {})},
        factor_update_period,
        basis_update_period,
        periods.Early(initial_refreshes, refreshes_per_doubling),
        refresh,
        refresh_tolerance,
        max_dim,
    )
    return layerwise.layerwise(layers, method, inner if rest is None else rest, distribute)


class _InKfe(NamedTuple):
    layers: Layers
    factors: Factors
    inner: optax.GradientTransformationExtraArgs
    carry: Mapping[str, Carry]
    factor_update_period: Any
    basis_update_period: Any
    early: periods.Early
    refresh: Refresh
    refresh_tolerance: Any
    max_dim: int | None

    reads_parameters = True

    @property
    def needs_taps(self) -> bool:
        return self.factors.needs_taps

    def init(self, layers: list[Layer]) -> KfeState:
        factors = self.factors.init(layers, self.max_dim)
        basis = basis_lib.init(self.layers, self.factors.terms(factors, self.layers))
        inner = self.inner.init({layer.name: jnp.zeros(layer.shape, layer.factor_dtype) for layer in layers})
        jax.eval_shape(self._carried, inner, basis, basis)  # raises for a field that it does not know
        _, *counters = layerwise.counters()
        return KfeState(factors, basis, inner, *counters)

    def update(self, state: KfeState, step: Step) -> tuple[Matrices, KfeState]:
        factors = update_factors(
            self.factors, self.layers, state.factors, step, self.factor_update_period, self.early
        )
        first = state.last_refresh < 0
        due = periods.due(step.count, self.basis_update_period, self.early)
        basis, inner, failed = periods.new_if_due(
            due,
            step.finite,
            lambda: self._new_basis(factors, state, first, step.devices.inverses),
            (state.basis, state.inner, jnp.zeros((), jnp.int32)),
        )
        refresh = due & step.finite
        gradients = self._rotated(step.gradients, basis, step)
        parameters = None if step.parameters is None else self._rotated(step.parameters, basis, step)
        weight = step.taps.gradient_weight if step.taps is not None else None
        eigenvalues = {
            name: jnp.broadcast_to(kronecker.outer(a.values, b.values), self.layers[name].shape)
            for name, (a, b) in basis.items()
        }
        known = KfeInfo(eigenvalues, first & refresh, weight)
        result: Any = self.inner.update(gradients, inner, parameters, kfe=known, **step.extra)
        updates, new_inner, spoilt = sound(*result, inner)
        # A gradient that is not finite must not reach the moments.
        new_inner = jax.tree.map(lambda new, old: jnp.where(step.finite, new, old), new_inner, inner)
        wide = {name: v.astype(gradients[name].dtype) for name, v in updates.items()}
        new = basis_lib.out_of(wide, basis, step.devices.products)
        more = failures.of(Failure.FACTORIZATION, failed) + failures.of(Failure.INNER, spoilt & step.finite)
        more = more + failures.between(state.factors.failures, factors.failures)
        state = KfeState(
            factors,
            basis,
            new_inner,
            counts.added(state.failures, more),
            jnp.where(refresh, step.count, state.last_refresh),
        )
        return new, state

    def _rotated(self, matrices: Matrices, basis: dict[str, Pair], step: Step) -> Matrices:
        wide = {name: v.astype(self.layers[name].factor_dtype) for name, v in matrices.items()}
        return basis_lib.into(wide, basis, step.devices.products)

    def _new_basis(
        self, factors: Any, state: KfeState, first: jax.Array, devices: Devices
    ) -> tuple[Any, Any, jax.Array]:
        terms = self.factors.terms(factors, self.layers)
        with jax.default_matmul_precision("highest"):
            basis, failed = basis_lib.refreshed(
                self.layers, terms, state.basis, first, self.refresh, self.refresh_tolerance, devices
            )
            return basis, self._carried(state.inner, state.basis, basis), failed

    def _carried(self, inner: Any, old: dict[str, Pair], new: dict[str, Pair]) -> Any:
        """The inner state in the new basis, leaf by leaf: those that hold a layer's matrix, by the name of their field."""

        def move(path, leaf):
            layer = getattr(path[-1], "key", "") if path else ""
            if layer not in old or jnp.shape(leaf) != self.layers[layer].shape:
                return leaf
            # The name of an attribute, or, in a state of plain dictionaries, the key above the layer's.
            names = [getattr(key, "name", getattr(key, "key", "")) for key in path[:-1]]
            field = next((name for name in reversed(names) if isinstance(name, str) and name), "")
            if field not in self.carry:
                where = jax.tree_util.keystr(path)
                raise ValueError(
                    f"in_kfe does not know how the inner state's {where} changes with the basis: say so with "
                    f"carry={{{field!r}: 'first'}} (linear in the gradient), 'second' (quadratic in it) or 'keep'."
                )
            how = self.carry[field]
            if callable(how):
                return how(leaf, old[layer], new[layer])
            if how == "keep":
                return leaf
            return _MOVES[how](leaf, old[layer], new[layer]).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(move, inner)
