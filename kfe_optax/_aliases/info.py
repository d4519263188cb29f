"""`info`: what a preconditioner has to say, dug out of any nesting of Optax states."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax

from kfe_optax._jax import counts
from kfe_optax._jax.failures import Failure
from kfe_optax._methods.layerwise import LayerwiseState
from kfe_optax._wrappers.adaptive_damping import AdaptiveDampingState
from kfe_optax._wrappers.clip import KlClipState
from kfe_optax._wrappers.quadratic_model import QuadraticModelState
from kfe_optax.contrib.two_level import TwoLevelState

# What the states around a preconditioner's tell.
_WRAPPERS: dict[type, tuple[str, ...]] = {
    KlClipState: ("kl_factor", "rejected"),
    QuadraticModelState: ("step_size", "momentum", "inner_damping"),
    AdaptiveDampingState: ("damping", "reduction_ratio", "rejected"),
}


class Info(NamedTuple):
    """The state of the curvature; a field is None when no transformation of the state has it.

    What was kept out of the state, and why, is in `reasons`: {"gradient": steps whose gradient was not finite, "rest": others
    whose update of the parameters outside the layers was not, "estimate": estimates of factors and scales that were not finite,
    "proportion": those that were more than 100 times the running average and were bounded, "factorization": inverses and
    eigenbases that were not finite, "inner": states or updates of the transformation inside `in_kfe` that were not}. The first
    two add up to `nonfinite`, the others to `failures`.

    Attributes:
      damping: λ of the last step, of `adaptive_damping` that of the next one; None for `in_kfe`, which has none.
      failures: factors and factorizations that were not finite, of which the last good ones were kept, and estimates of more
        than 100 times the running average, which count as 100 times.
      last_refresh: the step of the last refresh of the inverses or the basis, −1 before the first.
      kl_factor: ν of the last `clip_by_kl`, 1 when it did not clip.
      nonfinite: steps whose gradient was not finite, whose update was zero, or that of the rest, which was left out.
      negative_weights: steps whose loss gave an element of a registered loss a negative weight, which counts as zero in the
        Fisher (an advantage, say: see `kfe.losses.policy_gradient_loss`).
      reduction_ratio: r of `adaptive_damping`, the loss's last measured change over the model's.
      rejected: updates that it or `clip_by_kl` did not take.
      step_size: α of `scale_by_quadratic_model`.
      momentum: its μ.
      inner_damping: the damping of the preconditioner inside it.
      reasons: {reason: how often}, see above.
    """

    damping: Any = None
    failures: Any = None
    last_refresh: Any = None
    kl_factor: Any = None
    nonfinite: Any = None
    negative_weights: Any = None
    reduction_ratio: Any = None
    rejected: Any = None
    step_size: Any = None
    momentum: Any = None
    inner_damping: Any = None
    reasons: Any = None


def info(opt_state: Any) -> Info:
    """Damping, failures, last refresh and KL factor of an optimizer state, through any nesting of Optax states.

    With several preconditioners in the state (as under `optax.partition`) counts are added and the first one gives the rest.

    Args:
      opt_state: the state of any Optax optimizer, or of an `nnx.Optimizer`.

    Returns:
      An `Info` of scalar arrays; usable inside `jit`.

    Example:
      >>> import optax, kfe_optax as kfe
      >>> kfe.info(optax.adam(1e-3).init({})).damping is None
      True
    """
    wanted = (LayerwiseState, TwoLevelState, *_WRAPPERS)
    found = Info()
    pending = [opt_state]
    while pending:
        node = pending.pop(0)
        if isinstance(node, LayerwiseState):
            method = node.method
            found = found._replace(
                damping=_first(found.damping, getattr(method, "damping", None)),
                failures=_add(found.failures, method.failures),
                last_refresh=_first(found.last_refresh, method.last_refresh),
                nonfinite=_add(found.nonfinite, node.nonfinite),
                negative_weights=_add(found.negative_weights, node.negative_weights),
            )
        elif isinstance(node, TwoLevelState):
            found = found._replace(failures=_add(found.failures, node.coarse.failures))
            pending.insert(0, node.fine)
        elif type(node) in _WRAPPERS:
            for name in _WRAPPERS[type(node)]:
                combine = _add if name == "rejected" else _first
                found = found._replace(**{name: combine(getattr(found, name), getattr(node, name))})
            pending.insert(0, node.inner)
        else:
            leaves = jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, wanted))
            pending[:0] = [leaf for leaf in leaves if isinstance(leaf, wanted)]
    return found if found.failures is None else found._replace(**_by_reason(found.failures, found.nonfinite))


# Compiled: one small program, outside `jit` too, and not one for each entry.
@jax.jit
def _by_reason(failures: jax.Array, nonfinite: jax.Array) -> dict[str, Any]:
    """The totals and the reasons; states that pmap or vmap has stacked have leading axes, those of `shard_state` padding."""
    steps = {name: nonfinite[..., i] for i, name in enumerate(("gradient", "rest"))}
    kept_out = {reason.name.lower(): failures[..., reason] for reason in Failure}
    return {
        "failures": functools.reduce(counts.added, kept_out.values()),
        "nonfinite": functools.reduce(counts.added, steps.values()),
        "reasons": steps | kept_out,
    }


def _read(leaf: Any) -> Any:
    # nnx.Optimizer keeps each leaf of the state in a variable.
    return leaf[...] if hasattr(leaf, "get_value") else leaf


def _first(seen: Any, new: Any) -> Any:
    return _read(new) if seen is None and new is not None else seen


def _add(seen: Any, new: Any) -> Any:
    return _read(new) if seen is None else counts.added(seen, _read(new))
