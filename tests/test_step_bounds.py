"""`normalize_layers`, `clip_layers`, `graft` and the KL clip of each layer: the length of each step, stacks taken apart."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax._methods import matrices

from .dense import assert_close


@pytest.fixture(scope="module")
def problem():
    """A stack of three kernels, a wide one with a bias, a parameter outside; and updates of very different sizes."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            ensemble = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                out_axes=0,
                axis_size=3,
            )
            gain = self.param("gain", nn.initializers.ones, (40,))
            hidden = ensemble(4, use_bias=False, name="stack")(jnp.stack([x, x + 1, 2 * x])).sum(0)
            return jnp.sin(gain) * nn.Dense(40, name="wide")(hidden)

    x = jax.random.normal(jax.random.key(0), (6, 5))
    params = jax.jit(Net().init)(jax.random.key(1), x)["params"]

    def loss(params, x):
        return kfe.losses.l2_loss(Net().apply({"params": params}, x)).mean()

    layers = kfe.find_layers(loss, params, x)
    assert layers["stack"].shape == (3, 5, 4) and layers["wide"].shape == (5, 40) and len(layers.rest) == 1
    keys = iter(jax.random.split(jax.random.key(2), 4))
    updates = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    updates["stack"]["kernel"] *= jnp.array([1e-20, 1.0, 1e15])[:, None, None]
    return params, layers, updates


def lengths(layers, tree):
    """The root mean square of every matrix, in float64."""
    matrices = {name: np.asarray(layer.to_matrix(tree), np.float64) for name, layer in layers.items()}
    return {name: np.sqrt(np.mean(m**2, (-2, -1))) for name, m in matrices.items()}


@pytest.mark.parametrize(
    ("size", "stack", "wide"),
    [("rms", 1, 1), ("fan_in", 5**-0.5, 5**-0.5), ("operator", 4**0.5 / 5, 5**0.5 / 5)],
)
def test_normalize(size, stack, wide, problem):
    params, layers, updates = problem
    tx = kfe.normalize_layers(layers, size)
    new, _ = jax.jit(tx.update)(updates, tx.init(params))
    assert_close(lengths(layers, new), {"stack": np.full(3, stack), "wide": np.asarray(wide)}, 1e-5)
    np.testing.assert_array_equal(new["gain"], updates["gain"])

    def direction(tree):
        first = np.asarray(tree["stack"]["kernel"][0])
        return first / np.abs(first).max()

    assert_close(direction(new), direction(updates), 1e-5)


def test_operator_size_is_that_of_the_root_mean_square_singular_value():
    """Of an orthogonal Δ it is the norm from root mean squares of inputs to those of outputs itself."""

    def loss_fn(params, x):
        return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"], params)).mean()

    for shape in ((8, 3), (3, 8)):
        params = {"kernel": jnp.ones(shape)}
        layers = kfe.find_layers(loss_fn, params, jnp.ones((2, shape[0])))
        matrix = np.random.default_rng(0).normal(size=shape)
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        tx = kfe.normalize_layers(layers, "operator")
        new, _ = jax.jit(tx.update)({"kernel": jnp.asarray(u @ v, jnp.float32)}, tx.init(params))
        norm = np.linalg.norm(np.asarray(new["kernel"]), 2) * np.sqrt(shape[0] / shape[1])
        assert norm == pytest.approx(1, rel=1e-5)


def test_spectral_norm(x64):
    """Exact where one direction leads; from below, and near, for any other."""
    generator, spectral_norm = np.random.default_rng(0), jax.jit(matrices.spectral_norm)
    for shape in ((6, 4), (4, 60), (3, 20, 20)):
        matrix = generator.normal(size=shape)
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        found = np.asarray(spectral_norm(matrix))
        assert np.all(found <= s[..., 0] * (1 + 1e-12)) and np.all(found > 0.85 * s[..., 0])
        led = (u * (s * np.r_[100, np.ones(s.shape[-1] - 1)])[..., None, :]) @ v
        assert_close(spectral_norm(led), 100 * s[..., 0], 1e-9)
    assert float(spectral_norm(np.zeros((3, 2)))) == 0


def changes(layers, tree):
    """√(d_in/d_out) ‖Δ‖₂ of every matrix."""
    found = {name: np.asarray(layer.to_matrix(tree), np.float64) for name, layer in layers.items()}
    return {
        name: np.sqrt(m.shape[-2] / m.shape[-1]) * np.linalg.norm(m, 2, (-2, -1)) for name, m in found.items()
    }


