"""`value_grad_and_taps`: the loss, its gradient and, in a lazy form, every layer's curvature statistics.

One forward pass. The taps carry the pull (the residuals of `jax.vjp`); whoever reads a statistic runs the pull again with the
loss's mode swapped, inside its own `lax.cond`, so that a step that refreshes nothing costs a plain gradient.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from kfe_optax import adapters, discovery, outputs, tags
from kfe_optax.adapters import nnx as nnx_adapter
from kfe_optax.layers import Layers
from kfe_optax.statistics import Statistics, make_statistics

Fisher = Literal["sampled", "empirical", "exact"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about taps: how to run the pull, and for which layers."""

    structure: Any  # the pull's tree structure
    modes: tuple[tuple[int, ...], ...]  # for each registered loss, which of the pull's leaves are its mode
    seeds: tuple[tuple[int, ...], ...]
    layers: Layers
    fisher: Fisher
    num_samples: int
    axis_name: Any

    @property
    def draws(self) -> int:
        """The number of Fisher pulls whose sum (or mean) is the estimate."""
        if self.fisher == "exact":
            return sum(output.columns for output in self.layers.outputs)
        return self.num_samples if self.fisher == "sampled" else 1


@jax.tree_util.register_pytree_node_class
class Taps:
    """The layers' statistics of one step, lazily; `taps[name]` is a layer's tap.

    A pytree of arrays (the residuals of the step's backward pass), so that it passes through `jit`, `scan`, `pmap` and every
    Optax wrapper as an extra argument. It lives as long as the step.
    """

    def __init__(self, leaves: list[Any], cotangent: Any, seed: Any, weights: Any, plan: _Plan):
        self._leaves = leaves
        self._cotangent = cotangent
        self._seed = seed
        self._weights = weights
        self._plan = plan

    def tree_flatten(self):
        return (self._leaves, self._cotangent, self._seed, self._weights), self._plan

    @classmethod
    def tree_unflatten(cls, plan, children):
        return cls(*children, plan)

    @property
    def layers(self) -> Layers:
        """The layers, with the shapes of this step's batch."""
        return self._plan.layers

    def __getitem__(self, name: str) -> Tap:
        if name not in self.layers:
            raise KeyError(f"no tap {name!r}; the layers are {', '.join(self.layers)}")
        return Tap(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Taps({', '.join(self.layers)}; fisher={self._plan.fisher!r})"

    def draw(self, index: Any) -> dict[str, Statistics]:
        """One Fisher draw (a sample of the targets, or a column) for every layer, undivided by the number of samples."""
        plan = self._plan
        leaves = list(self._leaves)
        if plan.fisher != "empirical":
            key = jax.random.wrap_key_data(self._seed, impl="threefry2x32")
            first = 0
            for output, modes, seeds in zip(plan.layers.outputs, plan.modes, plan.seeds, strict=True):
                if plan.fisher == "exact":
                    column = index - first
                    inside = (column >= 0) & (column < output.columns)
                    mode = jnp.stack([jnp.where(inside, outputs.EXACT, outputs.SILENT), column])
                    first += output.columns
                else:
                    mode = jnp.array([outputs.SAMPLED, 0])
                folded = jax.random.fold_in(jax.random.fold_in(key, output.serial), index)
                for leaf in modes:
                    leaves[leaf] = mode.astype(jnp.int32)
                for leaf in seeds:
                    leaves[leaf] = jax.random.key_data(folded)
        pull = jax.tree.unflatten(plan.structure, leaves)
        _, riders = pull(self._cotangent)
        empirical = plan.fisher == "empirical"
        return {
            layer.name: make_statistics(layer, rider, empirical)
            for layer, rider in zip(plan.layers.values(), riders["layers"], strict=True)
        }

    def pulled(self) -> Pulled:
        """The taps with the pull run, when a single draw makes the estimate, so that several reductions share it."""
        return Pulled(self, self.draw(0) if self._plan.draws == 1 else None)

    @property
    def gradient_weight(self) -> Any:
        """Σc / Σc² over the loss's elements, N for a mean over N: the factor from squared mean gradients to the Fisher.

        With independent elements of weight c, E[(Σ c ∇)²] = Σ c² E[∇²] where the Fisher's diagonal is Σ c E[∇²]. None when
        the loss registers nothing.
        """
        if self._weights is None:
            return None
        total, square = self._weights[0], self._weights[1]
        devices = 1 if self._plan.axis_name is None else jax.lax.psum(1, self._plan.axis_name)
        return devices * total / jnp.maximum(square, jnp.finfo(jnp.float32).tiny)


class Pulled:
    """Taps inside one refresh (see `Taps.pulled`)."""

    def __init__(self, taps: Taps, statistics: dict[str, Statistics] | None):
        self._taps = taps
        self._statistics = statistics

    def inputs(self, function: Callable[[dict[str, Statistics]], T]) -> T:
        """`function(statistics by layer)` averaged over devices, for what depends on the inputs ā alone."""
        plan = self._taps._plan
        value = function(self._taps.draw(0) if self._statistics is None else self._statistics)
        return value if plan.axis_name is None else jax.lax.pmean(value, plan.axis_name)

    def reduce(self, function: Callable[[dict[str, Statistics]], T]) -> T:
        """Σ over exact columns, or the mean over samples, of `function(statistics by layer)`, averaged over devices.

        `function` maps the statistics of one draw to a pytree of arrays that are quadratic in g.
        """
        plan = self._taps._plan
        total = self._loop(function) if self._statistics is None else function(self._statistics)
        if plan.axis_name is not None:
            total = jax.lax.pmean(total, plan.axis_name)
        return total

    def _loop(self, function: Callable[[dict[str, Statistics]], Any]) -> Any:
        plan = self._taps._plan
        shapes = jax.eval_shape(lambda: function(self._taps.draw(0)))

        def add(total, index):
            return jax.tree.map(jnp.add, total, function(self._taps.draw(index))), None

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, jnp.arange(plan.draws))
        return total if plan.fisher == "exact" else jax.tree.map(lambda v: v / plan.draws, total)


