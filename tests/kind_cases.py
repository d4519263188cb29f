"""One branch of every kind of layer, in every shape that has its own code."""

from __future__ import annotations

import contextlib
from functools import partial as case

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from . import dense_kinds as dk
from . import kind_networks
from .kind_networks import Branch, N, of_module, parameters
from .test_kinds_geometry import tables

DOUBLE = {"param_dtype": jnp.float64}

_seed = 0


def random(seed, *shape):
    return kind_networks.random(seed + _seed, *shape)


@contextlib.contextmanager
def other_inputs():
    """Branches made in this context have other inputs."""
    global _seed
    _seed = 100
    try:
        yield
    finally:
        _seed = 0


# Convolutions.


def conv_rows(x, module, spatial, transposed, options):
    """ā (groups, n, e T, d) of a convolution whose x is (n, ..., *spatial, c)."""
    own = tables(spatial, module.kernel_size, transposed, **options)
    a = dk.conv_rows(x.reshape(-1, *x.shape[-len(spatial) - 1 :]), own, module.use_bias, groups(module))
    return a.reshape(*a.shape[:-3], N, -1, a.shape[-1])


def groups(module):
    return getattr(module, "feature_group_count", 1)


def conv(spatial, window, features=3, channels=2, batch=(), transposed=False, **options):
    geometry = {k: v for k, v in options.items() if k in GEOMETRY}
    own = {
        k: v
        for k, v in options.items()
        if k in (*GEOMETRY, "feature_group_count", "use_bias", "transpose_kernel")
    }
    module = (nn.ConvTranspose if transposed else nn.Conv)(features, window, **own, **DOUBLE)
    x = random(len(spatial), N, *batch, *spatial, channels) + 0.3
    a = conv_rows(x, module, spatial, transposed, geometry)

    def rows(g):
        return dk.Rows(a, dk.split(g.reshape(len(g), N, -1, features), groups(module)))

    fields = {k: v for k, v in options.items() if k not in own}
    return of_module(module, x, rows, **fields)


GEOMETRY = ("strides", "padding", "input_dilation", "kernel_dilation")


def conv_local(use_bias):
    module = nn.ConvLocal(2, (2, 3), strides=(1, 2), padding=[(1, 0), (2, 1)], use_bias=use_bias, **DOUBLE)
    x = random(2, N, 3, 4, 2)
    own = tables((3, 4), (2, 3), strides=(1, 2), padding=[(1, 0), (2, 1)])
    patches = dk.patches(x, own)
    # A block a position, and the patch's channels first.
    a = np.stack([patches[:, t].swapaxes(1, 2).reshape(N, 1, -1) for t in range(patches.shape[1])])
    a = dk.bordered(a) if use_bias else a

    def rows(g):
        return dk.Rows(a, np.moveaxis(g.reshape(len(g), N, -1, 1, 2), 2, 0))

    return of_module(module, x, rows)


def input_groups(m, use_bias, channels=4, features=6):
    """ "groups": the channels, with all offsets, and the outputs in m groups; the bias belongs to the first."""
    module = nn.Conv(features, (3,), use_bias=use_bias, **DOUBLE)
    x = random(5, N, 4, channels) + 0.3
    patches = dk.patches(x, tables((4,), (3,)))
    size = channels // m
    a = [patches[..., i * size : (i + 1) * size].reshape(N, 4, -1) for i in range(m)]
    if use_bias:
        a = [np.concatenate([rows, np.full((N, 4, 1), float(i == 0))], -1) for i, rows in enumerate(a)]

    def rows(g):
        return dk.Rows(np.stack(a)[:, None], np.stack(np.split(g, m, -1))[None])

    return of_module(module, x, rows, configure={"approximation": "groups", "num_groups": m})


def sua(centered, use_bias):
    module = nn.Conv(3, (2, 2), strides=(1, 2), kernel_dilation=(2, 1), use_bias=use_bias, **DOUBLE)
    x = random(6, N, 3, 4, 2) + 0.4
    own = tables((3, 4), (2, 2), strides=(1, 2), kernel_dilation=(2, 1))
    patches, bias = dk.patches(x, own), [np.ones((N, 6, 1))] * use_bias
    if centered:
        a = np.concatenate([patches.reshape(N, 6, -1), *bias], -1)
        expected = dk.sua(x, 4, use_bias, True)
    else:
        # Blocks are the offsets; the bias belongs to the first.
        ones = [np.full((N, 6, 1), float(k == 0)) for k in range(4)]
        a = np.stack([np.concatenate([patches[:, :, k], *ones[k : k + 1] * use_bias], -1) for k in range(4)])
        a, expected = a[:, None], dk.sua(x, 4, use_bias, False)[None, None]

    def rows(g):
        g = g.reshape(len(g), N, 6, 3)
        return dk.Rows(a, g if centered else g[None, None])

    return of_module(
        module,
        x,
        rows,
        configure={"approximation": "sua" if centered else "sua_uncentered"},
        factors=lambda own: (expected, own.expand()[1]),
    )


