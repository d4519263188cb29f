"""`shard_state`: an optimizer's state divided over the devices of a mesh, each of which keeps its part of every large array.

An array is kept padded to a multiple of the number of devices, so that it can be divided evenly. Inside the compiled step, where
parts need not be of one size, the padding is cut off: no number moves for it, since the parts of the cut array begin where
those of the padded one do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kfe_optax._jax import static_values, varying_axes


def shard_state(
    inner: optax.GradientTransformation,
    mesh: Mesh,
    axis_names: str | Sequence[str] | None = None,
    *,
    min_size: int = 4096,
    replicate_updates: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation with its state divided over devices: of n of them each keeps 1/n (ZeRO; Rajbhandari et al. 2020).

    For `jax.jit` on arrays that live on the mesh, data parallel or otherwise; the mathematics is that of `inner`. The state's
    tree is that of `inner` too, so that `kfe.info` and all that wraps an optimizer find what they know in it. Each array of it
    is divided along the axis that needs the least padding, the first of several (a stack of layers along the stack), and padded
    with zeros at its end. It is made in parts: no device ever holds all of it.

    What the compiler gathers, for a preconditioner of this package: the factors where they are factorized, on the steps that do
    so; on every step the update, and of each layer the inverse (or basis) of one side, for the product with it. The taps' sums
    are reduced as they are without it.

    Args:
      inner: any Optax transformation, such as `kfe.kfac(...)` or a whole `optax.chain`.
      mesh: the devices, as in `jax.make_mesh`; its axes are of type Auto or Explicit.
      axis_names: the axis or axes of the mesh over which the state is divided; all by default.
      min_size: arrays of fewer numbers (counts, eigenvalues) stay whole on every device.
      replicate_updates: gradients and updates are whole on every device, as parameters that are replicated need it. False
        leaves it to the compiler, for parameters that are divided themselves.

    Returns:
      A transformation with the `update` of `inner`. Outside `jit` it compiles itself. A checkpoint is restored to another number
      of devices by whatever cuts or pads an array at its ends, such as Orbax's `StandardRestore(abstract, strict=False)`.

    Raises:
      TypeError: `inner` is no Optax transformation, `mesh` no `jax.sharding.Mesh`.
      ValueError: an axis that the mesh has not; in `update`: a state of other shapes, as another mesh's; inside
        `shard_map` or `pmap`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kfe_optax as kfe
      >>> def loss_fn(params, x, labels):
      ...     logits = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
      >>> params, x, labels = {"kernel": jnp.zeros((64, 2))}, jnp.eye(64), jnp.arange(64) % 2
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> tx = kfe.shard_state(kfe.kfac(0.15, layers), mesh)
      >>> opt_state = tx.init(params)
      >>> kfe.state_bytes_per_device(opt_state)
      {...: 33...}
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(0))
      >>> updates, opt_state = tx.update(grads, opt_state, params, taps=taps)
      >>> int(kfe.info(opt_state).last_refresh)
      0
    """
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise TypeError(
            f"inner must be an Optax transformation such as kfe.kfac(...), not {inner!r}; the mesh comes second."
        )
    # What wraps an optimizer without handing on extra arguments, such as `optax.MultiSteps`, says how to get one that does.
    inner = getattr(inner, "gradient_transformation", lambda: inner)()
    whole = optax.with_extra_args_support(inner)
    division = _division(mesh, axis_names, min_size)

    def init(params):
        shapes = _shapes(whole, params)
        shardings = jax.tree.map(division.sharding, shapes)

        def made(params):
            return jax.tree.map(division.padded, whole.init(params))

        return jax.jit(division.automatic(made, shardings), out_shardings=shardings)(params)

    def update(updates, state, params=None, **extra):
        division.check_context()
        arrays, static = static_values.split_static(extra)
        return _step(static, updates, state, params, arrays)

    # Parts of unequal size exist in compiled functions alone.
    @functools.partial(jax.jit, static_argnums=0)
    def _step(static, updates, state, params, arrays):
        shapes = _shapes(whole, updates if params is None else params)
        division.check_state(state, shapes)

        def step(updates, state, params, arrays):
            state = jax.tree.map(division.cut, state, shapes)
            updates, state = whole.update(replicated(updates), state, params, **static(arrays))
            return replicated(updates), jax.tree.map(division.kept, state)

        def replicated(tree):
            return jax.tree.map(division.replicated, tree) if replicate_updates else tree

        types = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, updates)
        shardings = jax.tree.map(division.sharding, shapes)
        return division.automatic(step, (types, shardings))(updates, state, params, arrays)

    return optax.GradientTransformationExtraArgs(init, update)


def _shapes(inner: optax.GradientTransformationExtraArgs, params: Any) -> Any:
    """The shapes of the state as `inner` has it; those of the parameters are all that it depends on."""
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
    return jax.eval_shape(inner.init, plain)


