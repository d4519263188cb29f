"""What all factors estimators share: their interface, running averages that leave out what is not finite, shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import core

from kfe_optax._jax import checks, failures
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._taps.taps import Pulled, Taps

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]
T = TypeVar("T")


class Term(NamedTuple):
    """One Kronecker product A⊗B of a layer.

    Attributes:
      input: A (*stack, d_in, d_in), or its diagonal (*stack, d_in) where the side is larger than `max_dim`.
      output: B (*stack, d_out, d_out), or its diagonal.
    """

    input: Float[Array, "*stack d_in d_in"] | Float[Array, "*stack d_in"]
    output: Float[Array, "*stack d_out d_out"] | Float[Array, "*stack d_out"]


class Source(NamedTuple):
    """What an estimator may look at in one step.

    Attributes:
      layers: the layers of the optimizer.
      pulled: the statistics of the step (see `Taps.pulled`); None for an estimator with `needs_taps = False`.
      gradients: {layer: mean gradient (*stack, d_in, d_out)}.
    """

    layers: Layers
    pulled: Pulled | None
    gradients: dict[str, jax.Array]


class Factors(Protocol):
    """An estimator of every layer's Fisher block as a sum of Kronecker products.

    Its hyper-parameters are its fields, what changes is in a state: a NamedTuple of arrays with `updates` and
    `failures` (see `kfe.Failure`; a count without reasons counts as estimates).
    """

    @property
    def rank(self) -> int:
        """How many Kronecker products it yields."""

    @property
    def needs_taps(self) -> bool:
        """Whether it reads taps, or gradients alone."""

    def init(self, layers: Sequence[Layer], max_dim: int | None) -> Any:
        """The state before the first batch; a side larger than `max_dim` is diagonal."""

    def update(self, state: Any, source: Source, count: jax.Array) -> Any:
        """The state with one more batch, at step `count`; an estimate that is not finite is left out, one
        out of all proportion bounded (see `EXCESS`), and both are counted."""

    def terms(self, state: Any, layers: Layers) -> dict[str, tuple[Term, ...]]:
        """{layer: Kronecker terms}; the first one is positive semi-definite on both sides."""


def estimate(
    factors: Factors, taps: Taps, names: Sequence[str] | None = None, *, max_dim: int | None = None
) -> dict[str, tuple[Term, ...]]:
    """The Kronecker terms of one step's taps alone, without a running average: what `kfe.diagnostics` judges.

    Args:
      factors: one of `kfe.factors` that reads taps.
      taps: what `kfe.value_grad_and_taps` returned.
      names: for which layers; all by default.
      max_dim: a side larger than this is treated as diagonal; None: 8192.

    Returns:
      {layer: ((A, B), ...)} with F ≈ A⊗B + ..., for use inside or outside `jit`.

    Raises:
      ValueError: factors that read gradients instead of taps.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x):
      ...     z = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(z).sum(-1).mean()
      >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.eye(3)
      >>> layers = kfe.find_layers(loss_fn, params, x)
      >>> _, _, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, key=jax.random.key(0))
      >>> (term,) = kfe.factors.estimate(kfe.factors.kpsvd(), taps)["kernel"]
      >>> term.input.shape, term.output.shape
      ((3, 3), (2, 2))
    """
    if not factors.needs_taps:
        raise ValueError(
            "These factors come from gradients, not from taps; call their init and update instead."
        )
    layers = taps.layers
    state = factors.init([layers[name] for name in names or layers], max_dim)
    state = factors.update(state, Source(layers, taps.pulled(), {}), jnp.zeros((), jnp.int32))
    return factors.terms(state, layers)


def check_max_dim(max_dim: Any) -> None:
    """Raises ValueError for a `max_dim` that is traced, or no positive whole number."""
    if isinstance(max_dim, core.Tracer):
        raise ValueError(
            "max_dim fixes the shapes of the state and cannot be traced: give optax.inject_hyperparams "
            "static_args=('max_dim',), or call tx.init outside jit."
        )
    if max_dim is not None:
        checks.whole("max_dim", max_dim)


def check_own_factors(layers: Sequence[Layer], factors: str, starts_with_kfac: bool = False) -> None:
    """Raises ValueError for a layer configured for K-FAC's A and G, which these factors do not estimate.

    Args:
      layers: the layers.
      factors: the name of the factors.
      starts_with_kfac: whether one of their terms is K-FAC's, each block with its own.
    """
    for layer in layers:
        approximation, option = layer.kind.approximation, None
        if layer.shares_factors or (approximation == "sua" and not starts_with_kfac):
            option = f"approximation={approximation!r}"
        elif layer.sharing == "reduce" and (layer.shared or layer.positions > 1) and not starts_with_kfac:
            option = "sharing='reduce'"
        if option:
            raise ValueError(
                f"{option} of layer {layer.name!r} is about K-FAC's A and G, and {factors} estimates other factors: use "
                "kfe.factors.kfac (kfe.kfac, kfe.ekfac), or leave this layer as find_layers found it."
            )


def zero_term(layer: Layer, max_dim: int | None) -> Term:
    """Zeros in the shapes of a layer's factors."""
    return Term(*(jnp.zeros(_side_shape(layer, side, max_dim), layer.factor_dtype) for side in (0, 1)))


