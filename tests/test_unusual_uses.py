"""Layers in unusual places: what must be right there, or else go to `rest` with its reason or be refused with a sentence."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfe_optax as kfe
from kfe_optax._jax import retracing

from .dense import assert_close, relative_error
from .models import cross_entropy, parameter_shapes, randomized

pytestmark = pytest.mark.release

N, T, D = 4, 8, 3


def tokens():
    generator = np.random.default_rng(0)
    return jnp.asarray(generator.integers(0, 5, (N, T))), jnp.asarray(generator.integers(0, 5, (N, T)))


def of_module(module, *args):
    """The mean cross-entropy of a module's logits for the last argument's labels, its parameters and its reasons."""
    params = randomized(parameter_shapes(module, args[0]), jnp.float32)

    def loss_fn(params, x, labels):
        return cross_entropy(module.apply({"params": params}, x), labels)

    layers = kfe.find_layers(loss_fn, params, *args)
    reasons = {"/".join(map(str, p)): r for p, r in zip(layers.rest, layers.reasons, strict=True)}
    return loss_fn, params, layers, reasons


class Positions(nn.Module):
    """A character model whose positions are embedded, as (T, D) or (1, T, D)."""

    leading: bool

    @nn.compact
    def __call__(self, x):
        places = jnp.arange(x.shape[1])
        places = places[None] if self.leading else places
        x = nn.Embed(5, D, name="tokens")(x) + nn.Embed(T, D, name="positions")(places)
        return nn.Dense(5, name="head")(nn.tanh(x))


@pytest.mark.parametrize("leading", [True, False])
def test_an_input_that_is_the_same_for_all_examples(leading, x64):
    """Embedded positions have one example; over many samples their Fisher's diagonal is that of vmapped gradients."""
    x, labels = tokens()
    loss_fn, params, layers, _ = of_module(Positions(leading), x, labels)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    layers = kfe.find_layers(loss_fn, params, x, labels)
    _, _, taps = kfe.value_grad_and_taps(loss_fn, layers, num_samples=2000)(
        params, x, labels, key=jax.random.key(0)
    )
    found = taps["positions"].second_moment_in(None, None)

    def by_position(params, places):
        """The logits with an addend at every example's positions in place of the table."""
        z = params["tokens"]["embedding"][x] + places
        return jnp.tanh(z) @ params["head"]["kernel"] + params["head"]["bias"]

    @jax.jit
    def expected(params):
        places = jnp.broadcast_to(params["positions"]["embedding"], (N, T, D))
        jacobian = jax.jacobian(lambda p: by_position(params, p))(places)
        p = jax.nn.softmax(by_position(params, places))
        hessian = (jax.vmap(jax.vmap(jnp.diag))(p) - p[..., :, None] * p[..., None, :]) / (N * T)
        own = jnp.einsum("ntcntd->ntcd", jacobian)
        return jnp.einsum("ntcd,ntce,nted->td", own, hessian, own)

    # 2,000 samples: about 3 % of noise.
    assert relative_error(found, expected(params)) < 0.1
    with pytest.raises(ValueError, match="same for all examples"):
        kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x, labels)


def dense_twice(wrap):
    """A dense layer called under two masks, inside what `wrap` makes of the call."""

    def loss_fn(params, x):
        @wrap
        def call(params, x):
            return kfe.tag_dense(x, x @ params["kernel"], params)

        with kfe.row_mask(jnp.array([True, False, False, True])):
            y = call(params["a"], x)
        with kfe.row_mask(jnp.array([True, True, True, False])):
            z = call(params["b"], x)
        return kfe.losses.l2_loss(y).mean() + kfe.losses.l2_loss(z).mean()

    return loss_fn


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_function_that_was_traced_under_another_mask(wrap):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
    params = {name: {"kernel": jnp.ones((D, 2))} for name in "ab"}
    found = []
    for how in (wrap, lambda f: f):
        loss_fn = dense_twice(how)
        layers = kfe.find_layers(loss_fn, params, x)
        _, _, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, key=jax.random.key(0))
        found.append([taps[name].covariances()[0] for name in "ab"])
    assert_close(*found, 1e-6)
    assert relative_error(found[0][0], found[0][1]) > 0.1


def test_what_is_traced_under_fresh_is_traced_anew():
    """An inner jit says again what surrounds it (its tags, its mask), also when it was traced under another one."""
    seen, surrounding = [], []
    inner = jax.jit(lambda x: seen.append(surrounding[-1]) or x)
    for name in ("one", "other"):
        surrounding.append(name)
        with retracing.fresh():
            jax.eval_shape(inner, jnp.zeros(N))
    assert seen == ["one", "other"]


def test_a_mask_costs_nothing_where_nobody_listens():
    """An evaluation under a mask is compiled once."""
    traced = []

    @jax.jit
    def evaluate(x):
        traced.append(x)
        return x + 1

    for _ in range(3):
        with kfe.row_mask(jnp.ones(N, bool)):
            evaluate(jnp.zeros(N))
    assert len(traced) == 1


