"""Mis-use is caught while tracing, each with a sentence that says what to do."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import kfe_optax as kfe

from . import problems
from .models import batch, cross_entropy, randomized
from .zoo import CASES


@pytest.fixture(scope="module")
def step():
    """(problem, layers, gradients, taps) of a small Linen model."""
    problem = problems.make("linen")
    layers = problem.layers()
    _, grads, taps = kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="exact")(
        problem.params, *problem.args
    )
    return problem, layers, grads, taps


TRANSFORMS = {
    "kfac": lambda layers: kfe.scale_by_kfac(layers, 0.1),
    "ekfac": lambda layers: kfe.scale_by_ekfac(layers, 0.1),
    "alias": lambda layers: kfe.ekfac(0.1, layers),
}


def call(tx, params, grads, **extra):
    """One update, traced."""
    return jax.eval_shape(lambda g: tx.update(g, tx.init(params), params, **extra), grads)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_update_without_taps(name, step):
    problem, layers, grads, _ = step
    with pytest.raises(ValueError, match=r"needs the taps of the step: call tx\.update\(.*taps=taps\)"):
        call(TRANSFORMS[name](layers), problem.params, grads)


def test_taps_of_a_wrong_type(step):
    problem, layers, grads, _ = step
    with pytest.raises(TypeError, match="taps must be what kfe.value_grad_and_taps returns, not a dict"):
        call(kfe.scale_by_kfac(layers, 0.1), problem.params, grads, taps={})


@pytest.mark.parametrize("name", TRANSFORMS)
def test_taps_from_other_layers(name, step):
    problem, layers, grads, _ = step
    other = problems.make("linen", sizes=(3, 5, 2))
    taps = kfe.value_grad_and_taps(other.loss_fn, other.layers(), fisher="exact")(other.params, *other.args)[
        2
    ]
    with pytest.raises(ValueError, match=r"taps are not those of the layers.*'dense_0' was found with"):
        call(TRANSFORMS[name](layers), problem.params, grads, taps=taps)


def test_layers_of_a_wrong_type(step):
    problem = step[0]
    with pytest.raises(TypeError, match="must be what kfe.find_layers"):
        kfe.scale_by_kfac(problem.params, 0.1)
    with pytest.raises(TypeError, match=r"layers must be what kfe.find_layers\(.*\) returns, not a dict"):
        kfe.value_grad_and_taps(problem.loss_fn, problem.params)


def test_unknown_layer(step):
    _, layers, _, taps = step
    with pytest.raises(KeyError, match="no layer 'dense_9'; the layers are dense_0, dense_1"):
        layers["dense_9"]
    with pytest.raises(KeyError, match="no tap 'dense_9'; the layers are dense_0, dense_1"):
        taps["dense_9"]
    with pytest.raises(ValueError, match=r"'dense_0' was given the tap of 'dense_1'; pass taps\['dense_0'\]"):
        layers["dense_0"].rows(taps["dense_1"])


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_loss_that_registers_nothing(fisher):
    problem = problems.make("plain")

    def loss_fn(params, x, y):
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            problems.plain_forward(params, x), y
        ).mean()

    layers = kfe.find_layers(loss_fn, problem.params, *problem.args)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher=fisher)
    with pytest.raises(
        ValueError, match=rf"fisher='{fisher}' needs to know.*kfe\.losses.*fisher='empirical'"
    ):
        differentiate(problem.params, *problem.args, key=jax.random.key(0))


def test_key_missing(step):
    problem, layers, *_ = step
    with pytest.raises(
        ValueError, match="fisher='sampled' draws targets from the model and needs a random key"
    ):
        kfe.value_grad_and_taps(problem.loss_fn, layers)(problem.params, *problem.args)


def test_unknown_options(step):
    problem, layers, *_ = step
    with pytest.raises(ValueError, match="fisher must be 'sampled', 'empirical' or 'exact', not 'true'"):
        kfe.value_grad_and_taps(problem.loss_fn, layers, fisher="true")
    for options in ({"num_samples": 0}, {"num_samples": 2, "fisher": "exact"}):
        with pytest.raises(ValueError, match="num_samples counts the draws"):
            kfe.value_grad_and_taps(problem.loss_fn, layers, **options)
    with pytest.raises(
        ValueError, match="damping_type must be 'factored', 'sqrt', 'linear' or 'exact', not 'plain'"
    ):
        kfe.scale_by_kfac(layers, 0.1, damping_type="plain")
    with pytest.raises(ValueError, match="scale must be 'batch' or 'running', not 'none'"):
        kfe.scale_by_ekfac(layers, 0.1, scale="none")
    with pytest.raises(ValueError, match="on_refresh must be 'carry' or 'restart'"):
        kfe.scale_by_ekfac(layers, 0.1, on_refresh="keep")
    for period in (0, -1, 1.5):
        with pytest.raises(ValueError, match="factor_update_period must be a positive whole number of steps"):
            kfe.scale_by_kfac(layers, 0.1, factor_update_period=period)
    with pytest.raises(ValueError, match="positive variance"):
        kfe.Gaussian(0.0)


PRECONDITIONERS = {
    **{name: method.scale_by for name, method in kfe.METHODS.items()},
    "kronecker": kfe.scale_by_kronecker,
}


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_damping_is_positive(name, step):
    """Numbers must be; arrays, which `optax.inject_hyperparams` makes of numbers, and schedules are taken as they are."""
    layers = step[1]
    for number in (0.0, 0, -1.0):
        with pytest.raises(ValueError, match=f"^damping must be positive, not {number!r}"):
            PRECONDITIONERS[name](layers, number)
    for taken in (1e-30, jnp.zeros(()), optax.linear_schedule(1.0, 0.0, 10)):
        assert callable(PRECONDITIONERS[name](layers, taken).update)


@pytest.mark.parametrize("name", kfe.factors.FACTORS)
def test_decay_is_a_weight(name):
    make = kfe.factors.FACTORS[name]
    for number in (1.5, -0.1, 2, float("nan")):
        with pytest.raises(
            ValueError, match=rf"^decay is the weight.*must lie in \[0, 1\], not be {number!r};"
        ):
            make(decay=number)
    for taken in (0, 1.0, jnp.asarray(1.5), optax.linear_schedule(0.5, 1.0, 10)):
        assert make(decay=taken).decay is taken


@pytest.mark.parametrize("name", kfe.METHODS)
def test_decay_of_a_preconditioner(name, step):
    layers = step[1]
    with pytest.raises(ValueError, match="^decay is the weight"):
        kfe.METHODS[name].scale_by(layers, 0.1, decay=1.5)
    if "ekfac" in name:
        with pytest.raises(ValueError, match="^scale_decay is the weight"):
            kfe.METHODS[name].scale_by(layers, 0.1, scale_decay=-0.5)


def test_a_loss_is_given_its_parameters_as_they_are():
    """It compares the tree with one of its own; `kfe.plain`, which once was the way to do so, is the identity."""
    problem = problems.make("linen")

    def loss_fn(params, x, y):
        assert jax.tree.structure(params) == jax.tree.structure(problem.params)
        together = jax.tree.map(lambda p, q: (p * q).sum(), params, problem.params)
        return problem.loss_fn(params, x, y) + sum(jax.tree.leaves(together))

    assert list(kfe.find_layers(loss_fn, problem.params, *problem.args)) == ["dense_0", "dense_1"]
    with pytest.warns(DeprecationWarning, match="no longer needed"):
        assert kfe.plain(problem.params) is problem.params


def test_own_errors_come_through():
    """A loss that is broken by itself says so."""
    problem = problems.make("linen")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        kfe.find_layers(problem.loss_fn, problem.params, problem.args[0])


def test_parameters_that_changed(step):
    problem, layers, *_ = step
    wider = problems.make("linen", sizes=(3, 5, 2))
    plain, changed = problems.make("plain"), problems.make("plain", sizes=(3, 5, 2))
    with pytest.raises(ValueError, match=r"not those that find_layers saw: layer '0' was found with.*again"):
        kfe.value_grad_and_taps(plain.loss_fn, plain.layers(), fisher="exact")(changed.params, *plain.args)
    tx = kfe.scale_by_kfac(layers, 0.1)
    with pytest.raises(
        ValueError, match=r"matrix of shape \(4, 4\), but the tree holds one of shape \(4, 5\)"
    ):
        tx.init(wider.params)
    with pytest.raises(ValueError, match="holds extra, which find_layers did not see"):
        tx.init({**problem.params, "extra": jnp.ones(2)})
    with pytest.raises(ValueError, match="None of the layers' parameters is in the tree|did not see"):
        tx.init({"params": problem.params})
    with pytest.raises(ValueError, match="None of the layers' parameters is in the tree"):
        tx.init({})


def test_partly_masked_layer(step):
    problem, layers, grads, taps = step
    mask = {"dense_0": {"kernel": True, "bias": False}, "dense_1": {"kernel": True, "bias": True}}
    tx = optax.masked(kfe.scale_by_kfac(layers, 0.1), mask)
    with pytest.raises(ValueError, match=r"'dense_0' is only partly there: dense_0/bias is masked out"):
        call(tx, problem.params, grads, taps=taps)


def test_matrix_of_another_shape(step):
    _, layers, grads, _ = step
    with pytest.raises(ValueError, match=r"'dense_0' has matrices of shape \(4, 4\), not \(2, 2\)"):
        layers["dense_0"].from_matrix(jnp.ones((2, 2)))
    with pytest.raises(
        ValueError, match="'dense_0' needs dense_0/kernel, dense_0/bias, which the tree does not hold"
    ):
        layers["dense_0"].to_matrix({"dense_1": grads["dense_1"]})


def test_loss_that_is_no_scalar(step):
    problem, layers, *_ = step

    def loss_fn(params, x, y):
        return jnp.stack([problem.loss_fn(params, x, y)] * 2)

    with pytest.raises(ValueError, match=r"must be a real scalar, but has shape \(2,\)"):
        kfe.find_layers(loss_fn, problem.params, *problem.args)
    with pytest.raises(ValueError, match=r"must be a real scalar, but has shape \(2,\)"):
        kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(problem.params, *problem.args)


def test_exact_inside_a_loop():
    loss_fn, params, args = CASES["chunks"].make(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, *args)
    with pytest.raises(ValueError, match=r"fisher='exact' cannot enumerate.*inside a loop"):
        kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, *args)


def test_rows_of_a_shared_layer():
    loss_fn, params, args = CASES["called_twice"].make(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, *args)
    taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, *args)[2]
    with pytest.raises(ValueError, match=r"'middle' uses its parameters more than once.*tap\.covariances"):
        layers["middle"].rows(taps["middle"])


def test_tag_dense_arguments():
    x, params = jnp.ones((4, 3)), {"kernel": jnp.ones((3, 2))}
    with pytest.raises(TypeError, match="takes the mapping that holds the layer's parameters, not a"):
        kfe.tag_dense(x, x @ params["kernel"], params["kernel"])
    with pytest.raises(ValueError, match=r"found no 'w' among \['kernel'\]; name the kernel"):
        kfe.tag_dense(x, x @ params["kernel"], params, kernel="w")
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\), kernel \(3, 2\) and y \(4, 3\)"):
        kfe.tag_dense(x, x, params)
    with pytest.raises(ValueError, match=r"no prefix of the events' shape \(4,\)"):
        kfe.register_output(x, kfe.Categorical(), weights=jnp.ones(3))


def test_reasons_for_what_is_no_layer():
    """Nothing is dropped in silence: each parameter outside every layer is listed with its reason."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.PReLU()(nn.Dense(4)(x))
            x = nn.Dense(4, name="changed")(x)
            scale = self.param("scale", nn.initializers.ones, (4,))
            frozen = nn.Dense(4, name="frozen")
            return nn.Dense(3, name="last")(x * jnp.sin(scale)) + 0 * jax.lax.stop_gradient(frozen(x)[:, :3])

    model, (x, labels) = Model(), batch(jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    params = randomized({**params, "unused": {"kernel": jnp.ones((3, 3))}}, jnp.float32)

    def loss_fn(params, x, labels):
        changed = jax.tree.map(lambda v: v / 2, params["changed"])
        return cross_entropy(model.apply({"params": {**params, "changed": changed}}, x), labels)

    layers = kfe.find_layers(loss_fn, params, x, labels)
    reasons = {
        "/".join(map(str, path)): reason for path, reason in zip(layers.rest, layers.reasons, strict=True)
    }
    assert reasons["PReLU_0/negative_slope"].startswith("no supported layer reads it (mul at test_misuse.py:")
    assert reasons["unused/kernel"] == "the loss does not use it"
    assert reasons["scale"].startswith("no supported layer reads it (sin, then mul at test_misuse.py:")
    # Of a kernel, a factor moves to the layer's input.
    assert reasons["changed/bias"] == "changed before the layer uses it (times 0.5)"
    table = str(layers)
    assert all(reason in table for reason in reasons.values())
    assert "Dense_0" in layers and "last" in layers


@pytest.mark.parametrize("name", ["scale_by_kfac", "scale_by_ekfac"])
def test_traced_max_dim(name, step):
    problem, layers, *_ = step

    def init(max_dim):
        return getattr(kfe, name)(layers, 0.1, max_dim=max_dim).init(problem.params)

    with pytest.raises(ValueError, match=r"max_dim fixes the shapes.*static_args=\('max_dim',\)"):
        jax.jit(init)(8)


def test_a_key_of_the_losss_own():
    """`key=` is the Fisher's: a loss that has one too gets it by position, and not silently none."""
    params, x, key = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), jax.random.key(0)

    def loss_fn(params, x, key=None):
        z = x @ params["w"]
        z = z if key is None else z + jax.random.normal(key, z.shape)
        return kfe.losses.l2_loss(z).mean()

    layers = kfe.find_layers(loss_fn, params, x, key=key)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)
    with pytest.raises(ValueError, match="The loss has a parameter 'key' of its own and is not given it"):
        differentiate(params, x, key=key)
    for own in (key, None):
        assert float(differentiate(params, x, own, key=key)[0]) == pytest.approx(
            float(loss_fn(params, x, own))
        )