def state_bytes_per_device(state: Any) -> dict[jax.Device, int]:
    """The bytes that an optimizer state takes on each device of this process.

    Args:
      state: any tree of arrays, or of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      TypeError: a leaf that is on no device, as inside `jit`.

    Example:
      >>> import jax.numpy as jnp, optax, kfe_optax as kfe
      >>> kfe.state_bytes_per_device(optax.adam(1e-3).init({"kernel": jnp.zeros((16, 16))}))
      {...: 2052}
    """
    total: dict[jax.Device, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        sharding = None if isinstance(leaf, core.Tracer) else getattr(leaf, "sharding", None)
        if sharding is None:
            raise TypeError(
                f"The state's {jax.tree_util.keystr(path)} is no array on devices; call state_bytes_per_device outside jit, on "
                "what init or update returned."
            )
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for device in sorted(sharding.addressable_devices, key=lambda d: d.id):
            total[device] = total.get(device, 0) + size
    return total


def _division(mesh: Any, axis_names: Any, min_size: int) -> _Division:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, as jax.make_mesh makes it, not a {type(mesh).__name__}."
        )
    names: tuple[Any, ...] = varying_axes.names(mesh.axis_names if axis_names is None else axis_names)
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(f"The mesh has no axis {name!r}; its axes are {', '.join(mesh.axis_names)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"axis_names names one axis or several different ones, not {axis_names!r}.")
    return _Division(mesh, names, math.prod(mesh.shape[name] for name in names), min_size)


class _Division(NamedTuple):
    """How arrays are divided; `leaf` and `like` have the shape without padding."""

    mesh: Mesh
    names: tuple[str, ...]
    parts: int
    min_size: int

    def axis(self, leaf: Any) -> int | None:
        """The axis along which an array is divided, None for one that is not."""
        plain = jnp.issubdtype(leaf.dtype, jnp.number) or jnp.issubdtype(leaf.dtype, jnp.bool_)
        if not leaf.ndim or not plain or leaf.size < max(self.min_size, 1):
            return None
        return min(range(leaf.ndim), key=lambda axis: self.even(leaf.shape[axis]) / leaf.shape[axis])

    def even(self, size: int) -> int:
        """The size of an axis with its padding."""
        return -(-size // self.parts) * self.parts

    def shape(self, leaf: Any) -> tuple[int, ...]:
        """The shape of an array with its padding."""
        divided = self.axis(leaf)
        return tuple(self.even(size) if axis == divided else size for axis, size in enumerate(leaf.shape))

    def spec(self, leaf: Any) -> PartitionSpec:
        """The axis along which an array is divided, for JAX."""
        divided = self.axis(leaf)
        if divided is None:
            return PartitionSpec()
        names = self.names if len(self.names) > 1 else self.names[0]
        # Spelled as JAX spells the step's results: another spelling of the same sharding is traced anew.
        rest = leaf.ndim - divided - 1 if self._explicit else 0
        return PartitionSpec(*(None,) * divided, names, *(None,) * rest)

    def sharding(self, leaf: Any) -> NamedSharding:
        """Where the parts of an array are."""
        return NamedSharding(self.mesh, self.spec(leaf))

    def padded(self, leaf: jax.Array) -> jax.Array:
        """An array with its padding."""
        if self.axis(leaf) is None:
            return leaf
        return jnp.pad(leaf, [(0, new - old) for new, old in zip(self.shape(leaf), leaf.shape, strict=True)])

    def cut(self, kept: jax.Array, like: Any) -> jax.Array:
        """An array without its padding, in the parts that it is kept in."""
        if self.axis(like) is None:
            return kept
        leaf = kept[tuple(slice(size) for size in like.shape)]
        return self._constrained(leaf, self.spec(like))

    def kept(self, leaf: jax.Array) -> jax.Array:
        """An array with its padding, in parts."""
        return self._constrained(self.padded(leaf), self.spec(leaf))

    def replicated(self, leaf: jax.Array) -> jax.Array:
        """An array whole on every device; under Explicit axes its type says where it is."""
        return leaf if self._explicit else self._constrained(leaf, PartitionSpec())

    @property
    def _explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types

    def _constrained(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        mesh = jax.sharding.get_abstract_mesh() if self._explicit else self.mesh
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    def automatic(self, function: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
        """The function with all axes of type Auto inside it; its results have these shardings in their types."""
        if not self._explicit:
            return function

        def automatic(*args):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return jax.sharding.auto_axes(function, out_sharding=shardings)(*args)

        return automatic

    def check_context(self) -> None:
        """Raises ValueError where each device runs a program of its own."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if manual:
            raise ValueError(
                f"shard_state divides the state in a program for all devices (jax.jit), but here, inside shard_map or pmap over "
                f"{manual[0]!r}, each device runs its own: update the optimizer outside, or leave shard_state out."
            )

    def check_state(self, state: Any, shapes: Any) -> None:
        """Raises ValueError for a state that is not divided like this."""
        if jax.tree.structure(state) != jax.tree.structure(shapes):
            raise ValueError("The state is not that of this optimizer: make it with its own init.")
        leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shapes), strict=True)
        for (path, leaf), like in leaves:
            if leaf.shape != self.shape(like):
                raise ValueError(
                    f"The state's {jax.tree_util.keystr(path)} has shape {leaf.shape} instead of {self.shape(like)}, which is "
                    f"{like.shape} padded for {self.parts} devices: it was made without shard_state, or for another mesh."
                )
