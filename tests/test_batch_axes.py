"""A leading axis is the batch where the data show it; where they do not, sums over rows are right, and examples not known."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from .dense import assert_close
from .models import randomized

G, V, D, H, C = 3, 12, 4, 5, 2  # graphs, nodes, and the widths of a node, hidden and out
# Sizes that differ between graphs: nodes grouped as if four each belong to one would be wrong.
OWNER = jnp.array([0] * 6 + [1] * 2 + [2] * 4)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


def dense(params, name, x):
    return kfe.tag_dense(x, x @ params[name]["kernel"], params[name])


def parameters(inputs=D):
    return {"first": {"kernel": normal(inputs, H)}, "last": {"kernel": normal(H, C)}}


def pooled(hidden, owner):
    return jax.ops.segment_sum(jnp.tanh(hidden), owner, G)


def graph_loss(params, nodes, owner):
    z = dense(params, "last", pooled(dense(params, "first", nodes), owner))
    return kfe.losses.l2_loss(z).sum(-1).mean()


def collect(loss_fn, params, *args, **options):
    layers = kfe.find_layers(loss_fn, params, *args)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, **options)
    return layers, differentiate(params, *args, key=jax.random.key(0))[2]


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_sums_over_the_nodes_of_graphs(fisher, x64):
    """K-FAC's factors of a layer of nodes, whose count happens to be a multiple of the graphs'."""
    params, nodes = parameters(), normal(V, D)
    samples = 2000 if fisher == "sampled" else 1
    layers, taps = collect(graph_loss, params, nodes, OWNER, fisher=fisher, num_samples=samples)
    assert layers["first"].aligned is False
    assert layers["last"].aligned
    assert "examples unknown" in str(layers)

    def outputs(y):
        return pooled(y, OWNER) @ params["last"]["kernel"]

    y = nodes @ params["first"]["kernel"]
    if fisher == "sampled":
        jacobian = np.asarray(jax.jit(jax.jacobian(outputs))(y))
        expected = np.einsum("gcvi,gcvj->ij", jacobian, jacobian) / G
    else:
        own = np.asarray(jax.jit(jax.grad(lambda y: 0.5 * (outputs(y) ** 2).sum(-1).mean()))(y))
        expected = G * own.T @ own
    a, g = taps["first"].covariances()
    assert_close(a, nodes.T @ nodes / V, 1e-12)
    assert_close(g, expected, 0.1 if fisher == "sampled" else 1e-12)
    assert taps["first"].second_moment_in(None, None) is None
    for read in (taps["first"].rows, taps["first"].example_gradients):
        with pytest.raises(ValueError, match="leading axis that is not shown to be the batch"):
            read()
    with pytest.raises(ValueError, match="not shown that each row of layer 'first' belongs to one example"):
        collect(graph_loss, params, nodes, OWNER, fisher="exact")


def test_methods_on_unknown_examples():
    """K-FAC and EKFAC's running scale train; what reads single examples says that it cannot; a check calls nothing ok."""
    params, nodes = jax.tree.map(lambda p: p.astype(jnp.float32), parameters()), normal(V, D)
    layers = kfe.find_layers(graph_loss, params, nodes, OWNER)
    differentiate = kfe.value_grad_and_taps(graph_loss, layers)
    _, grads, taps = differentiate(params, nodes, OWNER, key=jax.random.key(0))
    for make in (kfe.kfac, kfe.ekfac):
        tx = make(0.1, layers)
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, taps=taps)
        assert all(np.isfinite(u).all() and np.any(u) for u in jax.tree.leaves(updates))
    for make in (kfe.scale_by_kpsvd, kfe.scale_by_tkfac):
        tx = make(layers, 0.1)
        with pytest.raises(ValueError, match="leading axis that is not shown to be the batch"):
            jax.eval_shape(lambda tx=tx: tx.update(grads, tx.init(params), params, taps=taps))
    with pytest.raises(ValueError, match="sharing='reduce': its examples are not known"):
        layers.configure("first", sharing="reduce")
    check = {c.name: c for c in kfe.check_layers(graph_loss, layers, params, nodes, OWNER)}["first"]
    assert (check.gradient_error, check.example_error) == (None, None)
    assert "not shown to be the batch" in check.note


