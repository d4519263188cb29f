"""F is the Gauss–Newton matrix of the scalar loss as written, for every way of writing it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe

from . import problems
from .dense import assert_close, gauss_newton, relative_error
from .methods import quick

N, D, C = 4, 2, 3
cross_entropy = kfe.losses.softmax_cross_entropy_with_integer_labels
soft_cross_entropy = kfe.losses.softmax_cross_entropy


def arrays():
    generator = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape))
    return {
        "x": normal(N, D),
        "kernel": normal(D, C),
        "labels": jnp.asarray(generator.integers(0, C, N)),
        "targets": normal(N, C),
        "bits": jnp.asarray(generator.integers(0, 2, (N, C)), jnp.float64),
        "soft": jnp.asarray(generator.uniform(0.1, 0.9, (N, C))),
        "mask": jnp.array([1.0, 0.0, 1.0, 1.0]),
        "weights": jnp.asarray(generator.uniform(0.5, 2, N)),
        "classes": jnp.asarray([[1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1]], bool),
    }


def registered(z, b):
    """A user's own softmax loss over weighted examples."""
    z = kfe.register_output(z, kfe.Categorical(), weights=b["weights"])
    return -(b["weights"] * jnp.take_along_axis(jax.nn.log_softmax(z), b["labels"][:, None], 1)[:, 0]).sum()


def registered_mean(z, b):
    z = kfe.register_output(z, kfe.Gaussian(variance=0.25))
    return 2 * ((z - b["targets"]) ** 2).sum(-1).mean()


LOSSES = {
    "mean": lambda z, b: cross_entropy(z, b["labels"]).mean(),
    "sum": lambda z, b: cross_entropy(z, b["labels"]).sum(),
    "masked mean": lambda z, b: (cross_entropy(z, b["labels"]) * b["mask"]).sum() / b["mask"].sum(),
    "weighted": lambda z, b: (cross_entropy(z, b["labels"]) * b["weights"]).mean(),
    "mean over pixels": lambda z, b: kfe.losses.sigmoid_binary_cross_entropy(z, b["bits"]).mean(),
    "sum over pixels": lambda z, b: kfe.losses.sigmoid_binary_cross_entropy(z, b["bits"]).sum(-1).mean(),
    "soft bits": lambda z, b: kfe.losses.sigmoid_binary_cross_entropy(z, b["soft"]).sum(-1).mean(),
    "counts": lambda z, b: (
        kfe.losses.poisson_nll_loss(z, jnp.round(9 * b["soft"])) * b["mask"][:, None]
    ).mean(),
    "squared error": lambda z, b: kfe.losses.squared_error(z, b["targets"]).mean(),
    "l2": lambda z, b: kfe.losses.l2_loss(z, b["targets"]).sum(-1).mean(),
    "l2 without targets": lambda z, b: kfe.losses.l2_loss(z).mean(),
    "two heads": lambda z, b: (
        kfe.losses.squared_error(z[:, :1], b["targets"][:, :1]).mean()
        + 0.3 * cross_entropy(z[:, 1:], b["labels"] % 2).mean()
    ),
    "two losses on one head": lambda z, b: (
        cross_entropy(z, b["labels"]).mean() + kfe.losses.l2_loss(z, b["targets"]).mean()
    ),
    "soft labels": lambda z, b: soft_cross_entropy(z, b["soft"]).mean(),
    "smoothed labels": lambda z, b: soft_cross_entropy(
        z, optax.losses.smooth_labels(jax.nn.one_hot(b["labels"], C), 0.1)
    ).mean(),
    "class axis not last": lambda z, b: cross_entropy(z.T, b["labels"], axis=0).mean(),
    "soft, class axis not last": lambda z, b: soft_cross_entropy(z.T, b["soft"].T, axis=0).mean(),
    "where": lambda z, b: cross_entropy(z, jnp.ones(N, int), where=b["classes"]).mean(),
    "soft where": lambda z, b: soft_cross_entropy(z, b["soft"], where=b["classes"]).mean(),
    "register_output": registered,
    "register_output, default weights": registered_mean,
    "vmapped": lambda z, b: jax.vmap(cross_entropy)(z, b["labels"]).mean(),
    "vmapped positions": lambda z, b: jax.vmap(cross_entropy)(
        jnp.stack([z, z**2], 1), jnp.stack([b["labels"], (b["labels"] + 1) % C], 1)
    ).mean(),
    "positions": lambda z, b: cross_entropy(
        jnp.stack([z, z**2], 1), jnp.stack([b["labels"], (b["labels"] + 1) % C], 1)
    ).mean(),
    "scaled and shifted": lambda z, b: (2.0 * b["mask"].sum() * cross_entropy(z, b["labels"])).mean() + 1,
}


