"""Which layers feed which, through jit, scan, cond and loops, and the chains that they form."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import kfe_optax as kfe
from kfe_optax._layers.chains import find_chains
from kfe_optax._layers.flow import BEFORE, LAST, SAME, End, Source

from . import problems
from .models import cross_entropy, parameter_shapes

N, D = 4, 3
LABELS = jnp.zeros(N, int)


def plain(*layers):
    """Parameters of square dense layers, by name."""
    return {name: {"kernel": jnp.ones((D, D))} for name in layers}


def call(params, name, x):
    return jnp.tanh(kfe.tag_dense(x, x @ params[name]["kernel"], params[name]))


def layers_of(function, params, x=None):
    """The layers of function(params, x), the last of which makes the logits."""
    x = jnp.ones((N, D)) if x is None else x
    return kfe.find_layers(lambda params, x: cross_entropy(function(params, x), LABELS), params, x)


def of_module(module, x):
    params = parameter_shapes(module, x)
    return kfe.find_layers(
        lambda params, x: cross_entropy(module.apply({"params": params}, x), LABELS), params, x
    )


def feeds(layers):
    return {name: set(layer.inputs_from) for name, layer in layers.items()}


def names(layers, chains="whole", max_dim=8192):
    plan = find_chains(layers, chains, max_dim)
    return [[str(element) for element in chain] for chain in plan.chains], plan.alone


@pytest.mark.parametrize("framework", problems.FRAMEWORKS)
def test_a_network_of_dense_layers_is_a_chain(framework):
    problem = problems.make(framework, sizes=(3, 4, 3, 2))
    layers = problem.layers()
    a, b, c = problem.names
    assert feeds(layers) == {a: set(), b: {a}, c: {b}}
    assert names(layers) == names(layers, "split") == ([[a, b, c]], ())


WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda f: lambda p, x: jax.lax.cond(x.sum() > 0, f, lambda p, x: x, p, x),
    "while": lambda f: lambda p, x: jax.lax.fori_loop(0, jnp.int32(1), lambda _, h: h + f(p, x), x),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_inner_programs_are_followed(wrap):
    """The function between a and c holds relu (a custom derivative); in a cond c is fed by a as well."""

    def function(params, x):
        between = WRAPPERS[wrap](lambda params, x: jax.nn.relu(2 * x))
        return call(params, "c", between(params, call(params, "a", x)))

    assert feeds(layers_of(function, plain("a", "c"))) == {"a": set(), "c": {"a"}}

    def tagged(params, x):
        between = WRAPPERS[wrap](lambda params, x: call(params, "b", x))
        return call(params, "c", between(params, call(params, "a", x)))

    if wrap != "while":  # A while of unknown length has no derivative; discovery alone would see it.
        both = {"a", "b"} if wrap == "cond" else {"b"}
        assert feeds(layers_of(tagged, plain("a", "b", "c"))) == {"a": set(), "b": {"a"}, "c": both}


def test_parameters_are_no_layers():
    """A penalty that reads a layer's kernel, and a scale, do not feed anything."""

    def function(params, x):
        h = call(params, "b", x) * params["scale"]["kernel"].sum()
        return call(params, "c", h) + call(params, "a", x) + jnp.sum(params["a"]["kernel"] ** 2)

    layers = layers_of(function, plain("a", "b", "c", "scale"))
    assert feeds(layers) == {"b": set(), "c": {"b"}, "a": set()}


class Scanned(nn.Module):
    """Dense, a scan over stacked blocks of two layers, with or without a residual connection, Dense."""

    residual: bool = False
    length: int = 3
    reverse: bool = False
    stack_outputs: bool = False

    @nn.compact
    def __call__(self, x):
        residual, stack_outputs = self.residual, self.stack_outputs

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.tanh(nn.Dense(D, name="first")(x))
                h = nn.tanh(nn.Dense(D, name="second")(h))
                return (x + h if residual else h), (h if stack_outputs else None)

        x = nn.tanh(nn.Dense(D, name="before")(x))
        body = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.length,
            reverse=self.reverse,
        )
        x, ys = body(name="stack")(x, None)
        return nn.Dense(D, name="after")(x if ys is None else ys.sum(0))


