"""Damping as a multiple of each layer's mean curvature: the absolute one with that λ, and no word about the loss's scale."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe
from kfe_optax._linalg import kronecker

from .dense import assert_close
from .methods import quick

EPSILON = 0.3
KERNELS = {"first": (4, 3), "second": (3, 2)}


def loss_fn(params, x, y, weight):
    z = x
    for name in KERNELS:
        z = kfe.tag_dense(z, z @ params[name]["kernel"], params[name])
        z = jnp.tanh(z) if name == "first" else z
    return weight * kfe.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()


PLAIN = {name: (method.scale_by, {}) for name, method in kfe.METHODS.items() if name != "spectral_kfac"}
CASES = {
    **PLAIN,
    "kfac exact": (kfe.scale_by_kfac, {"damping_type": "exact"}),
    "ekfac batch": (kfe.scale_by_ekfac, {"scale": "batch"}),
    "ekfac factored": (kfe.scale_by_ekfac, {"damping_type": "factored"}),
    "gradient": (kfe.scale_by_kronecker, {"factors": kfe.factors.gradient()}),
}

# In a chain λ of one layer acts on its neighbor.
BLOCKS = {name: case for name, case in CASES.items() if name != "kfac_tridiagonal"}


@functools.cache
def problem():
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        params = {n: {"kernel": jnp.asarray(generator.normal(size=s))} for n, s in KERNELS.items()}
        given = jnp.asarray(generator.normal(size=(10, 4))), jnp.arange(10) % 2
        layers = kfe.find_layers(loss_fn, params, *given, 1.0)
        differentiate = jax.jit(kfe.value_grad_and_taps(loss_fn, layers, fisher="exact"))
        steps = {weight: differentiate(params, *given, weight)[1:] for weight in (1.0, 70.0)}
    return params, layers, steps


@functools.cache
def stepper(case, **more):
    """(λ or ε, step) → its update and the state, compiled."""
    params, layers, _ = problem()
    make, options = CASES[case]

    @jax.jit
    def update(strength, step, **traced):
        tx, (grads, taps) = make(layers, strength, **options, **more, **traced), step
        return tx.update(grads, tx.init(params), params, taps=taps)

    return update


def mean_curvature(case, state, factors, layer):
    """That of the layer, in a method's state."""
    if hasattr(state.method, "scale") and case != "ekfac factored":
        return float(state.method.scale[layer.name].mean())
    term = factors[layer.name][0]
    return float(np.prod([kronecker.trace(side, 0) / side.shape[-1] for side in term]))


def terms_of(case, state, layers):
    options = CASES[case][1]
    if "factors" in options:
        return options["factors"].terms(state.method.factors, layers)
    name = case.split()[0]
    return kfe.factors.FACTORS.get(name, kfe.factors.kfac)().terms(state.method.factors, layers)


@pytest.mark.parametrize(
    "case",
    quick(
        "kfac",
        "ekfac",
        "kfac exact",
        slow=("tekfac", "two_level_kfac"),
        of=BLOCKS,
    ),
)
def test_is_absolute_damping_of_each_layer(case, x64):
    """With λ = ε times a layer's mean curvature, the absolute damping gives that layer the same update."""
    _, layers, steps = problem()
    ours, state = stepper(case, relative_damping=True)(EPSILON, steps[1.0])
    absolute = stepper(case)
    terms = terms_of(case, state, layers)
    for layer in layers.values():
        coarse = {}
        if case == "two_level_kfac":
            coarse = {"coarse_damping": 1e-2 * float(state.coarse.basis.values.mean())}
        strength = EPSILON * mean_curvature(case, state, terms, layer)
        theirs, _ = absolute(strength, steps[1.0], **coarse)
        assert_close(ours[layer.name]["kernel"], theirs[layer.name]["kernel"], 1e-9)


@pytest.mark.parametrize("case", quick("kfac", "ekfac", "kfac_tridiagonal", slow=["kpsvd"], of=CASES))
def test_a_sum_trains_as_a_mean(case, x64):
    """A loss that is 70 times as large, its gradient and its Fisher matrix with it, has the same update."""
    _, _, steps = problem()
    relative, absolute = stepper(case, relative_damping=True), stepper(case)
    one, many = (relative(EPSILON, step)[0] for step in steps.values())
    scale = 70 if case == "gradient" else 1  # its factors are quadratic in the loss
    assert_close(jax.tree.map(lambda leaf: leaf * scale, many), one, 1e-9)
    one, many = (absolute(EPSILON, step)[0] for step in steps.values())
    assert np.abs(many["first"]["kernel"] - one["first"]["kernel"]).max() > 1e-3


def test_misuse(x64):
    params, layers, steps = problem()
    for damping_type in ("sqrt", "linear"):
        with pytest.raises(ValueError, match="relative_damping goes with damping_type='factored' or 'exact'"):
            kfe.scale_by_kfac(layers, 0.1, damping_type=damping_type, relative_damping=True)
    with pytest.raises(ValueError, match="coarse='residual' takes a damping in the loss's units"):
        kfe.scale_by_two_level_kfac(layers, 0.1, coarse="residual", relative_damping=True)
    tx = kfe.scale_by_ekfac(layers, 0.1, relative_damping=True)
    grads, taps = steps[1.0]
    with pytest.raises(TypeError, match="cannot be adapted in the loss's units"):
        tx.update(grads, tx.init(params), params, taps=taps, request=kfe.Request(0.1))