def outputs_of(name, z):
    """The outputs that the loss is convex in: what H is the Hessian with respect to."""
    return jnp.stack([z, z**2], 1) if "positions" in name else z


def loss_of_outputs(name, z, b):
    if "positions" in name:
        return cross_entropy(z, jnp.stack([b["labels"], (b["labels"] + 1) % C], 1)).mean()
    return LOSSES[name](z, b)


def expected_fisher(name, b):
    def outputs(flat):
        return outputs_of(name, b["x"] @ flat.reshape(D, C))

    return gauss_newton(outputs, lambda z: loss_of_outputs(name, z, b), b["kernel"].ravel())


def loss_of(name):
    def loss_fn(params, b):
        return LOSSES[name](kfe.tag_dense(b["x"], b["x"] @ params["kernel"], params), b)

    return loss_fn


def fisher_from_rows(a, g):
    """(1/N) Σ over columns and examples of vec(M) vec(M)ᵀ."""
    gradients = np.einsum("nta,cntb->cnab", a, g).reshape(g.shape[0], N, -1)
    return np.einsum("cni,cnj->ij", gradients, gradients) / N


def exact_taps(name, b):
    loss_fn = loss_of(name)
    params = {"kernel": b["kernel"]}
    layers = kfe.find_layers(loss_fn, params, b)
    _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, b)
    return layers, taps


@jax.jit
def read(taps):
    """Rows and second moment of the one layer of these losses."""
    tap = taps["kernel"]
    return taps.layers["kernel"].rows(tap), tap.second_moment_in(None, None)


# Each says something that the others do not; the rest are their combinations.
DEFAULT = [
    "masked mean",
    "weighted",
    "mean over pixels",
    "soft bits",
    "smoothed labels",
    "counts",
    "two heads",
    "soft, class axis not last",
    "soft where",
    "vmapped positions",
]
SLOW = [
    "sum",
    "two losses on one head",
    "register_output",
    "register_output, default weights",
    "vmapped",
    "scaled and shifted",
]


@pytest.mark.parametrize("name", quick(*DEFAULT, slow=SLOW, of=LOSSES))
def test_exact_is_gauss_newton(name, x64):
    """Rows, covariances and the second moment of fisher="exact" against JᵀHJ of the loss as written."""
    b = arrays()
    rows, moment = read(exact_taps(name, b)[1])
    expected = jax.jit(lambda b: expected_fisher(name, b))(b)
    assert_close(fisher_from_rows(*rows), expected, 1e-10)
    assert_close(moment, np.diag(expected).reshape(D, C), 1e-10)


@pytest.mark.parametrize(
    "name",
    quick(
        "two heads",
        slow=["vmapped"],
        of=["mean", "mean over pixels", "squared error", "two heads", "soft where", "vmapped"],
    ),
)
def test_sampled_converges_to_exact(name, x64):
    """The mean over S samples is within five standard errors, estimated from the draws, of the exact Fisher."""
    b = arrays()
    loss_fn, params, samples = loss_of(name), {"kernel": b["kernel"]}, 4000
    layers = kfe.find_layers(loss_fn, params, b)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, num_samples=samples)
    _, _, taps = differentiate(params, b, key=jax.random.key(0))
    a, g = map(np.asarray, layers["kernel"].rows(taps["kernel"]))
    assert g.shape[0] == samples
    rows = np.einsum("nta,cntb->cnab", a, g).reshape(samples, N, -1)
    draws = np.einsum("cni,cnj->cij", rows, rows) / N
    expected = np.asarray(expected_fisher(name, b))
    error = np.abs(draws.mean(0) - expected)
    standard = draws.std(0) / np.sqrt(samples)
    assert (error <= 5 * standard + 1e-12).all(), error / standard
    assert standard.max() < 0.1 * np.abs(expected).max()  # the bound says something
    assert_close(taps["kernel"].covariances()[1], np.einsum("cntb,cntd->bd", g, g) / N / samples, 1e-10)