X1, X2 = "stack/first", "stack/second"


def test_stacked_layers_take_turns():
    layers = of_module(Scanned(), jnp.ones((N, D)))
    assert feeds(layers) == {"before": set(), X1: {"before", X2}, X2: {X1}, "after": {X2}}
    turns = [f"{name}[{i}]" for i in range(3) for name in (X1, X2)]
    assert names(layers) == names(layers, "split") == ([["before", *turns, "after"]], ())
    # So do those of a list; a layer of its own stays whole.
    assert names(layers, [[X1, X2]]) == ([turns], ("before", "after"))
    assert names(layers, [[X2, "after"]]) == (
        [[f"{X2}[{i}]" for i in range(3)] + ["after"]],
        ("before", X1),
    )
    assert names(of_module(Scanned(length=1), jnp.ones((N, D))))[0] == [
        ["before", f"{X1}[0]", f"{X2}[0]", "after"]
    ]


def test_a_residual_stack_is_split_into_its_blocks():
    layers = of_module(Scanned(residual=True), jnp.ones((N, D)))
    assert feeds(layers) == {"before": set(), X1: {"before", X2}, X2: {X1}, "after": {"before", X2}}
    with pytest.raises(ValueError, match=r"layer 'stack/first\[1\]' stands after layer 'stack/second\[0\]'"):
        names(layers)
    pairs = [[f"{X1}[{i}]", f"{X2}[{i}]"] for i in range(3)]
    assert names(layers, "split") == (pairs, ("before", "after"))


def test_stacks_without_an_order():
    """Run backwards, stacked by a vmap, with all iterations' outputs read."""
    backwards = of_module(Scanned(reverse=True), jnp.ones((N, D)))
    assert names(backwards, "split") == ([], ("before", X1, X2, "after"))
    outputs = of_module(Scanned(stack_outputs=True), jnp.ones((N, D)))
    turns = [f"{name}[{i}]" for i in range(3) for name in (X1, X2)]
    # The second layers feed both the next block and the head; the blocks stay together.
    assert names(outputs, "split")[0][-1] == turns[-2:]

    def ensemble(params, x, labels):
        def member(params):
            return cross_entropy(call(params, "b", call(params, "a", x)), labels)

        return jax.vmap(member)(params).sum()

    params = jax.tree.map(lambda v: jnp.stack([v, v]), plain("a", "b"))
    layers = kfe.find_layers(ensemble, params, jnp.ones((N, D)), LABELS)
    assert feeds(layers) == {"a": set(), "b": {"a"}}
    assert names(layers, "split") == ([], ("a", "b"))
    with pytest.raises(ValueError, match="'a' is stacked by a vmap"):
        names(layers)


def test_a_layer_in_a_loop_over_time_feeds_itself():
    def function(params, xs):
        def body(h, x):
            return call(params, "cell", h) + x, None

        h, _ = jax.lax.scan(body, jnp.zeros((N, D)), xs.swapaxes(0, 1))
        return call(params, "head", h)

    layers = layers_of(function, plain("cell", "head"), jnp.ones((N, 5, D)))
    assert feeds(layers) == {"cell": {"cell"}, "head": {"cell"}}
    assert names(layers, "split") == ([], ("cell", "head"))
    with pytest.raises(ValueError, match="'cell' stands as the first layer and is fed by cell"):
        names(layers)
    with pytest.raises(ValueError, match="'cell' uses its parameters more than once"):
        names(layers, [["cell", "head"]])


def test_residual_connections_and_branches():
    """a → b → c, a around b; d and e both read c."""

    def function(params, x):
        h = call(params, "a", x)
        h = call(params, "c", h + call(params, "b", h))
        return call(params, "d", h) + call(params, "e", h)

    layers = layers_of(function, plain(*"abcde"))
    assert feeds(layers) == {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"c"}, "e": {"c"}}
    message = "layer 'c' stands after layer 'b' and is fed by a and b.*chains='split'"
    with pytest.raises(ValueError, match=message):
        names(layers)
    assert names(layers, "split") == ([], tuple("abcde"))
    assert names(layers, [["b", "c", "d"]]) == ([["b", "c", "d"]], ("a", "e"))

    def fork(params, x):
        h = call(params, "b", call(params, "a", x))
        return call(params, "c", h) + call(params, "d", h)

    layers = layers_of(fork, plain(*"abcd"))
    with pytest.raises(ValueError, match="layer 'd' stands after layer 'c' and is fed by b"):
        names(layers)
    assert names(layers, "split") == ([["a", "b"]], ("c", "d"))
    with pytest.raises(ValueError, match="'b' stands after layer 'a' and is fed by the data"):
        names(layers_of(lambda p, x: call(p, "a", x) + call(p, "b", x), plain("a", "b")))


