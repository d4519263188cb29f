"""`scale_by_spectral_kfac` against a singular value decomposition in float64, its theorem, and its relatives."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from kfe_optax import polar

from . import dense, factor_rows, problems
from .dense import assert_close

ACCURATE = polar.minimax_coefficients(16, 1e-6)


def power(factor, exponent, epsilon):
    """(A + √ε (tr A/d) I)^−p."""
    values, vectors = np.linalg.eigh(factor)
    return (vectors * (values + np.sqrt(epsilon) * values.mean()) ** -exponent) @ vectors.T


def sign(matrix):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


class Oracle:
    """The method on dense matrices, step by step."""

    def __init__(self, epsilon, exponents, back, momentum, nesterov, whitened, periods, decay):
        self.epsilon, self.exponents, self.back = epsilon, exponents, back
        self.beta, self.nesterov, self.whitened = momentum, nesterov, whitened
        self.periods, self.decay, self.updates = periods, decay, 0
        self.means, self.factors, self.roots = [], [], []

    def step(self, count, weights, x, loss):
        gradients = [np.asarray(g) for g in dense.gradients(weights, x, loss)]
        if not count:
            self.means = [np.zeros_like(g) for g in gradients]
        if count % self.periods[0] == 0:
            new = [tuple(map(np.asarray, pair)) for pair in dense.kfac_factors(weights, x, loss)]
            self.updates += 1
            rho = min(1 - 1 / self.updates, self.decay)
            old = self.factors or new
            self.factors = [
                tuple(rho * a + (1 - rho) * b for a, b in zip(one, two, strict=True))
                for one, two in zip(old, new, strict=True)
            ]
        if count % self.periods[1] == 0:
            self.roots = [
                [
                    (power(a, p, self.epsilon), power(g, q, self.epsilon))
                    for p, q in (self.exponents, self.back)
                ]
                for a, g in self.factors
            ]
        updates = []
        for i, (v, (before, after)) in enumerate(zip(gradients, self.roots, strict=True)):
            v = before[0] @ v @ before[1] if self.whitened else v
            self.means[i] = self.beta * self.means[i] + (1 - self.beta) * v
            m = self.beta * self.means[i] + (1 - self.beta) * v if self.nesterov else self.means[i]
            m = m if self.whitened else before[0] @ m @ before[1]
            updates.append(after[0] @ sign(m) @ after[1])
        return updates


@pytest.mark.parametrize(
    ("exponents", "back", "nesterov", "momentum_of"),
    [
        ((0.5, 0.5), None, True, "gradient"),
        pytest.param((1, 0), (0, 0), False, "gradient", id="Newton-Muon"),
        pytest.param((0.25, 0.5), (0.5, 0), True, "whitened", marks=pytest.mark.slow),
    ],
)
def test_dense_oracle(exponents, back, nesterov, momentum_of, x64):
    """Five steps with periods, momentum and lengths of one; of a loss whose gradient has no singular value of zero."""
    problem = problems.make("plain", "gaussian")
    layers = problem.layers()
    options = {
        "exponents": exponents,
        "exponents_back": back,
        "nesterov": nesterov,
        "momentum_of": momentum_of,
    }
    tx = kfe.spectral_kfac(
        0.1, layers, 0.3, size="rms", momentum=0.7, decay=0.6, factor_update_period=2, inverse_update_period=3,
        refreshes_per_doubling=0, coefficients=ACCURATE, **options,
    )  # fmt: skip
    trajectory, _ = problems.run(problem, layers, tx, 5)
    oracle = Oracle(0.3, exponents, back or exponents, 0.7, nesterov, momentum_of == "whitened", (2, 3), 0.6)
    weights, x = list(problem.weights), problem.args[0]
    for count in range(5):
        new = oracle.step(count, weights, x, problem.loss)
        weights = [w - 0.1 * d / np.sqrt(np.mean(np.square(d))) for w, d in zip(weights, new, strict=True)]
        assert_close(trajectory[count], [np.asarray(w) for w in weights], 1e-8)


def test_fismo(x64):
    """The published optimizer, five steps: factors, whitening and their roots on every step, momentum of what is whitened."""
    problem = problems.make("plain", "gaussian")
    layers = problem.layers()
    tx = optax.chain(
        kfe.scale_by_spectral_kfac(
            layers, 1e-24, factors=kfe.factors.fismo(0.6, 0.1), momentum=0.7, momentum_of="whitened", nesterov=False,
            factor_update_period=1, inverse_update_period=1, coefficients=ACCURATE,
        ),
        optax.scale(-0.1),
    )  # fmt: skip
    trajectory, _ = problems.run(problem, layers, tx, 5)
    weights, x = list(problem.weights), problem.args[0]
    factors = [(np.eye(w.shape[0]), np.eye(w.shape[1])) for w in weights]
    means = [np.zeros(w.shape) for w in weights]
    for count in range(5):
        for i, v in enumerate(map(np.asarray, dense.gradients(weights, x, problem.loss))):
            p = factor_rows.fismo_side(factors[i][0], v, factors[i][1], 0.6, 0.1, False)
            factors[i] = p, factor_rows.fismo_side(factors[i][1], v.T, p, 0.6, 0.1, False)
            left, right = (power(side, 0.5, 0.0) for side in factors[i])
            means[i] = 0.7 * means[i] + 0.3 * left @ v @ right
            weights[i] = weights[i] - 0.1 * left @ sign(means[i]) @ right
        assert_close(trajectory[count], [np.asarray(w) for w in weights], 1e-8)


def first_update(loss_fn, params, *args, scale=1.0, **options):
    """(first update, gradient, factors) of one tagged layer, with the exact Fisher matrix."""
    layers = kfe.find_layers(loss_fn, params, *args)
    (name,) = layers
    tx = kfe.scale_by_spectral_kfac(layers, **{"coefficients": ACCURATE, **options})
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(params, *args):
        _, grads, taps = differentiate(params, *args)
        return tx.update(grads, tx.init(params), params, taps=taps)[0], grads, taps[name].covariances()

    return step(params, *args)


def regression(reduce):
    def loss_fn(params, x, y):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return reduce(kfe.losses.l2_loss(z, y).sum(-1))

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(12, 4)), generator.normal(size=(12, 3))
    return loss_fn, {"kernel": jnp.asarray(generator.normal(size=(4, 3)))}, jnp.asarray(x), jnp.asarray(y)


def test_steepest_descent_on_the_ball_of_the_metric(x64):
    """‖Â^½ Δ Ĝ^½‖₂ = 1, and of 200 others with that norm none has a larger ⟨V, Δ⟩, which is the dual norm of V."""
    loss_fn, *given = regression(jnp.mean)
    updates, grads, factors = first_update(loss_fn, *given, damping=0.5)
    a, g = map(np.asarray, factors)
    delta, v = np.asarray(updates["kernel"]), np.asarray(grads["kernel"])
    up = [power(f, -0.5, 0.5) for f in (a, g)]
    down = [power(f, 0.5, 0.5) for f in (a, g)]
    norm = lambda d: np.linalg.norm(up[0] @ d @ up[1], 2)
    assert_close(norm(delta), 1.0, 1e-8)
    assert_close(np.vdot(v, delta), np.linalg.norm(down[0] @ v @ down[1], "nuc"), 1e-8)
    for other in np.random.default_rng(1).normal(size=(200, *v.shape)):
        assert np.vdot(v, other / norm(other)) < np.vdot(v, delta)


def test_iterations_in_half_precision():
    """Newton–Schulz alone is in bfloat16: Δ stays float32, and is the same to the roundings, of 2⁻⁹, of three products each."""
    given = regression(jnp.mean)
    accurate, rounded = (
        first_update(*given, iteration_dtype=dtype)[0]["kernel"] for dtype in (None, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.float32 and np.any(rounded != accurate)
    assert_close(rounded, accurate, 3 * len(ACCURATE) * 2**-9)


def test_the_scale_of_the_loss_does_not_matter(x64):
    """A sum of the loss and a mean have the same Δ, but for Ĝ^−½'s scale, which the length does not keep."""
    ours, theirs = (first_update(*regression(reduce))[0]["kernel"] for reduce in (jnp.mean, jnp.sum))
    assert_close(ours / np.linalg.norm(ours), theirs / np.linalg.norm(theirs), 1e-9)