def test_samples_differ_between_examples_keys_and_heads(x64):
    """Draws are independent: other examples, samples, keys and heads get other targets; one key repeats."""
    b = arrays()
    b["x"], b["targets"] = np.ones((N, D)), np.zeros((N, C))

    def loss_fn(params, b):
        z = kfe.tag_dense(b["x"], b["x"] @ params["kernel"], params)
        return kfe.losses.l2_loss(z, b["targets"]).mean() + kfe.losses.l2_loss(z, b["targets"]).mean()

    def one_head(params, b):
        z = kfe.tag_dense(b["x"], b["x"] @ params["kernel"], params)
        return 2 * kfe.losses.l2_loss(z, b["targets"]).mean()

    def draw(loss_fn, key):
        params = {"kernel": b["kernel"]}
        layers = kfe.find_layers(loss_fn, params, b)
        taps = kfe.value_grad_and_taps(loss_fn, layers, num_samples=3)(params, b, key=jax.random.key(key))[2]
        return np.asarray(layers["kernel"].rows(taps["kernel"])[1]).reshape(3, N, C)

    first = draw(one_head, 0)
    assert len(np.unique(first.round(12))) == first.size
    np.testing.assert_array_equal(first, draw(one_head, 0))
    assert not np.intersect1d(first.round(12), draw(one_head, 1).round(12)).size
    # Were both heads given the same draw, their sum would be √2 times that of a single head of twice the weight.
    both = draw(loss_fn, 0)
    assert relative_error(np.abs(both), np.abs(first) * np.sqrt(2)) > 0.1


def test_samples_differ_between_calls_of_a_function(x64):
    """A function that is traced once registers one loss; where it is called twice, each call draws its own targets."""
    b = arrays()
    head = jax.jit(lambda z, targets: kfe.losses.l2_loss(z, targets).mean())

    def loss_fn(params, b):
        z = kfe.tag_dense(b["x"], b["x"] @ params["kernel"], params)
        return head(z, b["targets"]) + head(-z, b["targets"])

    params = {"kernel": b["kernel"]}
    layers = kfe.find_layers(loss_fn, params, b)
    taps = kfe.value_grad_and_taps(loss_fn, layers)(params, b, key=jax.random.key(0))[2]
    # The gradients at z and −z of the same draw would cancel.
    assert layers["kernel"].rows(taps["kernel"])[1].all()


def test_vmapped_samples_differ(x64):
    """Inside a per-example vmap one seed serves all examples; their targets differ all the same."""
    b = arrays()
    loss_fn = lambda params, b: jax.vmap(kfe.losses.l2_loss)(
        kfe.tag_dense(b["x"], b["x"] @ params["kernel"], params), b["targets"]
    ).mean()
    params = {"kernel": b["kernel"]}
    layers = kfe.find_layers(loss_fn, params, b)
    taps = kfe.value_grad_and_taps(loss_fn, layers)(params, b, key=jax.random.key(0))[2]
    g = np.asarray(layers["kernel"].rows(taps["kernel"])[1])
    assert len(np.unique(g.round(12))) == g.size


