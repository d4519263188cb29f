"""Norms, parameters that are used more than once, and masked rows, as branches (see `kind_networks`)."""

from __future__ import annotations

from functools import partial as case

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import kfe_optax as kfe

from . import dense_kinds as dk
from . import kind_cases as kc
from .kind_cases import DOUBLE, REDUCE, REPEATED
from .kind_networks import Branch, N, of_module, random

# Norms.


def norm(make, shape, reduced, axes=(-1,), parameters=("scale", "bias"), center=True, **fields):
    """A norm over the axes `reduced`, with parameters at `axes`."""
    module = make(
        use_scale="scale" in parameters, **DOUBLE, **({"use_bias": "bias" in parameters} if center else {})
    )
    x = kc.random(4, N, *shape) * 2 + 0.7
    x_hat = dk.normalized(x, reduced, module.epsilon, center)
    return of_module(module, x, lambda g: dk.Rows(*dk.norm_rows(x_hat, g, parameters, axes)), **fields)


def batch_norm(reduced, axis, train):
    module = nn.BatchNorm(use_running_average=not train, axis=axis, **DOUBLE)
    x = kc.random(4, N, 3, 4) * 2 + 0.7
    size = x.shape[axis]
    own = {"mean": random(5, size), "var": random(6, size) ** 2 + 0.5}
    at = [1, 1, 1]
    at[axis] = size
    moved = (x - own["mean"].reshape(at)) / np.sqrt(own["var"].reshape(at) + module.epsilon)
    x_hat = dk.normalized(x, reduced, module.epsilon) if train else moved

    def apply(params, x):
        return module.apply({"params": params, "batch_stats": own}, x, mutable=["batch_stats"])[0]

    params = {"scale": random(7, size), "bias": random(8, size)}
    rows = lambda g: dk.Rows(*dk.norm_rows(x_hat, g, ("scale", "bias"), (axis,)))
    return Branch(apply, params, x, rows, plain=not train)


def group_norm(groups):
    """Means over the positions and the channels of a group."""
    module = nn.GroupNorm(groups, **DOUBLE)
    x = kc.random(4, N, 3, 2, 6) * 2 + 0.7
    parts = np.split(x, groups, -1)
    x_hat = np.concatenate([dk.normalized(part, (1, 2, 3), module.epsilon) for part in parts], -1)
    return of_module(module, x, lambda g: dk.Rows(*dk.norm_rows(x_hat, g, ("scale", "bias"), (-1,))))


def zero_scale():
    plain = norm(nn.LayerNorm, (4,), -1)
    return Branch(plain.apply, plain.params | {"scale": np.zeros(4)}, plain.x, plain.rows)


def flat_norm():
    """Batch and time in one axis: an example's row is the sum of its parts."""
    plain = norm(nn.LayerNorm, (3, 4), -1)
    apply = lambda params, x: plain.apply(params, x.reshape(N * 3, 4)).reshape(N, 3, 4)
    return Branch(apply, plain.params, plain.x, plain.rows)


NORMS = {
    "batch_train": case(batch_norm, (0, 1), 2, True),
    "batch_eval": case(batch_norm, (0, 1), 2, False),
    "batch_first_axis": case(batch_norm, (0, 2), 1, True),
    "layer": case(norm, nn.LayerNorm, (2, 4), -1),
    "vector": case(norm, nn.LayerNorm, (4,), -1),
    "two_axes": case(norm, case(nn.LayerNorm, feature_axes=(-2, -1)), (2, 3, 4), -1, (-2, -1)),
    # Flax sorts the axes.
    "axes_in_another_order": case(norm, case(nn.LayerNorm, feature_axes=(-1, -2)), (2, 3, 4), -1, (-2, -1)),
    "separate_axes": case(
        norm, case(nn.LayerNorm, feature_axes=(1, -1), reduction_axes=(2, 3)), (3, 2, 4), (2, 3), (1, -1)
    ),
    "scale_only": case(norm, nn.LayerNorm, (3, 2), -1, parameters=("scale",)),
    "bias_only": case(norm, nn.LayerNorm, (3, 2), -1, parameters=("bias",)),
    "zero_scale": case(zero_scale),
    "diagonal": case(norm, nn.LayerNorm, (2, 3), -1, configure={"approximation": "diagonal"}),
    "flattened": case(flat_norm),
    "group": case(group_norm, 2),
    "instance": case(norm, nn.InstanceNorm, (4, 3), 1),
    "rms": case(norm, nn.RMSNorm, (2, 4), -1, parameters=("scale",), center=False),
    "rms_two_axes": case(
        norm,
        case(nn.RMSNorm, feature_axes=(-2, -1)),
        (2, 3),
        -1,
        (-2, -1),
        parameters=("scale",),
        center=False,
    ),
}