def test_statistics_of_a_convolution_never_hold_all_patches(monkeypatch):
    """Factors and per-example scale of a convolution whose patches take 38 MB, with pieces of 1 MB."""
    monkeypatch.setattr("kfe_optax._jax.chunks.BUDGET", 2**20)
    model, x = nn.Conv(8, (3, 3)), jnp.ones((64, 32, 32, 16))
    params = {"conv": jax.jit(model.init)(jax.random.key(0), x)["params"]}

    def loss_fn(params, x):
        return kfe.losses.l2_loss(model.apply({"params": params["conv"]}, x)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers)

    def statistics(params, x, basis):
        _, _, taps = differentiate(params, x, key=jax.random.key(0))
        return taps["conv"].covariances(), taps["conv"].second_moment_in(*basis)

    basis = tuple(jnp.eye(d) for d in layers["conv"].sides)
    program = jax.jit(statistics).lower(params, x, basis).compile()
    patches = 64 * 32 * 32 * 9 * 16 * 4
    # The batch is an eighth of its patches; outputs, their gradients and the convolution's workspace are of its size.
    assert program.memory_analysis().temp_size_in_bytes < 0.7 * patches


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_dead_examples_do_not_dilute(sharing):
    """A under a mask that kills the second half of the batch is that of the first half; a mask's numbers do not matter."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, T, D)), jnp.float32)
    params = {"kernel": jnp.ones((D, 2)), "bias": jnp.zeros(2)}

    def loss_fn(params, x):
        return kfe.losses.l2_loss(kfe.tag_dense(x, x @ params["kernel"] + params["bias"], params)).mean()

    mask = (jnp.arange(6) < 3)[:, None] & (jnp.arange(T) < jnp.array([8, 5, 2, 8, 8, 8])[:, None])
    factors = []
    for own, rows in ((mask, x), (mask[:3], x[:3]), (7.0 * mask, x)):
        layers = kfe.find_layers(loss_fn, params, rows).configure(sharing=sharing)
        differentiate = kfe.value_grad_and_taps(loss_fn, layers)
        _, _, taps = differentiate(params, rows, key=jax.random.key(0), row_mask=own)
        factors.append(taps["kernel"].covariances()[0])
    assert_close(factors[0], factors[1], 1e-6)
    assert_close(factors[0], factors[2], 1e-6)


def test_a_mask_under_a_vmap_over_examples_is_refused():
    params, x = {"kernel": jnp.ones((D, 2))}, jnp.ones((T, T, D))

    def loss_fn(params, x):
        y = jax.vmap(lambda x: kfe.tag_dense(x, x @ params["kernel"], params))(x)
        return kfe.losses.l2_loss(y).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    with pytest.raises(ValueError, match="under a vmap over the batch"):
        kfe.value_grad_and_taps(loss_fn, layers)(
            params, x, key=jax.random.key(0), row_mask=jnp.ones((T, T), bool)
        )


def test_a_table_that_is_tied_by_hand():
    """A product with the transposed table is what `attend` is; a prior that reads the parameters is no use."""
    x, labels = tokens()

    class Tied(nn.Module):
        by_hand: bool

        @nn.compact
        def __call__(self, x):
            table = nn.Embed(5, D, name="table")
            h = nn.Dense(D, name="middle")(table(x))
            return h @ table.embedding.T if self.by_hand else table.attend(h)

    found = []
    for by_hand in (True, False):
        loss_fn, params, layers, _ = of_module(Tied(by_hand), x, labels)

        def with_prior(params, x, labels, loss_fn=loss_fn):
            return loss_fn(params, x, labels) + 1e-3 * sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))

        assert kfe.find_layers(with_prior, params, x, labels) == layers
        tx = kfe.scale_by_kfac(layers, 0.1)
        _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x, labels)
        found.append((layers, tx.update(grads, tx.init(params), params, taps=taps)[0]))
    assert found[0][0] == found[1][0]
    assert list(found[0][0]) == ["table", "middle"]
    assert_close(found[0][1], found[1][1], 1e-6)


def test_a_parameter_that_is_also_used_in_another_way():
    x, labels = tokens()

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(D, name="layer")
            h = layer(nn.Embed(5, D)(x))
            return h @ jnp.abs(layer.variables["params"]["kernel"])

    *_, layers, reasons = of_module(Twice(), x, labels)
    assert "layer" not in layers
    assert reasons["layer/kernel"].startswith(
        "also used outside its layer, in another way (dot_general at test_"
    )


def test_a_prior_leaves_the_layers_as_they_are():
    model, x = nn.Sequential([nn.Conv(2, (3,)), nn.LayerNorm(), nn.Dense(5)]), jnp.ones((N, T, D))
    loss_fn, params, layers, _ = of_module(model, x, tokens()[1])

    def with_prior(params, x, labels):
        return loss_fn(params, x, labels) + sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))

    assert kfe.find_layers(with_prior, params, x, tokens()[1]) == layers


def test_two_modules_with_one_parameter():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
            self.second.kernel = self.first.kernel
            self.last = nnx.Linear(D, 5, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.second(nnx.tanh(self.first(x)))))

    layers = kfe.find_layers(
        lambda model, x, y: cross_entropy(model(x), y),
        Shared(nnx.Rngs(0)),
        jnp.ones((N, D)),
        jnp.zeros(N, int),
    )
    assert list(layers) == ["last"]
    assert "used with different parameters beside it" in layers.reasons


def test_axes_that_are_stacked_at_different_places():
    """Counted from the back, an axis is another one for the kernel and for the bias."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(D, name="dense")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(Body, variable_axes={"params": -2}, split_rngs={"params": True}, length=3)
            return nn.Dense(5, name="head")(body(name="body")(x, None)[0])

    _, _, layers, reasons = of_module(Model(), jnp.ones((N, D)), jnp.zeros(N, int))
    assert list(layers) == ["head"]
    assert reasons["body/dense/kernel"] == "stacked along other axes than the layer's other parameters"