def test_clip_layers(problem):
    """Each matrix by itself: short ones as they are, long ones down to the bound, in their direction; a schedule counts."""
    params, layers, updates = problem
    tx = kfe.clip_layers(layers, lambda step: 0.3 + step)
    update = jax.jit(tx.update)
    new, state = update(updates, tx.init(params))
    before, after = (changes(layers, tree) for tree in (updates, new))
    np.testing.assert_array_equal(new["stack"]["kernel"][0], updates["stack"]["kernel"][0])
    for long in (after["stack"][1:], after["wide"]):
        assert np.all(long < 0.3 / 0.85) and np.all(long > 0.3 * (1 - 1e-5))
    assert np.all(before["stack"][1:] > 0.4)
    np.testing.assert_array_equal(new["gain"], updates["gain"])
    later, _ = update(updates, state)
    assert_close(
        np.asarray(later["wide"]["kernel"]) / new["wide"]["kernel"], np.full((4, 40), 1.3 / 0.3), 1e-5
    )


def test_zero_stays_zero(problem):
    params, layers, updates = problem
    nothing = jax.tree.map(np.zeros_like, updates)
    bounds = kfe.normalize_layers(layers, "spectral"), kfe.clip_layers(layers, 0.1)
    for tx in (
        *bounds,
        kfe.normalize_layers(layers),
        kfe.graft(optax.identity(), optax.scale_by_sign(), layers),
    ):
        new, _ = jax.jit(tx.update)(nothing, tx.init(params), params)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(new))


def test_graft(problem):
    """The lengths of the one and the directions of the other; states and extra arguments of both."""
    params, layers, updates = problem
    seen = []

    def spy(scale):
        def update(grads, state, params=None, *, word=None, **_):
            seen.append(word)
            return jax.tree.map(lambda g: scale * g, grads), state + 1

        return optax.GradientTransformationExtraArgs(lambda _: jnp.zeros((), jnp.int32), update)

    tx = kfe.graft(spy(-1.0), optax.chain(spy(1.0), optax.scale_by_sign(), optax.scale(3.0)), layers)
    update = jax.jit(tx.update, static_argnames="word")
    new, state = update(updates, tx.init(params), params, word="both")
    assert seen == ["both", "both"] and int(state.direction) == int(state.magnitude[0]) == 1
    assert_close(lengths(layers, new), {"stack": np.full(3, 3.0), "wide": np.asarray(3.0)}, 1e-5)
    assert float(jnp.sqrt(jnp.mean(new["gain"] ** 2))) == pytest.approx(3, rel=1e-5)
    assert float(jnp.vdot(new["gain"], updates["gain"])) < 0
    with pytest.raises(TypeError, match="GraftState"):
        tx.update(updates, optax.EmptyState(), params)


def test_clip_of_each_layer(problem):
    """ν = min(1, sqrt(c / (η² |Δᵀ∇|))) of every matrix; the least of them is in `kfe.info`."""
    params, layers, updates = problem
    grads = {**updates, "stack": {"kernel": jnp.ones((3, 5, 4)) * jnp.array([0.1, 1.0, 9.0])[:, None, None]}}
    tx = kfe.clip_by_kl(optax.identity(), 0.3, 0.5, layers=layers)
    new, state = jax.jit(tx.update)(grads, tx.init(params), params)
    squares = {
        name: np.sum(np.asarray(own.to_matrix(grads), np.float64) ** 2, (-2, -1))
        for name, own in layers.items()
    }
    nu = {name: np.minimum(1, np.sqrt(0.3 / (0.25 * s))) for name, s in squares.items()}
    before, after = (lengths(layers, tree) for tree in (grads, new))
    assert_close({name: after[name] / before[name] for name in layers}, nu, 1e-5)
    assert nu["stack"][0] == 1 > nu["stack"][1]
    gain = float(jnp.sum(grads["gain"] ** 2))
    assert_close(new["gain"] / grads["gain"], np.full(40, min(1, np.sqrt(0.3 / (0.25 * gain)))), 1e-5)
    least = min(*(n.min() for n in nu.values()), np.sqrt(0.3 / (0.25 * gain)))
    assert float(kfe.info(state).kl_factor) == pytest.approx(least, rel=1e-5)
    assert int(kfe.info(state).rejected) == 0