# Parameters that are used more than once.


def joined(values):
    return jnp.concatenate([v.reshape(v.shape[0], -1) for v in values], 1)


def apart(g, shapes):
    """g (c, n, all sizes) in the shapes (n, ...) of the uses."""
    sizes = np.cumsum([np.prod(shape[1:]) for shape in shapes])[:-1]
    return [part.reshape(len(g), *shape) for part, shape in zip(np.split(g, sizes, -1), shapes, strict=True)]


def several(*branches, **fields):
    """One layer in the place of several with the same parameters; the first one's other fields."""
    first = branches[0]
    shapes = [np.shape(b.apply(first.params, jnp.asarray(b.x))) for b in branches]

    def apply(params, xs):
        return joined([b.apply(params, x) for b, x in zip(branches, xs, strict=True)])

    def rows(g):
        return dk.merged([b.rows(part) for b, part in zip(branches, apart(g, shapes), strict=True)])

    fields = {name: getattr(first, name) for name in ("configure", "factors", "plain")} | fields
    return Branch(apply, first.params, [b.x for b in branches], rows, **fields)


def twice(make, *args, **options):
    """A layer called on two inputs."""
    return several(make(*args, **options), elsewhere(make, *args, **options))


def elsewhere(make, *args, **options):
    """The same branch with another input, and so with other rows."""
    with kc.other_inputs():
        return make(*args, **options)


def flattened():
    """Batch and time in one axis, before the layer."""
    plain = kc.general((4, 2), (3,), (-1,))
    apply = lambda params, x: plain.apply(params, x.reshape(N * 4, 2)).reshape(N, 4, 3)
    return Branch(apply, plain.params, plain.x, plain.rows)


def flattened_tokens():
    plain = kc.embedding((4,))
    apply = lambda params, x: plain.apply(params, x.reshape(N * 4)).reshape(N, 4, 3)
    return Branch(apply, plain.params, plain.x, plain.rows)


def sizes_differ():
    """A convolution on inputs of two lengths: A counts all positions alike."""
    return several(kc.conv((7,), (3,), strides=2), kc.conv((4,), (3,), strides=2))


def sua_twice(centered):
    first, second = kc.sua(centered, True), elsewhere(kc.sua, centered, True)
    expected = dk.sua(np.concatenate([first.x, second.x]), 4, True, centered)
    expected = expected if centered else expected[None, None]
    return several(first, second, factors=lambda own: (expected, own.expand()[1]))


def norm_twice():
    """Rows of the two calls add up before they are squared."""
    first, second = norm(nn.LayerNorm, (2, 4), -1), elsewhere(norm, nn.LayerNorm, (2, 4), -1)
    both = several(first, second)
    shape = first.x.shape

    def rows(g):
        own = [b.rows(part) for b, part in zip((first, second), apart(g, [shape] * 2), strict=True)]
        return dk.Rows(own[0].a, own[0].g + own[1].g)

    return Branch(both.apply, both.params, both.x, rows)


class Cell(nn.Module):
    """h ← tanh([h, x] W + b)."""

    @nn.compact
    def __call__(self, h, x):
        h = nn.tanh(nn.Dense(3, name="dense", **DOUBLE)(jnp.concatenate([h, x], -1)))
        return h, h