def test_rows_of_unknown_examples_take_a_mask_of_their_own(x64):
    """A mask of the graphs is none of the nodes."""
    params, nodes = parameters(), normal(V, D)
    layers = kfe.find_layers(graph_loss, params, nodes, OWNER)
    differentiate = kfe.value_grad_and_taps(graph_loss, layers, fisher="empirical")
    with pytest.raises(ValueError, match="row_mask has shape"):
        differentiate(params, nodes, OWNER, row_mask=jnp.ones(G))

    def masked(params, nodes, owner, live):
        with kfe.row_mask(live):
            hidden = dense(params, "first", nodes)
        z = dense(params, "last", pooled(hidden * live[:, None], owner))
        return kfe.losses.l2_loss(z).sum(-1).mean()

    live = jnp.arange(V) % 3 > 0
    a, _ = collect(masked, params, nodes, OWNER, live)[1]["first"].covariances()
    own = nodes[np.asarray(live)]
    assert_close(a, own.T @ own / len(own), 1e-12)


N, T = 4, 6
X = (N, T, D)


def experts(x):
    """Tokens sent to experts, 8 slots each; the count of experts is that of the batch."""
    tokens = x.reshape(-1, D)
    chosen = jax.nn.one_hot((tokens[:, 0] > 0).astype(int), N) @ jnp.ones((N, N))
    return jnp.einsum("se,sd->ed", chosen, tokens)


def loop_over_time(x):
    _, hidden = jax.lax.scan(lambda h, v: (h + v, h), jnp.zeros((N, D)), x.swapaxes(0, 1))
    return hidden.swapaxes(0, 1)


# What precedes the layer, by whether its examples are known behind it; a loss of N examples follows.
KNOWN = {
    "positions": lambda x: x,
    "flattened": lambda x: x.reshape(-1, D),
    "time-major and back": lambda x: jnp.swapaxes(jnp.swapaxes(x, 0, 1) + 1, 0, 1).reshape(N * T, D),
    "windows": lambda x: x.reshape(N, 2, 3, D).swapaxes(1, 2).reshape(N * 2, 3, D),
    "moved by a reshape": lambda x: jax.lax.reshape(
        jax.lax.reshape(x, (T, N, D), dimensions=(1, 0, 2)), (N, T, D), dimensions=(1, 0, 2)
    ),
    "one position": lambda x: x[:, 0],
    "chosen positions": lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1, keepdims=True), 1),
    "positions in an order": lambda x: x[:, jnp.array([5, 4, 3, 2, 1, 0])],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)))[:, ::2],
    "attention": lambda x: nn.dot_product_attention(*3 * (x[:, :, None],))[:, :, 0],
    "pooled": lambda x: nn.avg_pool(x, (2,), (2,)) + x.mean(1, keepdims=True),
    "convolved": lambda x: jax.lax.conv_general_dilated(
        x, jnp.ones((3, D, D)), (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
    ),
    "normalized over the batch": lambda x: (x - x.mean((0, 1))) * jax.lax.rsqrt(x.var((0, 1)) + 1),
    "sorted features": lambda x: jnp.sort(jnp.cumsum(x, 1), -1) + jnp.concatenate([x[:, 1:], x[:, :1]], 1),
    "a branch": lambda x: jax.lax.cond(x.sum() > 0, jnp.tanh, lambda v: jnp.ones_like(v), x),
    "rematerialized": jax.checkpoint(lambda x: jax.nn.relu(x) @ jnp.eye(D)),
    "a loop over time": loop_over_time,
    "the end of a loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, v: jnp.sin(v) * i, x),
    "stacked and repeated": lambda x: jnp.tile(jnp.stack(jnp.unstack(x, axis=2)[:3], 1), (1, 1, 2)),
    "spectrum": lambda x: jnp.fft.rfft(x, axis=1).real,
}
LOST = {
    "time-major": lambda x: jnp.swapaxes(x, 0, 1),
    "time-major, flattened": lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, D),
    "experts": experts,
    "a shuffled batch": lambda x: x[jnp.argsort(x[:, 0, 0])],
    "a sorted batch": lambda x: jnp.sort(x, 0),
    "a reversed batch": lambda x: x[::-1],
    "neighbors": lambda x: jnp.concatenate([x[1:], x[:1]]),
    "twice the batch": lambda x: jnp.concatenate([x, -x]),
    "prototypes": lambda x: (x.reshape(-1, D).T @ x.reshape(-1, D))[:N],
    "a fifth": lambda x: jnp.pad(x, ((0, 1), (0, 0), (0, 0))),
    "rotating": lambda x: jax.lax.fori_loop(0, N, lambda i, v: v.swapaxes(0, 1), x[:, :N]),
    "sums over segments": lambda x: jax.ops.segment_sum(x.reshape(-1, D), jnp.zeros(N * T, int), 7),
}


