"""Any Optax transformation in the eigenbasis: EKFAC and SOAP as special cases, states carried, bases kept and refreshed."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import dense_soap, problems
from . import factor_rows as fr
from . import given_factors as gf
from .dense import assert_close, relative_error


class Moments(NamedTuple):
    nu: Any


def running_scale(damping, decay):
    """EKFAC's running scale as an inner transformation: a division by the average of N ∇²."""

    def init(params):
        return Moments(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, *, kfe, **extra):
        del params, extra
        start = {name: jnp.where(kfe.first, kfe.eigenvalues[name], nu) for name, nu in state.nu.items()}
        nu = {
            name: decay * start[name] + (1 - decay) * kfe.gradient_weight * g**2
            for name, g in updates.items()
        }
        return {name: g / (nu[name] + damping) for name, g in updates.items()}, Moments(nu)

    return optax.GradientTransformationExtraArgs(init, update)


def test_ekfac_is_a_special_case(x64):
    """A mean over pixels, whose weight is not N alone; bases refreshed three times within the steps."""
    problem = problems.make("plain", "pixels")
    layers = problem.layers()
    periods = {"factor_update_period": 1, "basis_update_period": 2, "initial_refreshes": 1}
    options = {"scale": "running", "scale_decay": 0.8, "null_threshold": 0.0}
    ekfac = kfe.scale_by_ekfac(layers, 0.2, factors=kfe.factors.kfac(0.7), **options, **periods)
    inner = running_scale(0.2, 0.8)
    ours = kfe.in_kfe(inner, layers, basis=kfe.factors.kfac(0.7), rest=optax.identity(), **periods)
    step = optax.scale(-0.1)
    expected, _ = problems.run(problem, layers, optax.chain(ekfac, step), 6)
    found, (state, _) = problems.run(problem, layers, optax.chain(ours, step), 6)
    assert_close(found, expected)
    assert int(kfe.info(state).last_refresh) == 4
    assert relative_error(found[-1][0], problem.weights[0]) > 1e-2


def square_loss(params, x):
    for name in params:
        x = jnp.tanh(kfe.tag_dense(x, x @ params[name]["kernel"], params[name]))
    return jnp.mean(x**2)


SOAP = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
SQUARE = {name: {"kernel": np.ones((4, 4))} for name in ("one", "two")}


def drifting_gradients(steps=9):
    """A basis that turns slowly while the sizes along it pass each other, so that sorting has something to do."""
    generator = np.random.default_rng(0)
    bases = {name: np.linalg.qr(generator.normal(size=(2, 4, 4)))[0] for name in SQUARE}
    sequence = []
    for step in range(steps):
        gradients = {}
        for name, (left, right) in bases.items():
            sizes = np.array([8.0, 4.0, 2.0, 1.0]) * np.array([0.6, 1.0, 1.0, 1.7]) ** step
            noise = 0.05 * generator.normal(size=(4, 4))
            gradients[name] = left @ np.diag(sizes) @ right.T + noise
        sequence.append(gradients)
    return sequence


@pytest.mark.parametrize(
    ("refresh", "second_moment"), [("eigh", "rotate"), ("qr", "rotate"), ("eigh", "keep"), ("qr", "keep")]
)
def test_soap_is_a_special_case(refresh, second_moment, x64):
    """Adam with the mean gradient's factors: no taps. SOAP itself keeps the second moments with their columns."""
    layers = kfe.find_layers(square_loss, SQUARE, jnp.ones((3, 4)))
    carry = None
    if second_moment == "keep":
        carry = {"nu": "keep" if refresh == "eigh" else "columns"}
    tx = kfe.in_kfe(
        optax.scale_by_adam(**SOAP),
        layers,
        basis=kfe.factors.gradient(0.5),
        carry=carry,
        factor_update_period=1,
        basis_update_period=2,
        refresh=refresh,
    )
    sequence = drifting_gradients()
    options = {"beta": 0.5, "period": 2, "refresh": refresh, "second_moment": second_moment, **SOAP}
    oracle = dense_soap.Soap(**options)
    state, update = tx.init(SQUARE), jax.jit(tx.update)
    moved = False
    for gradients in sequence:
        before = [own.basis for own in oracle.matrices]
        expected = oracle.update(list(gradients.values()))
        moved |= any(
            np.any(np.argmax(np.abs(new.basis[0].T @ old[0]), -1) != np.arange(4))
            for old, new in zip(before, oracle.matrices, strict=False)
        )
        new, state = update({name: {"kernel": g} for name, g in gradients.items()}, state, SQUARE)
        assert_close([new[name]["kernel"] for name in SQUARE], expected)
    assert moved  # columns have changed places