def scanned_from_data(params, x):
    """Residual blocks from the data on."""

    def body(h, kernel):
        return h + jnp.tanh(kfe.tag_dense(h, h @ kernel["kernel"], kernel)), None

    return jax.lax.scan(body, x, params["a"])[0]


def onto_loss(p, x):
    h = call(p, "a", x)
    return h + call(p, "c", call(p, "b", h))


def beside(join):
    """a → b, with the data beside b's input."""
    return lambda p, x: call(p, "b", join(call(p, "a", x), x))


def tiled(h, x):
    repeated = jnp.broadcast_to(x[None], (2, *x.shape)).reshape(-1, D)
    return (jnp.tile(h, (2, 1)) + repeated)[:N]


B_AND_DATA = "layer 'b' stands after layer 'a' and is fed by a and the data"
# The network, which layers a split network joins, what the message says.
AROUND = {
    "to the loss": (onto_loss, [["b", "c"]], "layer 'a' feeds b and the loss"),
    "from the data": (beside(lambda h, x: x + h), [], B_AND_DATA),
    "beside": (beside(lambda h, x: jnp.concatenate([h, x], 1)[:, :D]), [], B_AND_DATA),
    "a gate": (beside(lambda h, x: h * jax.nn.sigmoid(x)), [], B_AND_DATA),
    "one-hot": (beside(lambda h, x: jnp.concatenate([h, x > 0], 1)[:, :D]), [], B_AND_DATA),
    "a shift of rows": (beside(lambda h, x: h + x.sum(1, keepdims=True)), [], B_AND_DATA),
    "chosen": (beside(lambda h, x: jnp.where(h > 0, h, x)), [], B_AND_DATA),
    "mixed features": (
        beside(lambda h, x: jnp.einsum("nd,nde->ne", h, x[..., None] * x[:, None])),
        [],
        B_AND_DATA,
    ),
    "tiled": (beside(tiled), [], B_AND_DATA),
    "a cond": (beside(lambda h, x: jax.lax.cond(x[0, 0] > 0, lambda: h, lambda: x)), [], B_AND_DATA),
}


@pytest.mark.parametrize("name", AROUND)
def test_data_and_loss_are_ends_of_the_chain(name):
    function, joined, message = AROUND[name]
    used = "abc" if name == "to the loss" else "ab"
    layers = layers_of(function, plain(*used))
    with pytest.raises(ValueError, match=f"{message}. With chains='whole'.*chains='split'"):
        names(layers)
    alone = tuple(n for n in used if not any(n in chain for chain in joined))
    assert names(layers, "split") == (joined, alone)
    if name == "tiled":
        return  # the first layer's examples are not known behind it
    # Whoever names a chain knows it better.
    assert names(layers, [["a", "b"]])[0] == [["a", "b"]]


def test_residual_blocks_from_the_data_on():
    params = {"a": {"kernel": jnp.ones((3, D, D))}}
    layers = layers_of(scanned_from_data, params)
    with pytest.raises(
        ValueError, match=r"layer 'a\[1\]' stands after layer 'a\[0\]' and is fed by a\[0\].* and the data"
    ):
        names(layers)
    assert names(layers, "split") == ([], ("a",))