def loss_behind(name):
    def loss_fn(params, x, y):
        hidden = dense(params, "first", {**KNOWN, **LOST}[name](x))
        examples = hidden.reshape(N, -1, H) if name in KNOWN else hidden.reshape(1, -1, H)
        return kfe.losses.l2_loss(dense(params, "last", y + examples.mean(1))).mean()

    return loss_fn


@pytest.mark.parametrize("name", [*KNOWN, *LOST])
def test_the_batch_is_followed(name):
    x = normal(*X)
    shape = jax.eval_shape({**KNOWN, **LOST}[name], x).shape
    layers = kfe.find_layers(loss_behind(name), parameters(shape[-1]), x, normal(N, H))
    layer = layers["first"]
    assert (layer.aligned, layer.per_example, layer.has_rows) == 3 * (name in KNOWN,)
    assert layers["last"].aligned
    if name in KNOWN:
        assert layer.examples == N
        assert layer.positions == np.prod(shape[:-1]) // N


def test_a_mask_of_examples_that_are_flattened(x64):
    """It counts or leaves out all positions of an example, which stand one behind the other."""
    params, x, y = parameters(), normal(*X), normal(N, H)
    live = jnp.array([True, False, False, True])
    loss_fn = loss_behind("flattened")
    layers = kfe.find_layers(loss_fn, params, x, y)
    differentiate = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")
    _, _, taps = differentiate(params, x, y, row_mask=live)
    own = x[live].reshape(-1, D)
    assert_close(taps["first"].covariances()[0], own.T @ own / len(own), 1e-12)


def test_a_norm_of_positions_that_are_flattened(x64):
    """An example's gradient is the sum over its positions, and the mean over the examples is the loss's."""
    x = normal(*X)
    params = {"norm": {"scale": normal(D), "bias": normal(D)}}

    def loss_fn(params, x):
        y = nn.LayerNorm().apply({"params": params["norm"]}, x.reshape(-1, D))
        return kfe.losses.l2_loss(y.reshape(x.shape)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x)
    found = taps["norm"].example_gradients().mean(-3)
    assert_close(found, layers["norm"].to_matrix(grads), 1e-12)


def test_an_einsum_whose_batch_is_not_first():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((D, H), "dn,di->ni", use_bias=False, name="first")(x.T)

    x = normal(N, D)
    params = {"model": randomized(jax.eval_shape(Model().init, jax.random.key(0), x)["params"], jnp.float32)}

    def loss_fn(params, x):
        return kfe.losses.l2_loss(Model().apply({"params": params["model"]}, x)).mean()

    assert all(layer.aligned for layer in kfe.find_layers(loss_fn, params, x).values())