def test_soap_on_a_fixed_problem(x64):
    """Least squares to a matrix, unequal sides, a refresh in every step; the gradients come from the iterates."""
    generator = np.random.default_rng(5)
    x, w, y = (generator.normal(size=s) for s in ((9, 5), (5, 3), (9, 3)))

    def loss_fn(params):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z, y).sum(-1).mean()

    params = {"kernel": jnp.asarray(w)}
    layers = kfe.find_layers(loss_fn, params)
    soap = kfe.in_kfe(
        optax.scale_by_adam(**SOAP),
        layers,
        basis=kfe.factors.gradient(0.95),
        factor_update_period=1,
        basis_update_period=1,
    )
    tx = optax.chain(soap, optax.scale(-0.05))
    oracle = dense_soap.Soap(beta=0.95, second_moment="rotate", **SOAP)
    state, dense_w = tx.init(params), w
    grad, update = jax.jit(jax.grad(loss_fn)), jax.jit(tx.update)
    for _ in range(8):
        updates, state = update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
        (new,) = oracle.update([x.T @ (x @ dense_w - y) / len(x)])
        dense_w = dense_w - 0.05 * new
        assert_close(params["kernel"], dense_w)
    assert relative_error(dense_w, w) > 0.05


def test_soap_alias(x64):
    """The published algorithm (second moments unturned, QR, every ten steps), on gradients of a basis that turns; no taps."""
    layers = kfe.find_layers(square_loss, SQUARE, jnp.ones((3, 4)))
    tx = kfe.soap(0.1, layers, eps=1e-3, weight_decay=0.2)
    oracle = dense_soap.Soap(b1=0.95, b2=0.95, eps=1e-3, beta=0.95, period=10, refresh="qr")
    params = jax.tree.map(jnp.asarray, SQUARE)
    state, update = tx.init(params), jax.jit(tx.update)
    for gradients in drifting_gradients(12):
        expected = oracle.update(list(gradients.values()))
        new, state = update({name: {"kernel": g} for name, g in gradients.items()}, state, params)
        for name, delta in zip(SQUARE, expected, strict=True):
            assert_close(new[name]["kernel"], -0.1 * (delta + 0.2 * params[name]["kernel"]))


STEPS = 5


@functools.cache
def turning_table():
    """Terms whose eigenbasis is another one in every step; stacked layers and diagonal sides among them."""
    return gf.random_table(np.random.default_rng(11), STEPS, 1)


def in_kfe(inner, **options):
    every = {"factor_update_period": 1, "basis_update_period": 1}
    return kfe.in_kfe(inner, fr.layers(), basis=gf.Given(turning_table()), **{**every, **options})


@pytest.mark.parametrize(("inner", "refresh"), [("identity", "eigh"), ("trace", "eigh"), ("trace", "qr")])
def test_linear_transforms_do_not_see_the_basis(inner, refresh, x64):
    """Momentum is the same in any basis, whatever it is refreshed to, if it is carried by the rotation."""
    plain = {"identity": optax.identity(), "trace": optax.trace(0.9, nesterov=True)}[inner]
    tx, params = in_kfe(plain, refresh=refresh), fr.parameters()
    update = jax.jit(tx.update)
    generator = np.random.default_rng(0)
    state, plain_state = tx.init(params), plain.init(params)
    for _ in range(STEPS):
        gradients = gf.random_gradients(generator)
        before = state
        new, state = update(gradients, state, params)
        expected, plain_state = plain.update(gradients, plain_state)
        assert_close(new, expected)
        turned = state.method.basis["stack"][0].vectors.mT @ before.method.basis["stack"][0].vectors
        assert relative_error(jnp.abs(turned), np.stack([np.eye(4)] * 2)) > 0.1


INNERS = {
    "rms": (optax.scale_by_rms(0.9), {"nu": 2}),
    "rss": (optax.scale_by_rss(0.1), {"sum_of_squares": 2}),
    "lion": (optax.scale_by_lion(), {"mu": 1}),
    "amsgrad": (optax.scale_by_amsgrad(), {"mu": 1, "nu": 2, "nu_max": 2}),
    "adadelta": (optax.scale_by_adadelta(), {"e_g": 2, "e_x": 2}),
    "ema": (optax.ema(0.9), {"ema": 1}),
    "chain": (
        optax.chain(optax.clip(1.0), optax.trace(0.8), optax.scale_by_rms(0.7)),
        {"trace": 1, "nu": 2},
    ),
}


def rotated(matrix, left, right):
    """left V rightᵀ over a stack; None is a diagonal side, which has the identity."""
    matrix = np.asarray(matrix)
    matrix = matrix if left is None else left @ matrix
    return matrix if right is None else matrix @ right.swapaxes(-1, -2)