REDUCE = {"configure": {"sharing": "reduce"}, "factors": dk.Rows.reduce}


CONVOLUTIONS = {
    "conv1": case(conv, (5,), (3,), padding="CAUSAL", kernel_dilation=2),
    "circular": case(conv, (6,), (4,), padding="CIRCULAR", strides=2, use_bias=False),
    "reflect": case(conv, (5,), (2,), padding="REFLECT"),
    "conv2": case(conv, (5, 4), (3, 2), strides=(2, 1), kernel_dilation=(1, 2)),
    "long_stride": case(conv, (7, 5), (2, 1), padding="VALID", strides=(3, 2), use_bias=False),
    "asymmetric": case(conv, (3, 4), (2, 3), padding=[(2, 0), (0, 1)], input_dilation=(2, 1)),
    "conv3": case(conv, (3, 2, 2), (2, 1, 2), channels=1, features=2),
    "batches": case(conv, (3, 4), (2, 2), batch=(2, 3), padding="VALID"),
    "one_position": case(conv, (3,), (3,), padding="VALID"),
    "pointwise": case(conv, (2, 2), (1, 1)),
    "feature_groups": case(conv, (5,), (3,), channels=4, features=6, feature_group_count=2, strides=2),
    "depthwise": case(conv, (3, 3), (2, 2), channels=3, features=3, feature_group_count=3, use_bias=False),
    "depthwise_twice": case(conv, (4,), (2,), channels=3, features=6, feature_group_count=3),
    "transposed": case(conv, (3, 2), (3, 2), transposed=True, strides=(2, 3)),
    "transposed_valid": case(conv, (3,), (2,), transposed=True, strides=3, padding="VALID", use_bias=False),
    "transposed_flipped": case(
        conv, (3, 2), (2, 3), transposed=True, strides=(1, 2), padding=[(1, 2), (3, 1)], transpose_kernel=True
    ),
    "transposed_dilated": case(
        conv, (3,), (2,), transposed=True, strides=2, kernel_dilation=2, transpose_kernel=True
    ),
    "local": case(conv_local, True),
    "local_without_bias": case(conv_local, False),
    "groups": case(input_groups, 2, True),
    "groups_without_bias": case(input_groups, 2, False),
    "sua": case(sua, True, True),
    "sua_without_bias": case(sua, True, False),
    "sua_uncentered": case(sua, False, True),
    "sua_uncentered_without_bias": case(sua, False, False),
    "reduce": case(conv, (3, 4), (2, 2), **REDUCE),
    "reduce_feature_groups": case(conv, (4,), (2,), channels=2, features=4, feature_group_count=2, **REDUCE),
}


# Linear maps.


def general(shape, features, axis, use_bias=True, **fields):
    module = nn.DenseGeneral(features, axis, use_bias=use_bias, **DOUBLE)
    x = random(7, N, *shape) + 0.3
    # Flax sorts the axes, and the kernel has them in that order.
    axes = sorted(a % x.ndim for a in axis)
    letters = "abcdefg"[: x.ndim]
    new = "uvw"[: len(features)]
    contracted = "".join(letters[a] for a in axes)
    others = "".join(c for c in letters if c not in contracted)
    return mapped(module, x, f"{letters},{contracted}{new}->{others}{new}", **fields)


def einsum(formula, kernel, shape, use_bias=True, **fields):
    return mapped(
        nn.Einsum(kernel, formula, use_bias=use_bias, **DOUBLE), random(8, *shape), formula, **fields
    )


def mapped(module, x, formula, **fields):
    params = parameters(module, x)
    a, of_g = dk.map_rows(formula, x, None, params["kernel"].shape, module.use_bias)
    apply = lambda params, x: module.apply({"params": params}, x)
    return Branch(apply, params, x, lambda g: dk.Rows(a, of_g(g)), **fields)