@jax.tree_util.register_pytree_node_class
class Tap:
    """What one layer yields in one step: see `Layer.rows`, and `Taps.pulled` for all layers at once."""

    def __init__(self, taps: Taps, name: str):
        self.taps = taps
        self.name = name

    def tree_flatten(self):
        return (self.taps,), self.name

    @classmethod
    def tree_unflatten(cls, name, children):
        return cls(children[0], name)

    def rows(self) -> tuple[jax.Array, jax.Array]:
        """(ā, g), see `Layer.rows`."""
        layer = self.taps.layers[self.name]
        if layer.shared:
            raise ValueError(
                f"Layer {self.name!r} uses its parameters more than once, so its statistics are sums over the uses and it has no "
                "rows; read tap.covariances() or tap.example_gradients()."
            )
        return _rows(self)

    def covariances(self) -> tuple[jax.Array, jax.Array]:
        """(A, G): A (*stack, d_in, d_in) = E[mean_t ā āᵀ], G (*stack, d_out, d_out) = E[Σ_t g gᵀ]."""
        return _covariances(self)

    def second_moment_in(self, basis_in: jax.Array | None, basis_out: jax.Array | None) -> jax.Array | None:
        """S* = E[(U_Aᵀ ∇W̄ U_G)²] over per-example gradients, (*stack, d_in, d_out); None is the identity basis."""
        return _second_moment(self, basis_in, basis_out)

    def example_gradients(self) -> jax.Array:
        """Σ_t ā gᵀ of each example, (*stack, n, d_in, d_out), of one draw."""
        return _example_gradients(self)


@jax.jit
def _rows(tap: Tap) -> tuple[jax.Array, jax.Array]:
    plan = tap.taps._plan
    if plan.draws == 1:
        return tap.taps.draw(0)[tap.name].rows()
    a, _ = tap.taps.draw(0)[tap.name].rows()
    return a, jax.lax.map(lambda i: tap.taps.draw(i)[tap.name].rows()[1], jnp.arange(plan.draws))


@jax.jit
def _covariances(tap: Tap) -> tuple[jax.Array, jax.Array]:
    pulled = tap.taps.pulled()
    return (
        pulled.inputs(lambda s: s[tap.name].input_factor()),
        pulled.reduce(lambda s: s[tap.name].output_factor()),
    )


@jax.jit
def _second_moment(tap: Tap, basis_in: Any, basis_out: Any) -> jax.Array | None:
    return tap.taps.pulled().reduce(lambda s: s[tap.name].second_moment_in(basis_in, basis_out))


@jax.jit
def _example_gradients(tap: Tap) -> jax.Array:
    return tap.taps.draw(0)[tap.name].example_gradients()