def recurrent(steps=4, **fields):
    """`nn.scan` over time; the rows by backpropagation through time."""
    x = random(11, N, steps, 2)
    over_time = nn.scan(
        Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
    )
    params = {"kernel": random(12, 5, 3) / 2, "bias": random(13, 3) / 2}

    def apply(params, x):
        return over_time().apply({"params": {"dense": params}}, jnp.zeros((N, 3)), x)[1]

    h, inputs = np.zeros((N, 3)), []
    for t in range(steps):
        inputs.append(dk.bordered(np.concatenate([h, x[:, t]], -1)))
        h = np.tanh(inputs[-1] @ np.concatenate([params["kernel"], params["bias"][None]]))
    later = [a[:, :3] for a in inputs[1:]] + [h]

    def rows(g):
        found, carried = [], 0
        for t in reversed(range(steps)):
            found.append((g[:, :, t] + carried) * (1 - later[t] ** 2))
            carried = found[-1] @ params["kernel"][:3].T
        return dk.Rows(np.stack(inputs, 1), np.stack(found[::-1], 2))

    return Branch(apply, params, x, rows, **fields)


def tokens_twice(**fields):
    first = kc.embedding((4,), tokens=REPEATED, **fields)
    return several(first, kc.embedding((2,), tokens=REPEATED[:, :2] % 2, **fields))


SHARED = {
    "conv": case(sizes_differ),
    "conv_without_bias": case(twice, kc.conv, (3, 4), (2, 2), use_bias=False),
    "feature_groups": case(twice, kc.conv, (4,), (2,), channels=2, features=4, feature_group_count=2),
    "transposed": case(twice, kc.conv, (3,), (2,), transposed=True, strides=2, transpose_kernel=True),
    "local": case(twice, kc.conv_local, True),
    "groups": case(twice, kc.input_groups, 2, True),
    "sua": case(sua_twice, True),
    "sua_uncentered": case(sua_twice, False),
    "conv_reduce": case(twice, kc.conv, (3, 4), (2, 2), **REDUCE),
    "dense": case(twice, kc.general, (4,), (3,), (-1,)),
    "two_axes": case(twice, kc.general, (2, 3, 4), (2, 3), (-2, -1)),
    "flattened": case(twice, flattened),
    "tokens_flattened": case(twice, flattened_tokens),
    "queries": case(twice, kc.heads, 1, 2, (3, 4), (2, 3), (-1,)),
    "projection": case(twice, kc.heads, 2, 1, (3, 2, 4), (3,), (-2, -1)),
    "blocks": case(twice, kc.einsum, "btkd,kde->btke", (2, 3, 4), (N, 3, 2, 3)),
    "blocks_reduce": case(twice, kc.einsum, "btkd,kde->btke", (2, 3, 2), (N, 3, 2, 3), **REDUCE),
    "recurrent": case(recurrent),
    "recurrent_reduce": case(recurrent, **REDUCE),
    "tokens": case(tokens_twice),
    "tokens_reduce": case(tokens_twice, **REDUCE),
}


# A norm keeps a row an example whatever its uses are.
NORMS["called_twice"] = case(norm_twice)


# Stacks of layers.


def stacked(make, *args, **options):
    """Two layers of one shape under a vmap over parameters and inputs."""
    members = [make(*args, **options), elsewhere(make, *args, **options)]
    first = members[0]

    def apply(params, x):
        return jnp.moveaxis(jax.vmap(first.apply)(params, x), 0, 1)

    def rows(g):
        own = [member.rows(g[:, :, i]) for i, member in enumerate(members)]
        return dk.Rows(np.stack([r.a for r in own]), np.stack([r.g for r in own]), own[0].live)

    def factors(own):
        each = [m.factors(dk.Rows(own.a[i], own.g[i], own.live)) for i, m in enumerate(members)]
        return tuple(np.stack(side) for side in zip(*each, strict=True))

    params = jax.tree.map(lambda *leaves: np.stack(leaves), *(m.params for m in members))
    x = jax.tree.map(lambda *leaves: np.stack(leaves), *(m.x for m in members))
    return Branch(apply, params, x, rows, first.configure, factors, first.plain)