def test_a_norm_of_nodes_has_a_row_a_node():
    """A kind that keeps a row an example where they are known, as behind the pooling."""

    class Graphs(nn.Module):
        @nn.compact
        def __call__(self, nodes, owner):
            hidden = nn.LayerNorm(name="norm")(nn.Dense(H, name="first")(nodes))
            return nn.Dense(C, name="last")(nn.LayerNorm(name="own")(pooled(hidden, owner)))

    nodes = normal(V, D)
    params = jax.eval_shape(Graphs().init, jax.random.key(0), nodes, OWNER)["params"]

    def loss_fn(params, nodes, owner):
        return kfe.losses.l2_loss(Graphs().apply({"params": params}, nodes, owner)).sum(-1).mean()

    layers = kfe.find_layers(loss_fn, params, nodes, OWNER)
    assert {name: layer.aligned for name, layer in layers.items()} == {
        "first": False,
        "norm": False,
        "own": True,
        "last": True,
    }


def test_one_example_needs_no_axis(x64):
    """A single graph is its own batch: all its nodes are positions of one example."""

    def loss_fn(params, nodes):
        z = dense(params, "last", jnp.tanh(dense(params, "first", nodes)).sum(0, keepdims=True))
        return kfe.losses.l2_loss(z).sum()

    params, nodes = parameters(), normal(V, D)
    layers, taps = collect(loss_fn, params, nodes, fisher="empirical")
    assert layers["first"].positions == V
    gradient = jax.jit(jax.grad(loss_fn))(params, nodes)["first"]["kernel"]
    assert_close(taps["first"].example_gradients()[0], gradient, 1e-12)


def test_outputs_that_are_flattened(x64):
    """Tokens as rows of the loss, (n t, classes): the examples are those of the data."""

    def loss_fn(params, x, labels):
        hidden = jnp.tanh(dense(params, "first", x))
        hidden = hidden + hidden.mean(1, keepdims=True)
        z = dense(params, "last", hidden).reshape(-1, C)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(z, labels.ravel()).mean()

    params, x, labels = parameters(), normal(*X), jnp.arange(N * T).reshape(N, T) % C
    layers, taps = collect(loss_fn, params, x, labels, fisher="empirical")
    assert (layers["first"].examples, layers["first"].positions) == (N, T)
    alone = jax.vmap(jax.grad(lambda p, x, y: loss_fn(p, x[None], y[None])), (None, 0, 0))(params, x, labels)
    for name in layers:
        assert_close(taps[name].example_gradients(), alone[name]["kernel"], 1e-12)
    with pytest.raises(ValueError, match="the loss's outputs are flattened"):
        collect(loss_fn, params, x, labels, fisher="exact")


def test_queries_that_are_learned():
    """Repeated for each example they have the batch's axis; before that they are the same for all examples."""

    def loss_of(repeat_first):
        def loss_fn(params, x):
            queries = params["queries"]
            if repeat_first:
                queries = jnp.broadcast_to(queries, (N, *queries.shape))
            queries = dense(params, "first", queries)
            queries = queries if repeat_first else jnp.broadcast_to(queries, (N, *queries.shape))
            keys = jnp.pad(x, ((0, 0), (0, 0), (0, H - D)))[:, :, None]
            found = nn.dot_product_attention(queries[:, :, None], keys, keys)[:, :, 0]
            return kfe.losses.l2_loss(dense(params, "last", found)).mean()

        return loss_fn

    params, x = {**parameters(), "queries": normal(2 * N, D)}, normal(*X)
    repeated, same = (kfe.find_layers(loss_of(first), params, x)["first"] for first in (True, False))
    assert (repeated.aligned, repeated.constant, repeated.examples) == (True, False, N)
    assert (same.constant, same.examples, same.positions) == (True, 1, 2 * N)
    with pytest.raises(ValueError, match="same for all examples"):
        collect(loss_of(False), params, x, fisher="exact")