def _side_shape(layer: Layer, side: int, max_dim: int | None) -> tuple[int, ...]:
    d = layer.sides[side]
    stack = layer.side_stack(side)
    return (*stack, d) if layer.is_diagonal(side, max_dim) else (*stack, d, d)


def is_diagonal(layer: Layer, term: Term) -> tuple[bool, bool]:
    """Which sides of a term are diagonals."""
    rank = len(layer.stack_shape) + 1
    return term.input.ndim == rank, term.output.ndim == rank


def divided(term: Term, by: jax.Array) -> Term:
    """Both sides of a term divided by a number (*stack,)."""
    return Term(*(side / by.reshape(by.shape + (1,) * (side.ndim - by.ndim)) for side in term))


class DecayBySteps(NamedTuple):
    """A `decay` with ρ = min(1 − 1/k, decay) where k counts steps (Koroko et al. 2022; Tselepidis et al. 2020), not updates.

    With factors every 100 steps the second batch then already weighs 1 − decay, and not a half.

    Attributes:
      decay: the largest ρ.

    Example:
      >>> import jax.numpy as jnp, kfe_optax as kfe
      >>> decay = kfe.factors.DecayBySteps(0.95)
      >>> [round(float(decay(jnp.int32(step))), 2) for step in (0, 1, 100)]
      [0.0, 0.5, 0.95]
      >>> kfe.factors.kfac(decay).rank
      1
    """

    decay: float

    def __call__(self, count: jax.Array) -> jax.Array:
        """ρ at step `count`, from 0 on."""
        return jnp.minimum(1 - 1 / (count + 1).astype(jnp.result_type(float)), self.decay)


def weight_of_past(updates: jax.Array, decay: ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """ρ = min(1 − 1/k, decay) at the k-th update, so that the first batch counts in full (Martens & Grosse 2015, section 5)."""
    bound = jnp.asarray(decay(count) if callable(decay) else decay)
    checks.one_number("decay", bound)
    if isinstance(decay, DecayBySteps):
        return bound
    return jnp.minimum(1 - 1 / updates.astype(jnp.result_type(float)), bound)


def rho_of(old: Any, rho: jax.Array) -> jax.Array:
    """ρ of one layer: 0 while its factors are zero, as they are before the first estimate."""
    return jnp.where(largest(old).max() > 0, rho, 0)


def largest(entry: Any) -> jax.Array:
    """The largest magnitude in each of an entry's arrays; not finite where one of its numbers is not."""
    leaves = jax.tree.leaves(entry)
    return jnp.stack([jnp.abs(leaf).max().astype(jnp.result_type(float)) for leaf in leaves])


EXCESS = 100.0
"""How many times larger than the running average an estimate counts at most."""


class Weights(NamedTuple):
    """What the running average and a new estimate weigh; `excessive`: whether the estimate had to be bounded."""

    past: jax.Array
    new: jax.Array
    excessive: jax.Array


def weights(rho: jax.Array, proportion: jax.Array) -> Weights:
    """ρ and (1 − ρ) min(1, EXCESS/p) for an estimate that is p times as large as the running average.

    A batch out of all proportion, with an example in other units or with a wrong exponent, would stay in an average for hundreds
    of updates. It weighs less as a whole, so that what belongs together stays so. A rise that lasts is followed: an update lets
    the average grow 1 + (1 − ρ) EXCESS times.
    """
    excessive = (rho > 0) & (proportion > EXCESS)
    new = jnp.where(excessive, (1 - rho) * (EXCESS / proportion).astype(rho.dtype), 1 - rho)
    return Weights(jnp.where(excessive, 1 - new, rho), new, excessive)


def proportion(old: Any, new: Any) -> jax.Array:
    """How many times larger an estimate is than the running one, by the largest entry of an array; of several the most."""
    before = largest(old)
    # A side that was zero has nothing to be measured by.
    return jnp.where(before > 0, largest(new) / jnp.where(before > 0, before, 1), 0).max()


def average(
    old: dict[str, T], new: dict[str, T], rho: jax.Array, leading: Callable[[T], Any] = lambda entry: entry
) -> tuple[dict[str, T], jax.Array]:
    """ρ old + (1 − ρ) new for every layer, the old one where the new one is not finite; see `weights`.

    A layer that has no estimate yet takes the new one in full: a batch that was left out must not weigh as zeros.

    Args:
      old: the running averages.
      new: the estimates.
      rho: ρ.
      leading: the arrays of an entry by which its size is judged.

    Returns:
      The averages, and the failures: estimates that were not finite, or out of all proportion.
    """
    result, lost, bounded = {}, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    for name, before in old.items():
        own = weights(rho_of(before, rho), proportion(leading(before), leading(new[name])))
        finite = jnp.isfinite(largest(new[name])).all()
        lost, bounded = lost + ~finite, bounded + (finite & own.excessive)

        def one(a, b, finite=finite, own=own):
            return jnp.where(
                finite, own.past.astype(a.dtype) * a + own.new.astype(a.dtype) * b.astype(a.dtype), a
            )

        result[name] = jax.tree.map(one, before, new[name])
    return result, failures.estimates(lost, bounded)