@pytest.mark.parametrize("shape", [(5, 4), (3, 9)])
def test_no_metric_is_muon(shape, x64):
    """Several steps of `optax.contrib.scale_by_muon`, whose momentum is scaled by a number, which msign does not see."""

    def loss_fn(params, x):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return kfe.losses.l2_loss(z).sum(-1).mean()

    generator = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(generator.normal(size=shape))}
    x = jnp.asarray(generator.normal(size=(8, shape[0])))
    layers = kfe.find_layers(loss_fn, params, x)
    ours = kfe.scale_by_spectral_kfac(
        layers, factors=kfe.factors.gradient(), exponents=(0, 0), nesterov=False, coefficients=polar.MUON
    )
    matrix = {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)}
    theirs = optax.contrib.scale_by_muon(beta=0.9, nesterov=False, eps=0, weight_dimension_numbers=matrix)
    states, updates = (ours.init(params), theirs.init(params)), [jax.jit(t.update) for t in (ours, theirs)]
    for _ in range(3):
        grads = {"kernel": jnp.asarray(generator.normal(size=shape))}
        (one, own), (two, other) = (
            update(grads, s, params) for update, s in zip(updates, states, strict=True)
        )
        states = own, other
        assert_close(one["kernel"], two["kernel"], 1e-9)