def test_one_bad_layer_does_not_stop_the_others(problem):
    params, layers, updates = problem
    bad = {**updates, "stack": {"kernel": jnp.ones((3, 5, 4)).at[1, 0, 0].set(jnp.nan)}}
    tx = kfe.clip_by_kl(optax.identity(), 1e9, layers=layers)
    new, state = jax.jit(tx.update)(bad, tx.init(params), params)
    assert not np.any(new["stack"]["kernel"][1]) and np.all(new["stack"]["kernel"][0] == 1)
    assert np.any(new["wide"]["kernel"])
    assert (int(kfe.info(state).rejected), float(kfe.info(state).kl_factor)) == (1, 0)


def last_losses(**options):
    """Of 150 steps of `kfe.kfac(0.1, layers, 1e-2, **kfe.NATURAL)` on a ReLU network, 16 examples a step.

    Its inputs have one large direction.
    """
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 1024)
    centers = 0.5 * generator.normal(size=(10, 256))[labels] + generator.normal(size=(1024, 1))
    x = jnp.asarray(np.abs(centers + 0.3 * generator.normal(size=(1024, 256))), jnp.float32)
    y = jnp.asarray(labels)

    def loss_fn(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(kfe.tag_dense(x, x @ layer["kernel"], layer))
        z = kfe.tag_dense(x, x @ params[-1]["kernel"], params[-1])
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    shapes = ((256, 32), (32, 32), (32, 10))
    params = [
        {"kernel": jnp.asarray(generator.normal(size=s) * (2 / s[0]) ** 0.5, jnp.float32)} for s in shapes
    ]
    layers = kfe.find_layers(loss_fn, params, x[:16], y[:16])
    # With inverses of 50 steps before: those that are new keep the run from the worst by themselves.
    periods = {"initial_refreshes": 3, "refreshes_per_doubling": 0}
    tx = kfe.kfac(0.1, layers, 1e-2, **{**kfe.NATURAL, **periods, **options})
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)

    def step(carry, chosen):
        params, state = carry
        key = jax.random.key(chosen[0])
        loss, grads, taps = differentiate(params, x[chosen], y[chosen], key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return (optax.apply_updates(params, updates), state), loss

    batches = jnp.asarray(generator.integers(0, 1024, (150, 16)))

    @jax.jit
    def run(params):
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        return losses[-20:].mean(), losses.max(), loss_fn(params, x, y)

    return tuple(map(float, run(params)))


def test_a_first_try_with_small_batches():
    """The bound of `kfe.NATURAL` keeps a step of noisy curvature from ruining a layer; where it is left out, one does."""
    last, highest, of_all = last_losses()
    assert last < 0.1 and of_all < 0.1 and highest < 5
    # Without it the run is chaotic: how much worse it is depends on the rounding of the machine.
    unbounded, risen, _ = last_losses(max_change=None)
    assert unbounded > 10 * last and risen > highest


def test_float16_stays_float16(problem):
    params, layers, updates = problem
    small = jax.tree.map(lambda u: np.full(u.shape, 1e-3, np.float16), updates)
    for tx in (
        kfe.normalize_layers(layers),
        kfe.clip_layers(layers, 1e-6),
        kfe.clip_by_kl(optax.identity(), 1e-8, layers=layers),
    ):
        new, _ = jax.jit(tx.update)(small, tx.init(params), params)
        assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.float16)}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_misuse(problem):
    params, layers, updates = problem
    with pytest.raises(
        ValueError, match="size must be 'rms', 'fan_in', 'operator' or 'spectral', not 'norm'"
    ):
        kfe.normalize_layers(layers, "norm")
    for make in (
        lambda given: kfe.normalize_layers(given),
        lambda given: kfe.clip_layers(given, 0.1),
        lambda given: kfe.graft(optax.identity(), optax.identity(), given),
        lambda given: kfe.clip_by_kl(optax.identity(), 1.0, layers=given),
    ):
        with pytest.raises(TypeError, match="layers must be what kfe.find_layers"):
            make(params)
    with pytest.raises(ValueError, match="max_change must be positive"):
        kfe.clip_layers(layers, 0.0)
    tx = kfe.normalize_layers(layers)
    with pytest.raises(ValueError, match="find_layers did not see"):
        tx.update({**updates, "more": jnp.ones(2)}, tx.init(params))