def test_empirical_needs_no_registered_loss(x64):
    """fisher="empirical" is the mean outer product of the per-example gradients of any loss."""
    b = arrays()

    def loss_fn(params, x, targets):
        z = kfe.tag_dense(x, x @ params["kernel"], params)
        return jnp.abs(z - targets).sum(-1).mean()

    params = {"kernel": b["kernel"]}
    layers = kfe.find_layers(loss_fn, params, b["x"], b["targets"])
    taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, b["x"], b["targets"])[2]
    examples = jax.vmap(jax.grad(lambda p, x, y: loss_fn(p, x[None], y[None])), (None, 0, 0))(
        params, b["x"], b["targets"]
    )["kernel"]
    assert_close(taps["kernel"].example_gradients(), examples, 1e-12)
    a, g = taps["kernel"].covariances()
    assert_close(a, b["x"].T @ b["x"] / N, 1e-12)
    signs = np.sign(b["x"] @ b["kernel"] - b["targets"])
    assert_close(g, signs.T @ signs / N, 1e-12)


def test_shared_layers_against_dense_sums(x64):
    """A layer called twice: A is the mean over all uses, G the sum over the uses of an example, M their sum."""
    b = arrays()
    square = jnp.asarray(np.random.default_rng(5).normal(size=(C, C)))

    def loss_fn(params, x, y):
        hidden = jnp.tanh(kfe.tag_dense(x, x @ params["w"], params, kernel="w"))
        return (
            kfe.losses.l2_loss(kfe.tag_dense(hidden, hidden @ params["w"], params, kernel="w"), y)
            .sum(-1)
            .mean()
        )

    x, params = b["targets"], {"w": square}
    layers = kfe.find_layers(loss_fn, params, x, b["soft"])
    taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, b["soft"])[2]
    (layer,) = layers.values()
    tap = taps[layer.name]
    hidden = jnp.tanh(x @ square)
    a, g = tap.covariances()
    assert_close(a, (x.T @ x + hidden.T @ hidden) / (2 * N), 1e-10)
    # Outputs of the second use are z itself (J = I); those of the first reach z through diag(1 − h²) W.
    through = jax.vmap(lambda h: jnp.diag(1 - h**2) @ square)(hidden)
    assert_close(g, jnp.eye(C) + jnp.einsum("nij,nkj->ik", through, through) / N, 1e-10)
    fisher = gauss_newton(
        lambda w: jnp.tanh(x @ w.reshape(C, C)) @ w.reshape(C, C),
        lambda z: 0.5 * ((z - b["soft"]) ** 2).sum(-1).mean(),
        square.ravel(),
    )
    assert_close(tap.second_moment_in(None, None).ravel(), np.diag(fisher), 1e-10)


def test_running_scale_weight(x64):
    """gradient_weight is Σc/Σc² over the loss's elements: N for a mean, 1 for a sum, the effective size of a mask."""
    b = arrays()
    for name, expected in {
        "mean": N,
        "sum": 1,
        "masked mean": b["mask"].sum(),
        "mean over pixels": N * C,
        "sum over pixels": N,
        "weighted": N * b["weights"].sum() / (b["weights"] ** 2).sum(),
    }.items():
        assert_close(exact_taps(name, b)[1].gradient_weight, jnp.asarray(expected, jnp.float64), 1e-12)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_what_is_computed_again_is_the_same(fisher, x64):
    """With the residuals kept, or the forward pass run again, outside of jit and inside; then no activation waits for it."""
    problem = problems.make("linen")
    layers, factors = problem.layers(), kfe.factors.kfac()
    mask, passes = jnp.arange(problems.EXAMPLES) > 0, []

    def loss_fn(*given):
        passes.append(1)
        return problem.loss_fn(*given)

    def run(recompute):
        differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher, recompute=recompute)
        return differentiate(problem.params, *problem.args, key=jax.random.key(3), row_mask=mask)

    again, kept = run(None), run(False)
    assert_close(again[:2], kept[:2], 1e-12)
    expected = kfe.factors.estimate(factors, kept[2])
    assert_close(kfe.factors.estimate(factors, again[2]), expected, 1e-12)
    passes.clear()
    assert_close(jax.jit(lambda taps: kfe.factors.estimate(factors, taps))(again[2]), expected, 1e-12)
    assert len(passes) == 1
    hidden = (problems.EXAMPLES, problem.weights[0].shape[1])
    shapes = [{leaf.shape for leaf in jax.tree.leaves(taps)} for *_, taps in (again, kept)]
    assert hidden not in shapes[0] and hidden in shapes[1]