T = 5
DRAW = lambda key, shape: jax.random.bernoulli(key, 0.5, shape)
# Of h (N, T, D), a mask of its rows as numbers, and per-feature numbers: what leaves a and b a chain.
HARMLESS = {
    "dropout": lambda h, x, rows, each, key: jnp.where(DRAW(key, h.shape), h / 0.5, 0),
    "multiplied dropout": lambda h, x, rows, each, key: h * DRAW(key, h.shape),
    "noise": lambda h, x, rows, each, key: h + jax.random.normal(key, h.shape),
    "rows": lambda h, x, rows, each, key: h * rows[..., None],
    "where": lambda h, x, rows, each, key: jnp.where(rows[..., None] > 0, h, 0.0),
    "padding": lambda h, x, rows, each, key: h * (x != 0),
    "mean": lambda h, x, rows, each, key: (h * rows[..., None]).sum(1) / rows.sum(1, keepdims=True),
    "mean where": lambda h, x, rows, each, key: h.mean(1, where=(rows > 0)[..., None]),
    "weighted mean": lambda h, x, rows, each, key: jnp.einsum("nt,ntd->nd", rows, h),
    "last": lambda h, x, rows, each, key: h[jnp.arange(N), rows.sum(1).astype(int) - 1],
    "running statistics": lambda h, x, rows, each, key: (h - each) / jnp.broadcast_to(each, h.shape),
    "temperature": lambda h, x, rows, each, key: h / each[0] + each[1],
    "table": lambda h, x, rows, each, key: h + jnp.ones((T, 1)) * each,
    "beside a constant": lambda h, x, rows, each, key: jnp.concatenate(
        [h, jnp.broadcast_to(each, h.shape)], -1
    )[..., :D],
    "rotated": lambda h, x, rows, each, key: h @ jnp.outer(each, each),
    "printed": lambda h, x, rows, each, key: (h, jax.debug.print("{} {}", h, x, ordered=True))[0],
    "switched": lambda h, x, rows, each, key: jax.lax.cond(each[0] > 0, lambda: h, lambda: 2 * h),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_masks_and_constants_are_no_data(name):
    """Under a vmap over the examples as well."""
    key, x, rows, each = jax.random.key(0), jnp.ones((N, T, D)), jnp.ones((N, T)), jnp.ones(D)

    def forward(params, x, rows, each, key):
        return call(params, "b", HARMLESS[name](call(params, "a", x), x, rows, each, key))

    def loss_fn(params, *args):
        return kfe.losses.l2_loss(forward(params, *args)).mean()

    params = plain("a", "b")
    layers = kfe.find_layers(loss_fn, params, x, rows, each, key)
    assert feeds(layers) == {"a": set(), "b": {"a"}}
    assert layers["a"].flow.first == (Source(End.DATA, SAME),)
    assert layers["b"].flow.first == (Source("a", SAME),) == layers["b"].flow.later
    assert layers["a"].flow.loss == (Source("b", SAME),)
    if x.size == layers["b"].examples * layers["b"].positions * D:  # not where positions are averaged
        assert names(layers)[0] == [["a", "b"]]

    def each_example(params, x, rows, each, key):
        one = lambda x, rows, key: forward(params, x[None], rows[None], each, key)[0]
        return kfe.losses.l2_loss(jax.vmap(one)(x, rows, jax.random.split(key, N))).mean()

    if name not in ("last", "printed"):  # of the whole batch
        layers = kfe.find_layers(each_example, params, x, rows, each, key)
        assert layers["b"].flow.first == (Source("a", SAME),)


def test_an_autoencoder_of_its_data():
    def loss_fn(params, x):
        z = call(params, "b", call(params, "a", x))
        return kfe.losses.l2_loss(z - 0.1 * x, x).mean()

    assert names(kfe.find_layers(loss_fn, plain("a", "b"), jnp.ones((N, D))))[0] == [["a", "b"]]


def test_ends_move_when_layers_are_left_out():
    layers = layers_of(lambda p, x: call(p, "c", call(p, "b", call(p, "a", x))), plain(*"abc"))
    assert layers["a"].flow.loss == (Source("c", SAME),)
    assert names(layers.without("c"))[0] == [["a", "b"]]
    assert layers.without("c")["a"].flow.loss == (Source("b", SAME),)
    assert layers.without("a")["b"].flow.first == (Source(End.DATA, SAME),)


def test_layers_that_are_none_are_operations():
    """A layer whose kernel is replaced goes to `rest`; what it feeds is fed by what feeds it."""

    def function(params, x):
        replaced = {"b": {**params["b"], "kernel": jnp.sin(params["b"]["kernel"])}}
        return call(params, "c", call(replaced, "b", call(params, "a", x)))

    layers = layers_of(function, plain(*"abc"))
    assert feeds(layers) == {"a": set(), "c": {"a"}}
    assert names(layers) == ([["a", "c"]], ())


def test_bypassing_a_layer_of_a_stack():
    layers = of_module(Scanned(), jnp.ones((N, D)))
    gone = {X2: layers[X2].flow}
    assert layers["after"].flow.bypassing(gone).first == (Source(X1, LAST),)
    flow = layers[X1].flow.bypassing(gone)
    assert (flow.first, flow.later) == ((Source("before", SAME),), (Source(X1, BEFORE),))
    # What feeds the layer that is left out changes behind the first iteration, and so does what then feeds the next one.
    flow = layers.without(X1)[X2].flow
    assert (flow.first, flow.later) == ((Source("before", SAME),), (Source(X2, BEFORE),))


class Images(nn.Module):
    """Convolutions of one resolution, a norm, a convolution of half the resolution, a pool, Dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(2, (3, 3), name="conv_0")(x))
        x = nn.tanh(nn.Conv(2, (1, 1), name="conv_1")(x))
        x = nn.tanh(nn.Conv(2, (3, 3), strides=2, name="conv_2")(x))
        x = nn.tanh(nn.Conv(2, (3, 3), feature_group_count=2, name="grouped")(x))
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_statistics_that_cannot_be_paired():
    layers = of_module(Images(), jnp.ones((N, 4, 4, 1)))
    assert names(layers, "split") == ([["conv_0", "conv_1"]], ("conv_2", "grouped", "norm", "head"))
    for pair, message in (
        (["conv_1", "conv_2"], "they have 16 and 4 positions an example"),
        (["conv_2", "grouped"], r"'grouped' consists of blocks \(groups\)"),
        (["norm", "head"], "'norm' is a layer of kind 'norm', which has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            names(layers, [pair])
    with pytest.raises(ValueError, match="'conv_1' and 'conv_2' cannot be neighbors.*chains='split'"):
        names(layers)
    with pytest.raises(ValueError, match="'conv_0' has a side of 10 > max_dim=9"):
        names(layers, [["conv_0", "conv_1"]], max_dim=9)
    assert names(layers, "split", max_dim=9)[0] == []
    sua = layers.configure("conv_1", approximation="sua")
    with pytest.raises(ValueError, match="'conv_1' has approximation='sua'"):
        names(sua, [["conv_0", "conv_1"]])
    mixed = layers.configure("conv_1", sharing="reduce")
    with pytest.raises(ValueError, match="16 and 1 positions"):
        names(mixed, [["conv_0", "conv_1"]])
    reduced = layers.configure("conv_?", sharing="reduce")
    assert names(reduced, [["conv_0", "conv_1", "conv_2"]])[0] == [["conv_0", "conv_1", "conv_2"]]


def test_lists_of_names():
    layers = layers_of(lambda p, x: call(p, "b", call(p, "a", x)), plain("a", "b"))
    assert names(layers, []) == names(layers, [["a"], []]) == ([], ("a", "b"))
    for chains, message in (
        ([["a", "z"]], "chains names 'z', and there is no such layer; the layers are a, b"),
        ([["a"], ["a", "b"]], "chains names 'a' twice"),
        (["a", "b"], "each a list of layer names: not 'a'"),
        ([5], "each a list of layer names: not 5"),
        ([["a", 5]], r"each a list of layer names: not \['a', 5\]"),
        ("all", "chains must be 'whole', 'split' or lists"),
    ):
        with pytest.raises(ValueError, match=message):
            names(layers, chains)
    for chains in (5, None):
        with pytest.raises(
            TypeError, match=rf"'split' or lists of layer names, one a chain.*, not {chains}\."
        ):
            names(layers, chains)


def test_a_masked_layer_cuts_its_chain():
    layers = of_module(Scanned(length=2), jnp.ones((N, D)))
    plan = find_chains(layers, "whole", 8192).among(["before", X1, "after"])
    assert [[str(e) for e in chain] for chain in plan.chains] == [
        ["before", f"{X1}[0]"],
        [f"{X1}[1]"],
        ["after"],
    ]