@pytest.fixture(scope="module")
def embedded():
    """An embedding, a norm with scale and shift, two dense layers."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.LayerNorm()(nn.Embed(5, 4)(tokens))
            return nn.Dense(3)(nn.tanh(nn.Dense(4, use_bias=False)(x)))

    tokens, labels = jnp.arange(12).reshape(4, 3) % 5, jnp.arange(12).reshape(4, 3) % 3
    params = jax.jit(Net().init)(jax.random.key(0), tokens)["params"]

    def loss_fn(params, tokens, labels):
        logits = Net().apply({"params": params}, tokens)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    layers = kfe.find_layers(loss_fn, params, tokens, labels)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)
    return params, layers, differentiate(params, tokens, labels, key=jax.random.key(1))


def test_embeddings_and_norms_go_to_the_rest(embedded):
    """With the taps of all layers; their update is that of `rest`, and no state is kept of them."""
    params, layers, (_, grads, taps) = embedded
    tx = kfe.spectral_kfac(1.0, layers, rest=optax.scale(2.0))
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(grads, state, params, taps=taps)
    for name in ("Embed_0", "LayerNorm_0"):
        jax.tree.map(lambda u, g: assert_close(u, -2.0 * np.asarray(g), 1e-6), updates[name], grads[name])
    assert set(state[0].method.mean) == {"Dense_0", "Dense_1"}
    # A step of the size "operator" and a rate of one has the root mean square √min(d_in, d_out) / d_in.
    for name, d_in, d_out in (("Dense_0", 5, 3), ("Dense_1", 4, 4)):
        matrix = np.asarray(layers[name].to_matrix(updates), np.float64)
        assert_close(np.sqrt(np.mean(matrix**2)), min(d_in, d_out) ** 0.5 / d_in, 1e-5)
    every = kfe.scale_by_spectral_kfac(layers, rest_kinds=()).init(params)
    assert set(every.method.mean) == set(layers)


def test_a_factor_of_zero_is_the_identity(x64):
    """A loss of weight zero has no curvature: no failure, no NaN, an update of zero."""

    def loss_fn(params, x, weight):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return weight * kfe.losses.l2_loss(z).mean()

    params, x = {"kernel": jnp.ones((3, 2))}, jnp.eye(3)
    layers = kfe.find_layers(loss_fn, params, x, 1.0)
    tx = kfe.scale_by_spectral_kfac(layers)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, 0.0)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(params), params, taps=taps)
    assert not np.any(updates["kernel"]) and int(kfe.info(state).failures) == 0
    # Its gradient may come from elsewhere: the metric of the outputs is then the identity.
    updates, _ = update({"kernel": jnp.ones((3, 2))}, tx.init(params), params, taps=taps)
    assert np.isfinite(updates["kernel"]).all() and np.all(updates["kernel"] > 0)


MISUSE = {
    "rank": ({"factors": kfe.factors.lanczos()}, ValueError, "must be one Kronecker product"),
    "no factors": ({"factors": "kfac"}, TypeError, "factors must be one of kfe.factors"),
    "exponents": ({"exponents": (0.5,)}, ValueError, "exponents must be two numbers"),
    "negative exponent": ({"exponents_back": (0.5, -1)}, ValueError, "exponents_back must be two numbers"),
    "momentum": ({"momentum": 1.5}, ValueError, "momentum is the weight of the past"),
    "momentum_of": ({"momentum_of": "update"}, ValueError, "momentum_of must be 'gradient' or 'whitened'"),
    "coefficients": ({"coefficients": (1.0, 2.0)}, ValueError, r"one triple \(a, b, c\) for each"),
    "damping": ({"damping": 0.0}, ValueError, "damping must be positive"),
    "period": (
        {"inverse_update_period": 0},
        ValueError,
        "inverse_update_period must be a positive whole number",
    ),
    "kind": ({"rest_kinds": ("dens",)}, ValueError, "no kind of layer 'dens'; the kinds are dense"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case, embedded):
    options, error, message = MISUSE[case]
    with pytest.raises(error, match=message):
        kfe.scale_by_spectral_kfac(embedded[1], **options)


def test_nothing_left(embedded):
    with pytest.raises(ValueError, match="no layer to precondition.*left out by kind"):
        kfe.scale_by_spectral_kfac(embedded[1], rest_kinds=("embedding", "norm", "dense"))


def test_damping_is_relative(embedded):
    params, layers, (_, grads, taps) = embedded
    tx = kfe.scale_by_spectral_kfac(layers)
    with pytest.raises(TypeError, match="relative to each layer's mean curvature"):
        tx.update(grads, tx.init(params), params, taps=taps, request=kfe.Request(0.1))