def heads(a_heads, g_heads, shape, features, axis, use_bias=True):
    """A projection with the first of its input or output axes cut into heads; the bias belongs to the first input head."""
    plain = general(shape, features, axis, use_bias=use_bias)

    def rows(g):
        own = plain.rows(g)
        a = np.split(own.a[..., :-1] if use_bias else own.a, a_heads, -1)
        if use_bias:
            a = [np.concatenate([r, np.full((*r.shape[:-1], 1), float(i == 0))], -1) for i, r in enumerate(a)]
        return dk.Rows(np.stack(a)[:, None], np.stack(np.split(own.g, g_heads, -1))[None])

    return Branch(plain.apply, plain.params, plain.x, rows, configure={"approximation": "heads"})


def heads_reduced():
    plain = heads(1, 2, (3, 4), (2, 3), (-1,))
    configure = {"approximation": "heads", "sharing": "reduce"}
    return Branch(plain.apply, plain.params, plain.x, plain.rows, configure, dk.Rows.reduce)


def batch_dims():
    """`batch_dims` pairs leading axes, so that the examples come second."""
    module = nn.DenseGeneral(3, batch_dims=(0,), **DOUBLE)
    plain = mapped(module, random(9, 2, N, 3, 4), "kbti,kio->kbto")
    apply = lambda params, x: jnp.moveaxis(plain.apply(params, x), 0, 1)
    return Branch(apply, plain.params, plain.x, lambda g: plain.rows(np.moveaxis(g, 2, 1)))


LINEAR_MAPS = {
    "dense": case(general, (4,), (3,), (-1,)),
    "positions": case(general, (2, 3, 4), (3,), (-1,), use_bias=False),
    "two_axes": case(general, (2, 3, 4), (2, 3), (-2, -1)),
    "axes_in_another_order": case(general, (2, 3, 4), (2,), (-1, 1)),
    "first_axes": case(general, (2, 3), (2, 2), (1,)),
    "paired_axis": case(batch_dims),
    "queries": case(heads, 1, 2, (3, 4), (2, 3), (-1,)),
    "projection": case(heads, 2, 1, (3, 2, 4), (3,), (-2, -1)),
    "projection_without_bias": case(heads, 2, 1, (3, 2, 4), (3,), (-2, -1), use_bias=False),
    "heads_of_both": case(heads, 2, 3, (2, 2, 3), (3, 2), (-2, -1)),
    "einsum": case(einsum, "bti,oi->bto", (3, 4), (N, 2, 4)),
    "einsum_axes": case(einsum, "bthd,dhe->bte", (4, 2, 3), (N, 3, 2, 4)),
    "einsum_awkward": case(einsum, "bdth,ehfd->bfte", (2, 3, 4, 2), (N, 2, 3, 3)),
    "einsum_blocks": case(einsum, "btkd,kde->btke", (2, 3, 4), (N, 3, 2, 3)),
    "einsum_awkward_blocks": case(einsum, "bdtkj,ejdk->bketj", (3, 2, 2, 4), (N, 2, 2, 4, 2), use_bias=False),
    "reduce": case(general, (3, 4), (3,), (-1,), **REDUCE),
    "reduce_blocks": case(einsum, "btkd,kde->btke", (2, 3, 2), (N, 3, 2, 3), **REDUCE),
    "reduce_heads": case(heads_reduced),
}


# Embeddings.


def embedding(shape, vocabulary=6, features=3, tokens=None, **fields):
    module = nn.Embed(vocabulary, features, **DOUBLE)
    # The last token never occurs.
    x = np.random.default_rng(3).integers(0, vocabulary - 1, (N, *shape)) if tokens is None else tokens
    a = dk.one_hot(x, vocabulary).reshape(N, -1, vocabulary)
    return of_module(module, x, lambda g: dk.Rows(a, g.reshape(len(g), N, -1, features)), **fields)


REPEATED = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [2, 3, 4, 0], [3, 3, 2, 3], [0, 0, 4, 4]])
EMBEDDINGS = {
    "one_token": case(embedding, ()),
    "tokens": case(embedding, (4,)),
    "repeated": case(embedding, (4,), tokens=REPEATED),
    "two_axes": case(embedding, (2, 3)),
    "reduce": case(embedding, (4,), tokens=REPEATED, **REDUCE),
}
