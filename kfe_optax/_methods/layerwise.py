"""From a per-layer method on matrices to an Optax transformation on parameter trees.

A method sees {layer name: W̄-shaped matrix}; this module gathers them from the gradient tree, sends everything outside the layers
through `rest`, checks what it is given, and keeps non-finite gradients out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from kfe_optax._jax import checks, counts, explicit_axes, failures, static_values
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers, require_layers
from kfe_optax._layers.paths import Path, leaves_by_path, path_name
from kfe_optax._linalg import devices as devices_lib
from kfe_optax._linalg.devices import Distribute, Division
from kfe_optax._methods import given as given_lib
from kfe_optax._methods import request as request_lib
from kfe_optax._methods import rest as rest_lib
from kfe_optax._methods.request import Request
from kfe_optax._taps.taps import Taps

STATE_VERSION = 2
Schedule = Callable[[Any], Any]
ScalarOrSchedule = float | jax.Array | Schedule
Matrices = dict[str, jax.Array]


class Step(NamedTuple):
    """What a method is given beside its state.

    Attributes:
      count: int32, 0 for the first step.
      gradients: {layer: V (*stack, d_in, d_out)}.
      finite: whether all of the gradient is finite. If not, neither are the taps, and neither may touch the state; what
        becomes of the update then does not matter.
      taps: the step's taps, None for a method that needs none.
      parameters: {layer: W̄ (*stack, d_in, d_out)} for a method that reads them and when the caller gave them.
      extra: further extra arguments of the update.
      damping: λ of this step where the caller adapts it, in place of the method's own; see `damping_of`.
      again: this step once more with another damping (see `Request`): what the damping enters is formed anew, out of
        statistics that stay as they are.
      devices: who shares the linear algebra of this step.
    """

    count: jax.Array
    gradients: Matrices
    finite: jax.Array
    taps: Taps | None
    parameters: Matrices | None
    extra: dict[str, Any]
    damping: jax.Array | None
    again: bool
    devices: Division

    def damping_of(self, damping: ScalarOrSchedule, relative: bool = False) -> jax.Array:
        """λ of this step: what `update` was asked for, or the method's own scalar or schedule.

        Args:
          damping: the method's own.
          relative: whether it is a multiple of each layer's mean curvature, which no damping in the loss's units replaces.

        Raises:
          TypeError: it is relative, and `update` was asked for another one.
        """
        if relative and self.damping is not None:
            raise TypeError(
                "The damping of this preconditioner is relative to each layer's mean curvature and cannot be adapted in the "
                "loss's units: inside adaptive_damping and scale_by_quadratic_model take relative_damping=False, or another "
                "preconditioner such as kfe.scale_by_kfac."
            )
        result = value(damping if self.damping is None else self.damping, self.count, "damping")
        # A schedule may end at zero, where a part without curvature would be 0/0.
        return jnp.where(result == 0, jnp.finfo(result.dtype).tiny, result)


class Method(Protocol):
    """A preconditioner on matrices; its state has the fields `failures` and `last_refresh`, and `damping` if it has one."""

    @property
    def needs_taps(self) -> bool:
        """Whether it reads taps, or gradients alone."""

    @property
    def reads_parameters(self) -> bool:
        """Whether it is given the parameters and further extra arguments."""

    def init(self, layers: list[Layer]) -> Any:
        """The state before the first step."""

    def update(self, state: Any, step: Step) -> tuple[Matrices, Any]:
        """Preconditioned matrices and the new state."""


class LayerwiseState(NamedTuple):
    """State of every transformation of this package.

    Attributes:
      version: int32, the layout of the state.
      count: int32, the number of steps taken (at the end of int32 see `counts.following`).
      method: the method's state.
      rest: the state of the transformation of the parameters outside the layers.
      nonfinite: int32 (2,), steps whose gradient was not finite, whose update was zero, and others whose update of the rest
        was not, see `rest.sound`.
      negative_weights: int32, steps whose loss gave an element of a registered loss a negative weight.
    """

    version: jax.Array
    count: jax.Array
    method: Any
    rest: Any
    nonfinite: jax.Array
    negative_weights: jax.Array


def counters() -> tuple[jax.Array, jax.Array, jax.Array]:
    """A method's `damping`, `failures` and `last_refresh` before the first step."""
    return jnp.zeros(()), failures.none(), jnp.full((), -1, jnp.int32)


def value(scalar_or_schedule: ScalarOrSchedule, count: jax.Array, name: str) -> jax.Array:
    """The hyper-parameter `name` at step `count`, float32 (float64 under x64 when it is given so)."""
    result = scalar_or_schedule(count) if callable(scalar_or_schedule) else scalar_or_schedule
    checks.one_number(name, result)
    return jnp.asarray(result, jnp.result_type(float))


