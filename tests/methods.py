"""Every method by name, and one small training step that all of its checks share: a compilation costs far more than a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._linalg import kronecker
from kfe_optax._methods import basis as basis_lib

from . import problems

# Before this step λ and ρ are DAMPING and 0.95, from it on LATER_DAMPING and 0.
LATER = 10
DAMPING, LATER_DAMPING = 0.1, 0.5
# A step on which every period of every method falls.
REFRESH = 100
# Inside `Trainer`, matrices with a larger trace fail to factorize.
BREAKS = 1e4


def damping(step):
    return jnp.where(step < LATER, DAMPING, LATER_DAMPING)


def decay(step):
    return jnp.where(step < LATER, 0.95, 0.0)


class Case(NamedTuple):
    """A transformation as (factory, keyword arguments), so that `optax.inject_hyperparams` can take hold of it."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    options: Mapping[str, Any] = {}
    damped: bool = True

    def make(self, layers: kfe.Layers, strength: Any = DAMPING, wrap: Callable[[Any], Any] = lambda f: f):
        """The transformation; `wrap` is applied to the factory."""
        strengths = {"damping": strength} if self.damped else {}
        return wrap(self.factory)(layers=layers, **strengths, **self.options)

    def having(self, **options: Any) -> Case:
        """The same transformation with other options."""
        return self._replace(options={**self.options, **options})

    def inject(self, layers: kfe.Layers):
        """The transformation with its real numbers in the state."""
        # Whole numbers are sizes and periods; Optax makes weakly typed arrays of them, which cost a second compilation.
        parameters = inspect.signature(self.factory).parameters.items()
        whole = tuple(name for name, parameter in parameters if isinstance(parameter.default, int))
        return self.make(layers, wrap=lambda f: optax.inject_hyperparams(f, static_args=whole))


def _in_kfe(factors: kfe.factors.Factors, **options: Any) -> Case:
    return Case(kfe.in_kfe, {"inner": optax.scale_by_adam(), "basis": factors, **options}, damped=False)


def _variants() -> dict[str, Case]:
    kfac, gradient = kfe.factors.kfac(decay), kfe.factors.gradient(decay)
    every = {"factor_update_period": 2, "decay": decay}
    return {
        "kfac exact": Case(kfe.scale_by_kfac, {"damping_type": "exact", "inverse_update_period": 4, **every}),
        "ekfac batch": Case(
            kfe.scale_by_ekfac,
            {"scale": "batch", "damping_type": "factored", "basis_update_period": 4, **every},
        ),
        "ekfac qr": Case(kfe.scale_by_ekfac, {"refresh": "qr", "on_refresh": "restart", "decay": decay}),
        "adam in the eigenbasis": _in_kfe(kfac),
        "soap": _in_kfe(gradient, refresh="qr"),
        "soap with a tolerance": _in_kfe(gradient, refresh_tolerance=0.1),
    }


# The problem's head stands beside the chain of its other layers.
_OPTIONS = {"kfac_tridiagonal": {"chains": "split"}}

# A new line of `kfe.METHODS` or of `kfe.factors.FACTORS` is picked up by itself, the registry's first.
CASES: dict[str, Case] = {
    **{
        name: Case(method.scale_by, {"decay": decay, **_OPTIONS.get(name, {})})
        for name, method in kfe.METHODS.items()
    },
    **{
        f"kronecker of {name}": Case(kfe.scale_by_kronecker, {"factors": make(decay=decay)})
        for name, make in kfe.factors.FACTORS.items()
        if name not in kfe.METHODS
    },
    **_variants(),
}


def quick(*names, slow=(), of=CASES):
    """All names; those that are not given are for CI or for the nightly runs, since each of them costs another compilation."""
    tiers = {**dict.fromkeys(of, pytest.mark.nightly), **dict.fromkeys(slow, pytest.mark.slow)}
    assert not {*names, *slow} - {*of}
    return [pytest.param(name, marks=[] if name in names else tiers[name]) for name in of]


def kinds_of_frameworks(first, second):
    """(kind of loss, framework): every kind with the first framework, in CI one with the second, the others by night."""
    tiers = {(kind, first): [] for kind in problems.KINDS} | {(problems.KINDS[0], second): pytest.mark.slow}
    return [
        pytest.param(kind, framework, marks=tiers.get((kind, framework), pytest.mark.nightly))
        for kind in problems.KINDS
        for framework in problems.FRAMEWORKS
    ]


class Batch(NamedTuple):
    """What a step is given: examples, the weight of the head's loss, a factor on the gradient, a key."""

    x: jax.Array
    y: jax.Array
    weight: jax.Array
    scale: jax.Array
    key: jax.Array


