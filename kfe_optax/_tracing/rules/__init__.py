"""Which equations of a traced loss use a parameter as a layer does, without a mark: one primitive a file, one line in `RULES`.

`register` adds a rule of one's own, for a primitive of one's own or one that none knows.
"""

from __future__ import annotations

from typing import Any

from kfe_optax._tracing.findings import Trail
from kfe_optax._tracing.rules.base import Found, Layout, Rule, shapes
from kfe_optax._tracing.rules.conv import ConvGeneralDilated
from kfe_optax._tracing.rules.dense import DotGeneral
from kfe_optax._tracing.rules.embedding import Gather
from kfe_optax._tracing.rules.scale import Mul
from kfe_optax._tracing.rules.shift import Add

__all__ = ["RULES", "Found", "Layout", "Rule", "register", "shapes", "used"]

RULES: dict[str, Rule] = {
    rule.primitive: rule for rule in (DotGeneral(), ConvGeneralDilated(), Gather(), Mul(), Add())
}


def register(rule: Rule) -> None:
    """Makes the primitive of a rule known to `kfe.find_layers`.

    Raises:
      TypeError: no `Rule`.
      ValueError: its primitive has a rule already.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> from jax.extend.core import Primitive
      >>> from jax.interpreters import ad
      >>> own_dot = Primitive("own_dot")
      >>> _ = own_dot.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype))
      >>> ad.defbilinear(own_dot, lambda g, x, w: g @ w.T, lambda g, x, w: x.T @ g)
      >>> class OwnDot(kfe.rules.Rule):
      ...     primitive = "own_dot"
      ...     def use(self, equation, side, trail):
      ...         x, y = equation.invars[0].aval, equation.outvars[0].aval
      ...         if side != 1 or trail.dims != (0, 1):
      ...             return None
      ...         return kfe.rules.Found(kfe.kinds.Dense(), trail, 0, kfe.rules.shapes(x, y), axes=(-1, 1), order=(0, 1))
      >>> kfe.rules.register(OwnDot())
      >>> loss_fn = lambda params, x: kfe.losses.squared_error(own_dot.bind(x, params["w"])).mean()
      >>> list(kfe.find_layers(loss_fn, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))))
      ['w']
      >>> _ = kfe.rules.RULES.pop("own_dot")
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"A rule is an object of a subclass of kfe.rules.Rule, not {rule!r}.")
    if rule.primitive in RULES:
        raise ValueError(f"There is a rule for {rule.primitive!r} already: {RULES[rule.primitive]!r}.")
    RULES[rule.primitive] = rule


def used(equation: Any, trails: list[Trail | None]) -> Found | None:
    """The use that an equation makes of a parameter among its operands; None where no rule knows it."""
    rule = RULES.get(equation.primitive.name)
    whole = [i for i, trail in enumerate(trails) if trail is not None and not trail.lost]
    if rule is None or len(whole) != 1:
        return None
    (side,) = whole
    trail = trails[side]
    assert trail is not None
    if (trail.flipped and not rule.flips) or (trail.kept and not isinstance(rule, Mul)):
        return None
    return rule.use(equation, side, trail)