class _Collection:
    """Puts the tags on (see `tags.Listener`)."""

    def __init__(self, registered: dict[int, outputs.Output], controls: dict[int, Any], axis_name: Any):
        self._registered = registered
        self._controls = controls
        self._axis_name = axis_name
        self._serial = 0

    def tag(self, kind, roles, x, y, box):
        del kind, roles
        if "input" in box:
            return tags.row_tag(x, y, dict(box))
        return tags.additive_tag(x, y, dict(box)) if "inputs" in box else y

    def unsupported(self, name, box):
        del name, box

    def output(self, spec, z, args):
        serial, self._serial = self._serial, self._serial + 1
        output = self._registered.get(serial)
        if output is None:
            return z if spec.loss is None else spec.loss(z, *args)
        control = self._controls[serial]
        if spec.loss is None:
            return outputs.tagged_output(output, self._axis_name, z, args[0], control)
        return outputs.tagged_loss(output, self._axis_name, z, args, control)


_compiled: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def value_grad_and_taps(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    fisher: Fisher = "sampled",
    num_samples: int = 1,
    has_aux: bool = False,
    axis_name: Any = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns the taps from which curvature is estimated.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> loss`, as given to `find_layers`.
      layers: what `find_layers` returned for it. The batch size may differ from the one it saw.
      fisher: "sampled": targets drawn from the model's own predictive distribution (Martens & Grosse 2015), needs `key`;
        "exact": all columns of the Fisher at the outputs, as many backward passes as outputs an example; "empirical": the
        gradient's own targets, needs no registered loss.
      num_samples: how many draws "sampled" averages over.
      has_aux: as in `jax.value_and_grad`.
      axis_name: the mapped axis inside `jax.pmap`: statistics are averaged over it, and sampled targets follow the global
        example. The gradients stay local, as those of `jax.value_and_grad`: average them yourself.

    Returns:
      `f(params, *args, key=None, **kwargs) -> (loss, grads, taps)`, `((loss, aux), grads, taps)` with `has_aux`. `loss` and
      `grads` are those of `jax.value_and_grad` (`nnx.value_and_grad` for an `nnx.Module`, whose batch statistics and rng
      counts move alike). It is compiled; arrays are traced, Python values among the arguments are static, so pass
      numbers that change as arrays. Under `vmap` a period's `lax.cond` on a batched step count becomes a select and
      every step pays for a refresh: keep the count unbatched.

    Raises:
      ValueError: the loss registers no output, `key` is missing, the loss's layers or parameters are not those of `layers`, a
        layer's leading axis is not the batch, or "exact" meets a loss inside a loop.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
      >>> model = nn.Dense(3)
      >>> x, labels = jnp.ones((8, 5)), jnp.zeros(8, int)
      >>> params = {"model": model.init(jax.random.key(0), x)["params"]}
      >>> def loss_fn(params, x, labels):
      ...     logits = model.apply({"params": params["model"]}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, params, x, labels)
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(1))
      >>> a, g = layers["model"].rows(taps["model"])
      >>> a.shape, g.shape
      ((8, 1, 6), (8, 1, 3))
    """
    if fisher not in ("sampled", "empirical", "exact"):
        raise ValueError(f"fisher must be 'sampled', 'empirical' or 'exact', not {fisher!r}.")
    if not isinstance(layers, Layers):
        raise TypeError(f"layers must be what kfe.find_layers returns, not a {type(layers).__name__}.")
    if num_samples < 1 or (num_samples > 1 and fisher != "sampled"):
        raise ValueError("num_samples counts the draws of fisher='sampled'; leave it at 1 otherwise.")
    options = (layers, fisher, num_samples, has_aux, axis_name)
    # The compiled function belongs to the loss function: a caller that builds this wrapper anew each step does not recompile.
    per_loss = _compiled.setdefault(loss_fn, {})
    if options not in per_loss:
        per_loss[options] = _compile(weakref.ref(loss_fn), *options)
    compiled = per_loss[options]

    def wrapped(params, *args, key=None, **kwargs):
        if fisher == "sampled" and key is None:
            raise ValueError(
                "fisher='sampled' draws targets from the model and needs a random key: pass key=jax.random.fold_in(key, step), "
                "or choose fisher='empirical' or 'exact'."
            )
        parameters, other, rebuild = adapters.partition(params)
        arrays, static = discovery.split_static((other, args, kwargs))
        seed = jnp.zeros(2, jnp.uint32) if key is None else jax.random.bits(key, (2,), jnp.uint32)
        keep = loss_fn  # the compiled function holds it weakly
        value, grads, taps, state = compiled(rebuild, static, parameters, arrays, seed)
        del keep
        if nnx_adapter.is_module(params):
            nnx_adapter.update(params, state)
        return value, grads, taps

    return wrapped


def _compile(loss_reference, layers: Layers, fisher: Fisher, num_samples: int, has_aux: bool, axis_name: Any):
    def step(rebuild, static, parameters, arrays, seed):
        loss_fn = loss_reference()
        found = discovery.discover(loss_fn, has_aux, parameters, arrays, rebuild, static, {})
        found = _check(layers, found, fisher)
        registered = {output.serial: output for output in found.outputs}
        controls = dict(zip(registered, outputs.control_zeros(len(registered)), strict=True))
        riders = {
            "layers": [
                {name: jnp.zeros(s.shape, s.dtype) for name, s in layer.rider_shapes().items()}
                for layer in found.values()
            ],
            "outputs": [control.rider for control in controls.values()],
        }

        def run(parameters, riders):
            boxes = {
                layer.paths[0][1][:-1]: rider
                for layer, rider in zip(found.values(), riders["layers"], strict=True)
            }
            live = {
                serial: controls[serial]._replace(rider=rider)
                for serial, rider in zip(controls, riders["outputs"], strict=True)
            }
            other, args, kwargs = static(arrays)
            model = rebuild(parameters, other, boxes)
            with tags.listening(_Collection(registered, live, axis_name)), adapters.intercepting():
                loss = loss_fn(model, *args, **kwargs)
            loss, aux = loss if has_aux else (loss, None)
            state = nnx_adapter.other_state(model) if nnx_adapter.is_module(model) else None
            if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
                raise ValueError(
                    f"The loss must be a real scalar, but has shape {jnp.shape(loss)} and dtype {jnp.result_type(loss)}; "
                    "reduce it, for instance with .mean()."
                )
            return loss, (aux, state)

        loss, pull, (aux, state) = jax.vjp(run, parameters, riders, has_aux=True)
        leaves, structure = jax.tree.flatten(pull)
        cotangent = jnp.ones_like(loss)
        grads, cotangents = pull(cotangent)
        modes, seeds = (
            tuple(_find(leaves, control, field) for control in controls.values())
            for field in ("mode", "seed")
        )
        plan = _Plan(structure, modes, seeds, found, fisher, num_samples, axis_name)
        weights = sum(cotangents["outputs"]) if controls else None
        return ((loss, aux) if has_aux else loss), grads, Taps(leaves, cotangent, seed, weights, plan), state

    return jax.jit(step, static_argnums=(0, 1))


def _find(leaves: list[Any], control: outputs.Control, field: str) -> tuple[int, ...]:
    """Where a control's leaf stands among the pull's residuals."""
    wanted = getattr(control, field)
    found = tuple(i for i, leaf in enumerate(leaves) if leaf is wanted)
    if not found:
        raise ValueError(
            "The registered loss could not be reached from the gradient: its residuals hold no mode. Does the loss pass through "
            "a custom_vjp of its own, or is its value unused? Register its outputs outside, or use fisher='empirical'."
        )
    return found


def _check(layers: Layers, found: Layers, fisher: Fisher) -> Layers:
    """Raises for a call that does not fit the layers; otherwise the layers found, with the batch axis settled."""
    difference = discovery.same_layers(layers, found)
    if difference:
        raise ValueError(
            f"The parameters or the loss are not those that find_layers saw: {difference}. Call find_layers again and rebuild "
            "the optimizer with what it returns."
        )
    if fisher != "empirical" and not found.outputs:
        raise ValueError(
            f"fisher={fisher!r} needs to know what the model predicts, but the loss registers nothing: compute it with a "
            "function of kfe.losses, or pass the outputs through kfe.register_output; or use fisher='empirical'."
        )
    looped = [output.spec.name for output in found.outputs if output.looped]
    if fisher == "exact" and looped:
        raise ValueError(
            f"fisher='exact' cannot enumerate the outputs of {looped[0]} inside a loop (scan, map): collect the outputs and "
            "compute the loss outside the loop, or use fisher='sampled'."
        )
    batches = {output.examples for output in found.outputs if not output.looped}
    return found.settle_batch(batches) if batches else found