# A convolution's members become feature groups, behind which a bias is a layer of its own; no local one: its patches flatten
# members and examples, members first, behind which no example is known.
STACKED = {
    "conv": case(stacked, kc.conv, (3, 2), (2, 2), use_bias=False),
    "reduce": case(stacked, kc.conv, (3, 4), (2, 2), use_bias=False, **REDUCE),
    "axes": case(stacked, kc.general, (2, 3, 4), (2, 3), (-2, -1)),
    "blocks": case(stacked, kc.einsum, "btkd,kde->btke", (2, 3, 4), (N, 3, 2, 3)),
    "tokens": case(stacked, kc.embedding, (4,)),
    "layer_norm": case(stacked, norm, nn.LayerNorm, (2, 4), -1),
    "twice": case(stacked, twice, kc.conv, (4,), (2,), use_bias=False),
    "tokens_twice": case(stacked, tokens_twice),
    "twice_reduce": case(stacked, twice, kc.general, (4, 2), (3,), (-1,), **REDUCE),
}


# Masked rows.

MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]], bool)


def masked(branch, mask, live=None):
    """A branch of which only some rows count: those of `live` (n, t)."""

    def apply(params, x):
        with kfe.row_mask(mask):
            return branch.apply(params, x)

    def rows(g):
        own = branch.rows(g)
        return dk.Rows(own.a, own.g, np.asarray(mask if live is None else live, float))

    return Branch(apply, branch.params, branch.x, rows, branch.configure, branch.factors, plain=False)


def made(make, *args, mask=MASK, live=None, **options):
    return masked(make(*args, **options), mask, live)


def both_masked(make, *args, **options):
    """Called twice, with two masks."""
    first, second = make(*args, **options), elsewhere(make, *args, **options)
    return several(masked(first, MASK), masked(second, ~MASK))


def masked_alike(make, *args, **options):
    """Called twice with one mask: an example may have no row at all."""
    first, second = make(*args, **options), elsewhere(make, *args, **options)
    return several(masked(first, MASK), masked(second, MASK))


def tokens_masked_twice(**fields):
    first = kc.embedding((4,), tokens=REPEATED, **fields)
    return several(masked(first, MASK), masked(kc.embedding((4,), tokens=REPEATED[::-1], **fields), ~MASK))


MASKED = {
    "positions": case(made, kc.general, (4, 2), (3,), (-1,)),
    "examples": case(made, kc.general, (2, 2), (3,), (-1,), mask=MASK[:, 1], live=MASK[:, [1, 1]]),
    "prefix": case(made, kc.general, (4, 2, 3), (2,), (-1,), live=np.repeat(MASK, 2, -1)),
    "pooled": case(made, kc.general, (3,), (2,), (-1,), live=MASK.any(-1)[:, None]),
    "flattened": case(made, flattened),
    "flattened_twice": case(both_masked, flattened),
    "blocks": case(made, kc.einsum, "btkd,kde->btke", (2, 3, 2), (N, 4, 2, 3)),
    "projection": case(made, kc.heads, 2, 1, (4, 2, 3), (2,), (-2, -1)),
    "conv": case(made, kc.conv, (4,), (3,)),
    "conv_stride": case(made, kc.conv, (8,), (3,), strides=2, channels=4, features=2, feature_group_count=2),
    "groups": case(made, kc.input_groups, 2, True),
    "tokens": case(made, kc.embedding, (4,), tokens=REPEATED),
    "reduce": case(made, kc.general, (4, 2), (3,), (-1,), **REDUCE),
    "conv_reduce": case(made, kc.conv, (4,), (3,), **REDUCE),
    "tokens_reduce": case(made, kc.embedding, (4,), tokens=REPEATED, **REDUCE),
    "conv_twice": case(both_masked, kc.conv, (4,), (3,)),
    "dense_twice": case(both_masked, kc.general, (4, 2), (3,), (-1,)),
    "dense_twice_reduce": case(both_masked, kc.general, (4, 2), (3,), (-1,), **REDUCE),
    "dense_alike_reduce": case(masked_alike, kc.general, (4, 2), (3,), (-1,), **REDUCE),
    "tokens_twice": case(tokens_masked_twice),
    "tokens_twice_reduce": case(tokens_masked_twice, **REDUCE),
    "stacked": case(made, stacked, kc.general, (4, 2), (3,), (-1,)),
    "all_dead": case(made, kc.general, (4, 2), (3,), (-1,), mask=np.zeros((N, 4), bool)),
}