def test_a_norm_on_batches_of_two_sizes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm, dense = nn.LayerNorm(name="norm"), nn.Dense(5, name="dense")
            return jnp.concatenate([dense(norm(x)), dense(norm(x[:2]))])[:N]

    _, _, layers, reasons = of_module(Model(), jnp.ones((N, D)), jnp.zeros(N, int))
    assert set(layers) == {"norm", "dense"}
    assert not reasons
    assert not layers["norm"].per_example, "a row a position, as in a dense layer"


def test_arguments_by_name_and_partitioned_parameters():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(D, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, None)))(inputs=x)
            x = nn.BatchNorm(name="norm")(use_running_average=False, x=x)
            return nn.Einsum((D, 5), name="head")(einsum_str="ni,io->no", inputs=x)

    model, x = Model(), jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss_fn(params, x, labels):
        rest = {name: value for name, value in variables.items() if name != "params"}
        logits, _ = model.apply({"params": params, **rest}, x, mutable=["batch_stats"])
        return cross_entropy(logits, labels)

    layers = kfe.find_layers(loss_fn, variables["params"], x, jnp.zeros(N, int))
    assert [layer.kind.name for layer in layers.values()] == ["dense", "norm", "dense"]
    params, labels = variables["params"], jnp.zeros(N, int)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(0))
    tx = kfe.scale_by_kfac(layers, damping=0.1)
    updates = jax.jit(lambda v, taps: tx.update(v, tx.init(params), params, taps=taps)[0])(grads, taps)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_sua_has_no_zeros_in_its_patches():
    model = nn.Sequential([nn.ConvTranspose(5, (3,), strides=(2,), padding="VALID"), lambda x: x.mean(1)])
    _, _, layers, _ = of_module(model, jnp.ones((N, T, D)), jnp.zeros(N, int))
    with pytest.raises(ValueError, match="zeros in its patches"):
        layers.configure(approximation="sua")


def test_a_new_token_between_refreshes_keeps_its_own_scale():
    """A diagonal side has no arbitrary basis: directions without curvature are not pooled there."""
    from kfe_optax._linalg.kronecker import Eigenbasis, pool_null_directions

    scale, pool = np.arange(12, dtype=np.float32).reshape(4, 3), jax.jit(pool_null_directions)
    values = jnp.array([1.0, 0.0, 0.0, 2.0])
    identity = Eigenbasis(jnp.ones(3), jnp.eye(3))
    np.testing.assert_array_equal(pool(scale, (Eigenbasis(values, None), identity), 1e-5), scale)
    pooled = pool(scale, (Eigenbasis(values, jnp.eye(4)), identity), 1e-5)
    np.testing.assert_array_equal(pooled[1], pooled[2])


def test_a_wide_layer_in_a_loop_keeps_diagonals(monkeypatch):
    """Of a large side of a layer that is used more than once the sums hold the diagonal alone."""
    monkeypatch.setattr("kfe_optax._statistics.riders.LARGEST_SIDE", 4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
    params = {"kernel": jnp.ones((D, 6))}

    def loss_fn(params, x):
        y = kfe.tag_dense(x, x @ params["kernel"], params)
        z = kfe.tag_dense(2 * x, 2 * x @ params["kernel"], params)
        return kfe.losses.l2_loss(y + z).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="the diagonal alone"):
        taps["kernel"].covariances()
    tx = kfe.scale_by_kfac(layers, damping=0.1, max_dim=4)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
    assert state.method.factors.output["kernel"].shape == (6,)
    assert np.isfinite(updates["kernel"]).all()