class Problem(NamedTuple):
    """Two layers, a linear head with a loss of its own, a parameter of no layer and one of no use."""

    params: Any
    loss_fn: Callable[..., jax.Array]
    layers: kfe.Layers
    x: jax.Array
    y: jax.Array

    def batch(self, seed: int = 0, x: Any = None, weight: float = 1.0, scale: float = 1.0) -> Batch:
        inputs = self.x if x is None else x
        return Batch(inputs, self.y, jnp.float32(weight), jnp.float32(scale), jax.random.key(seed))


def make_problem(sizes=problems.SIZES, examples=problems.EXAMPLES, dtype=jnp.float32) -> Problem:
    base = problems.make("linen", sizes=sizes, examples=examples)
    x, y = base.args
    model = problems.LinenNet(sizes[1:])
    # Zeros, so that the head's gradient grows only as its inputs do.
    head = {"kernel": jnp.zeros((sizes[0], sizes[1])), "bias": jnp.zeros(sizes[1])}
    params = {**base.params, "head": head, "temperature": jnp.ones(1), "idle": jnp.ones(3)}
    params, x = jax.tree.map(lambda v: v.astype(dtype), (params, x))

    def loss_fn(params, x, y, weight):
        logits = params["temperature"] * model.apply(
            {"params": {name: params[name] for name in base.names}}, x
        )
        z = kfe.tag_dense(x, x @ params["head"]["kernel"] + params["head"]["bias"], params["head"])
        loss = kfe.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss + weight * kfe.losses.l2_loss(z, jnp.ones_like(z)).mean()

    layers = kfe.find_layers(loss_fn, params, x, y, jnp.float32(1))
    assert list(layers) == [*base.names, "head"]
    return Problem(params, loss_fn, layers, x, y)


class Trainer:
    """One method's compiled, donating training step, and how to use it without losing what goes in.

    Its factorizations yield NaN for matrices of a trace above `BREAKS`, which only a batch made for it reaches.
    """

    def __init__(self, name: str, problem: Problem):
        self.name, self.problem, self.case = name, problem, CASES[name]
        self.tx = self.case.make(problem.layers, damping)
        self.params = problem.params
        self.traces = 0
        differentiate = kfe.value_grad_and_taps(problem.loss_fn, problem.layers)

        def step(params, state, batch):
            self.traces += 1
            loss, grads, taps = differentiate(params, batch.x, batch.y, batch.weight, key=batch.key)
            grads = jax.tree.map(lambda g: g * batch.scale.astype(g.dtype), grads)
            updates, state = self.tx.update(grads, state, params, taps=taps)
            moved = optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates))
            return moved, state, updates, grads, loss

        self.jitted = jax.jit(step, donate_argnums=(0, 1))
        # The first call traces: every kernel is then the breakable one.
        with pytest.MonkeyPatch.context() as patch:
            for module, kernel in _KERNELS:
                patch.setattr(module, kernel, _breakable(getattr(module, kernel)))
            self.first = self.step(self.tx.init(self.params), problem.batch())

    def step(self, state: Any, batch: Batch, at: int | None = None, params: Any = None) -> Result:
        """One step, as number `at` if given; neither the state nor the parameters are donated."""
        if at is not None:
            state = state._replace(count=jnp.asarray(at, jnp.int32))
        given = jax.tree.map(jnp.array, (self.params if params is None else params, state))
        _, state, updates, grads, loss = self.jitted(*given, batch)
        return Result(updates, state, grads, loss)


class Result(NamedTuple):
    updates: Any
    state: Any
    grads: Any
    loss: jax.Array


_KERNELS = (
    (kronecker, "raw_eigh"),
    (kronecker, "_cholesky"),
    (kronecker, "_clipped_inverse_root"),
    (basis_lib, "_power_step"),
)


def _breakable(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def broken(stack, *more):
        fails = kronecker.trace(stack, 1) > BREAKS
        return jax.tree.map(
            lambda v: jnp.where(fails.reshape(fails.shape + (1,) * (v.ndim - 1)), jnp.nan, v),
            kernel(stack, *more),
        )

    return broken


def of_layer(tree: Any, name: str) -> list[jax.Array]:
    """The floating-point leaves of one layer in a state."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        leaf
        for path, leaf in leaves
        if any(getattr(key, "key", None) == name for key in path) and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def factorized(state: Any, name: str, side: int) -> list[jax.Array]:
    """What a method keeps of the factorization of one side of a layer: an inverse, a basis, a pencil."""
    method = state.method
    kept = method.roots if hasattr(method, "roots") else method.basis
    # The layers of a chain share their inverses; the others have their own.
    kept = getattr(kept, "alone", kept)
    return jax.tree.leaves(kept[name][side])
