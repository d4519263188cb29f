"""`Distribution`: what the Fisher asks of a predictive distribution, and the check of one that a user wrote."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from kfe_optax._jax import checks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Num


class Distribution(Protocol):
    """A predictive distribution p(y|z) of a model's outputs z, of which the Fisher matrix is the mean over y.

    With ℓ(z, y) = −log p(y|z), the Fisher at one event's outputs is F_R = E_{y~p(·|z)}[∂ℓ ∂ℓᵀ] = E[∂²ℓ], and the curvature of
    the loss Σᵢ cᵢ ℓ(zᵢ, yᵢ) is Σᵢ cᵢ JᵢᵀF_R Jᵢ (Martens & Grosse 2015, section 2). Where ∂²ℓ does not depend on y (the natural
    parameters of an exponential family), that is its Gauss–Newton matrix.

    One of your own is a frozen dataclass that derives from this class, of Python numbers and strings alone: it is static, like
    the shape of an array, and compared by its fields. It gives `event_ndim`, `negative_log_likelihood` and `root_transpose`.
    Pass it to `kfe.losses.negative_log_likelihood`, or to `kfe.register_output` beside a loss of another form.

    All arrays have leading axes beside the event's, any number of them. In the statistics z is float32 at least, whatever the
    model's dtype; results have the dtype of z.

    Attributes:
      event_ndim: how many of the last axes of z make one event: 0 where each element has a y of its own, 1 for logits of classes.

    Example:
      Waiting times y ~ Exp(rate e^z): ℓ = y e^z − z and ∂ℓ = y e^z − 1, whose variance is 1.

      >>> import dataclasses, jax.numpy as jnp, kfe_optax as kfe
      >>> @dataclasses.dataclass(frozen=True)
      ... class Exponential(kfe.Distribution):
      ...     event_ndim = 0
      ...     def negative_log_likelihood(self, z, targets):
      ...         return targets * jnp.exp(z) - z
      ...     def root_transpose(self, z, u):
      ...         return u
      >>> def loss_fn(params, x, times):
      ...     return kfe.losses.negative_log_likelihood(x @ params["kernel"], times, Exponential()).mean()
      >>> params, x, times = {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 3)), jnp.ones((4, 2))
      >>> layers = kfe.find_layers(loss_fn, params, x, times)
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, times)
      >>> a, g = taps["kernel"].covariances()       # per example: a mean over two elements has the Fisher I/2
      >>> bool(jnp.allclose(g, jnp.eye(2) / 2))
      True
    """

    event_ndim: ClassVar[int]

    def __hash__(self) -> int: ...

    @abc.abstractmethod
    def negative_log_likelihood(
        self, z: Float[Array, " n *rest"], targets: Any
    ) -> Float[Array, " n *elements"]:
        """−log p(y|z) of each event, of the shape of z without its last `event_ndim` axes."""

    @abc.abstractmethod
    def root_transpose(
        self, z: Float[Array, " n *rest"], u: Float[Array, " n *rest"]
    ) -> Float[Array, " n *rest"]:
        """Bᵀu for a B(z) with BᵀB = F_R; u and the result have the shape of z. Linear in u, each event for itself."""

    def sample(self, key: jax.Array, z: Float[Array, " n *rest"]) -> Num[Array, " n *targets"]:
        """A draw with mean zero and covariance F_R, of the shape of z, independent between events.

        Here Bᵀu with independent random signs u, which no power of z can overflow and whose squares vary least (curvature
        propagation, Martens, Sutskever & Swersky 2012). ∂ℓ(z, ỹ) of one ỹ ~ p(·|z) is another.
        """
        return self.root_transpose(z, jax.random.rademacher(key, z.shape, z.dtype))


def check(distribution: Any, z: jax.Array) -> None:
    """Raises unless `distribution` can be that of the outputs z."""
    name = type(distribution).__name__
    if isinstance(distribution, type):
        raise TypeError(f"A distribution is an instance, not a class: pass {distribution.__name__}(...).")
    needed = ("event_ndim", "sample", "root_transpose", "negative_log_likelihood")
    missing = [member for member in needed if not hasattr(distribution, member)]
    if missing:
        raise TypeError(
            f"A distribution is one of kfe.distributions or derives from kfe.Distribution; {name} has no {missing[0]}."
        )
    try:
        hash(distribution)
        by_value = type(distribution).__eq__ is not object.__eq__
    except TypeError:
        by_value = False
    if not by_value:
        raise TypeError(
            f"A distribution is static and compared by its fields, which {name} is not: make it a frozen dataclass "
            "(@dataclasses.dataclass(frozen=True)) of numbers and strings. What is an array belongs in z."
        )
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"The outputs of {name} must be floating, not {z.dtype}.")
    events = distribution.event_ndim
    if not checks.is_whole(events) or not 0 <= events <= z.ndim:
        raise ValueError(
            f"{name}.event_ndim, {events!r}, must say how many of the last axes of the outputs, {z.shape}, make one event."
        )
    wide = jax.ShapeDtypeStruct(z.shape, jnp.promote_types(z.dtype, jnp.float32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    for method, first, second in (("sample", key, wide), ("root_transpose", wide, wide)):
        found = jax.eval_shape(getattr(distribution, method), first, second)
        if getattr(found, "shape", None) != z.shape:
            raise ValueError(
                f"{name}.{method} must return an array of the shape of z, {z.shape}, not {found}."
            )


def check_values(distribution: Distribution, z: jax.Array, values: Any) -> None:
    """Raises unless `values` are one −log p for each event; an array of the targets' shape says that those do not fit."""
    events = z.shape[: z.ndim - distribution.event_ndim]
    if getattr(values, "shape", None) != events:
        raise ValueError(
            f"{type(distribution).__name__}.negative_log_likelihood must return one number an event, {events} for outputs of "
            f"shape {z.shape}, not {values}: do the targets have the shape that it expects?"
        )