def layerwise(
    layers: Layers,
    method: Method,
    rest: optax.GradientTransformation | None,
    distribute: Distribute = "none",
) -> optax.GradientTransformationExtraArgs:
    """The Optax transformation of a method.

    Args:
      layers: the layers that it preconditions.
      method: the method.
      rest: the transformation of the parameters outside them.
      distribute: how devices share its linear algebra.

    Raises:
      TypeError, ValueError: see `kfe_optax._methods.given`; each says what to do.
    """
    require_layers(layers)
    if not layers:
        raise ValueError(f"The loss has no layer to precondition: {given_lib.reasons(layers)}.")
    devices_lib.check_distribute(distribute)
    outside = optax.with_extra_args_support(rest or optax.scale_by_adam())

    def init(params):
        leaves = given_lib.leaves_at_start(layers, params)
        present = given_lib.present_layers(layers, leaves)
        # Each field is an array of its own: a donated buffer may stand in a state only once.
        return LayerwiseState(
            version=jnp.asarray(STATE_VERSION, jnp.int32),
            count=jnp.zeros((), jnp.int32),
            method=method.init(present),
            rest=outside.init(rest_lib.outside(layers, leaves)),
            nonfinite=jnp.zeros(2, jnp.int32),
            negative_weights=jnp.zeros((), jnp.int32),
        )

    # Compiled, so that a caller that does not compile the whole step neither retraces nor runs it operation by operation.
    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def step(static, again, division, arrays, method_state, given, damping):
        present = [layer for name, layer in layers.items() if name in given[1]]
        given_lib.check_method_state(method, present, method_state)
        return method.update(method_state, Step(*given, static(arrays), damping, again, division))

    update = _Layerwise(layers, method, outside, distribute, step).update
    return optax.GradientTransformationExtraArgs(init, explicit_axes.on_any_mesh(update))


class _Layerwise(NamedTuple):
    """The parts of a transformation; `step` is the compiled step of its method, `outside` that of the other parameters."""

    layers: Layers
    method: Method
    outside: optax.GradientTransformationExtraArgs
    distribute: Distribute
    step: Callable[..., tuple[Matrices, Any]]

    def update(self, updates, state, params=None, *, taps=None, request=None, **extra):
        checks.state(state, LayerwiseState)
        request, layers, method = request_lib.checked(request, extra), self.layers, self.method
        if method.needs_taps:
            given_lib.check_taps(layers, taps)
        leaves = leaves_by_path(updates)
        present = given_lib.present_layers(layers, leaves)
        given_params = None if params is None else leaves_by_path(params)
        parameters = None
        if method.reads_parameters and given_params is not None:
            parameters = matrices_of(present, given_params)
        rest_updates, rest_state, spoilt = self._rest(leaves, state.rest, given_params, request, extra)
        finite = all_finite(leaves.values())
        arrays, static = static_values.split_static(extra if method.reads_parameters else {})
        used = taps if method.needs_taps else None
        again = request.first is not None
        negative = False if used is None or again else used.negative_weights
        count = state.count - again
        division = devices_lib.division(self.distribute, axis_of(taps))
        given = (count, matrices_of(present, leaves), finite, used, parameters)
        new_matrices, method_state = self.step(
            static, again, division, arrays, state.method, given, request.damping
        )
        new = {
            path: narrowed(jnp.where(finite, leaf, 0), leaves[path].dtype)
            for path, leaf in _scatter(present, new_matrices, layers, rest_updates).items()
        }
        state = LayerwiseState(
            version=state.version,
            count=counts.following(count),
            method=method_state,
            rest=jax.tree.map(lambda a, b: jnp.where(finite, a, b), rest_state, state.rest),
            nonfinite=counts.added(state.nonfinite, jnp.stack([~finite, spoilt & finite]) & (not again)),
            negative_weights=counts.added(state.negative_weights, negative),
        )
        # Flattening order is that of the paths, so the tree comes back whatever container it was.
        ordered = [new[path] for path in leaves]
        return jax.tree.unflatten(jax.tree.structure(updates), ordered), state

    def _rest(self, leaves: Any, state: Any, params: Any, request: Request, extra: Any) -> tuple[Any, ...]:
        """The updates of the parameters outside the layers, the new state, and whether there was anything not finite in them."""
        others = rest_lib.outside(self.layers, leaves)
        if not others:
            return others, state, jnp.zeros((), bool)
        if request.first is not None:
            # Where only the damping differs, the rest has had its step.
            first = rest_lib.outside(self.layers, leaves_by_path(request.first))
            return first, state, jnp.zeros((), bool)
        params = None if params is None else rest_lib.outside(self.layers, params)
        result: Any = self.outside.update(others, state, params, **extra)
        return rest_lib.sound(*result, state)


def axis_of(taps: Any) -> Any:
    """The `axis_name` of a step's taps, which a method that reads none may have been given too."""
    return taps.plan.axis_name if isinstance(taps, Taps) else None


def narrowed(leaf: jax.Array, dtype: Any) -> jax.Array:
    """The leaf in the gradient's dtype; what float16 cannot hold becomes its largest number, not infinity."""
    if jnp.finfo(dtype).max < jnp.finfo(leaf.dtype).max:
        leaf = jnp.clip(leaf, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
    return leaf.astype(dtype)


def matrices_of(present: list[Layer], leaves: dict[Path, jax.Array]) -> Matrices:
    """{layer: W̄-shaped matrix} out of a tree's leaves."""
    return {layer.name: layer.gather({role: leaves[path] for role, path in layer.paths}) for layer in present}


def all_finite(leaves: Any) -> jax.Array:
    """Whether no number of these arrays is NaN or infinite; nor a leaf's sum, in float32 at least."""
    # NaN and inf survive a sum, which reads each leaf once and writes nothing.
    sums = [jnp.sum(leaf, dtype=jnp.promote_types(jnp.result_type(leaf), jnp.float32)) for leaf in leaves]
    return jnp.isfinite(jnp.stack(sums)).all() if sums else jnp.ones((), bool)


def _scatter(present: list[Layer], matrices: Matrices, layers: Layers, rest: Any) -> dict[Path, jax.Array]:
    new = {}
    for layer in present:
        new.update(layer.from_matrix(matrices[layer.name]))
    new.update({path: rest[path_name(path)] for path in layers.rest if path_name(path) in rest})
    return new