def turn(old, new, power):
    """R or R∘R with R = U_newᵀ U_old, for both sides."""
    pairs = [(np.asarray(n), np.asarray(o)) for o, n in zip(old, new, strict=True) if o is not None]
    turns = iter([(n.swapaxes(-1, -2) @ o) ** power for n, o in pairs])
    return [None if o is None else next(turns) for o in old]


def vectors(state, name):
    return [side.vectors for side in state.method.basis[name]]


@pytest.mark.parametrize("name", INNERS)
def test_states_are_carried(name, x64):
    """Each step is the inner transformation's own, on the rotated gradient and on its state rotated by the test."""
    inner, powers = INNERS[name]
    tx, params = in_kfe(inner), fr.parameters()
    update, inner_update = jax.jit(tx.update), jax.jit(inner.update)
    generator = np.random.default_rng(1)
    state = tx.init(params)
    for step in range(3):
        gradients = gf.random_gradients(generator)
        before = state
        new, state = update(gradients, state, params)
        seen = set()

        def carry(path, leaf, before=before, state=state, seen=seen):
            layer = getattr(path[-1], "key", None)
            if layer not in fr.SHAPES:
                return leaf
            (field,) = {key.name for key in path if hasattr(key, "name")}
            seen.add(field)
            sides = turn(vectors(before, layer), vectors(state, layer), powers[field])
            moved = rotated(leaf, *sides)
            if powers[field] == 2:
                assert_close(moved.sum((-2, -1)), np.sum(leaf, (-2, -1)), 1e-12)
                assert (moved >= 0).all()
            return moved

        carried = jax.tree_util.tree_map_with_path(carry, before.method.inner)
        assert seen == set(powers)
        transposed = {n: [u if u is None else np.asarray(u.mT) for u in vectors(state, n)] for n in fr.SHAPES}
        seen_by_inner = {n: rotated(gradients[n]["kernel"], *transposed[n]) for n in fr.SHAPES}
        result, expected_state = inner_update(seen_by_inner, carried)
        assert_close(state.method.inner, expected_state)
        for layer in fr.SHAPES:
            expected = rotated(result[layer], *vectors(state, layer))
            assert_close(new[layer]["kernel"], expected)
        assert step == 0 or relative_error(new["stack"]["kernel"], result["stack"]) > 0.1


class Strange(NamedTuple):
    count: jax.Array
    curious: Any


def strange():
    """Sums the gradients in a field that nobody knows."""

    def init(params):
        return Strange(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        total = jax.tree.map(jnp.add, state.curious, updates)
        return total, Strange(state.count + 1, total)

    return optax.GradientTransformation(init, update)


def test_an_unknown_field_is_asked_for(x64):
    params = fr.parameters()
    with pytest.raises(ValueError, match=r"curious.*carry=\{'curious': 'first'\}.*'second'.*'keep'"):
        in_kfe(strange()).init(params)
    with pytest.raises(ValueError, match=r"carry\['curious'\] must be 'first'"):
        in_kfe(strange(), carry={"curious": "third"})
    seen = []

    def by_hand(leaf, old, new):
        assert [side.values.shape for side in old] == [side.values.shape for side in new]
        seen.append(leaf.shape)
        return kfe_first(leaf, old, new)

    def kfe_first(leaf, old, new):
        for side, (o, n) in enumerate(zip(old, new, strict=True)):
            if o.vectors is not None:
                turned = n.vectors.mT @ o.vectors
                leaf = turned @ leaf if side == 0 else leaf @ turned.mT
        return leaf

    for how in ("first", by_hand):
        tx = in_kfe(strange(), carry={"curious": how})
        update, state, total = jax.jit(tx.update), tx.init(params), 0.0
        generator = np.random.default_rng(2)
        for _ in range(3):
            gradients = gf.random_gradients(generator)
            total = jax.tree.map(jnp.add, total, gradients) if total else gradients
            new, state = update(gradients, state, params)
        assert_close(new, total)
    assert set(seen) == {layer.shape for layer in fr.layers().values()}


def test_weight_decay_sees_rotated_parameters(x64):
    """Decoupled weight decay inside the basis is the same decay outside."""
    decay, adam = 0.1, optax.scale_by_adam()
    inside, outside = in_kfe(optax.chain(adam, optax.add_decayed_weights(decay))), in_kfe(adam)
    generator = np.random.default_rng(6)
    params = gf.random_gradients(generator)
    states = inside.init(params), outside.init(params)
    updates = jax.jit(inside.update), jax.jit(outside.update)
    for _ in range(3):
        gradients = gf.random_gradients(generator)
        (found, first), (plain, second) = (
            update(gradients, state, params) for update, state in zip(updates, states, strict=True)
        )
        states = first, second
        assert_close(found, jax.tree.map(lambda u, w: u + decay * w, plain, params))
