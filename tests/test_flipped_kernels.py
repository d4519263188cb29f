"""Convolutions with their kernels flipped: what reverse mode inside the loss makes of them, and layers of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import kfe_optax as kfe

from .dense import assert_close
from .methods import quick
from .problems import assert_gradients_and_rows
from .test_tracing_merging import matrix

N, SIDE, C, H = 5, 5, 2, 3


def conv(x, kernel, numbers=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **dilations):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, **dilations)


def slope(energy, x):
    return jax.grad(lambda x: energy(x).sum())(x)


class Critic(nn.Module):
    strides: int
    padding: str

    @nn.compact
    def __call__(self, x):
        dtypes = {"param_dtype": x.dtype}
        h = jnp.tanh(nn.Conv(H, (3, 3), self.strides, padding=self.padding, name="c", **dtypes)(x))
        return nn.Dense(1, name="o", **dtypes)(h.reshape(len(h), -1))


def flax(strides, padding):
    model = Critic(strides, padding)

    def init(x):
        return model.init(jax.random.key(0), x)["params"]

    return init, lambda p, x: model.apply({"params": p}, x)


def plain(kernel, **options):
    def hidden(p, x):
        return jnp.tanh(conv(x, p["c"]["kernel"], **options) + p["c"]["bias"]).reshape(len(x), -1)

    def init(x):
        c = {"kernel": matrix(1, *kernel), "bias": matrix(2, H)}
        return {"c": c, "o": {"kernel": matrix(3, hidden({"c": c}, x).shape[1], 1)}}

    return init, lambda p, x: hidden(p, x) @ p["o"]["kernel"]


CRITICS = {
    "SAME": plain((3, 3, C, H)),
    "strides and padding": plain((3, 2, C, H), strides=(2, 1), padding=((1, 0), (2, 1))),
    "dilations": plain((2, 2, C, H), rhs_dilation=(2, 1), lhs_dilation=(1, 2), padding=((0, 1), (0, 0))),
    "a kernel (out, in, height, width)": plain(
        (H, C, 3, 3), numbers=("NHWC", "OIHW", "NHWC"), strides=(2, 2)
    ),
    "a window of one": plain((1, 1, C, H)),
    "Flax, with strides": flax(2, "SAME"),
}


@pytest.mark.parametrize(
    "name", quick("SAME", "strides and padding", "dilations", "Flax, with strides", of=CRITICS)
)
def test_a_gradient_penalty(name, x64):
    """Gradients are JAX's, and Σ_t ā gᵀ over both kinds of uses is the gradient of each example."""
    (init, apply), x = CRITICS[name], matrix(0, N, SIDE, SIDE, C)
    params = jax.jit(init)(x)

    def loss_fn(params, x):
        penalty = kfe.losses.squared_error(slope(lambda x: apply(params, x), x), jnp.ones_like(x))
        return kfe.losses.squared_error(apply(params, x)).mean() + penalty.sum((1, 2, 3)).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert set(layers) == {"c", "o"} and not layers.rest
    assert [use[4] for use in layers["c"].uses] == ["", "transposed"]
    assert_gradients_and_rows(loss_fn, layers, params, x)


def test_factors_of_both_kinds_of_uses(x64):
    """Of the transposed use the patches of ∂L/∂u stand in the place of ā, and v in that of g; one product keeps the trace."""
    (_, apply), x = CRITICS["SAME"], matrix(0, N, SIDE, SIDE, C)
    params = jax.jit(CRITICS["SAME"][0])(x)

    def loss_fn(params, x):
        penalty = kfe.losses.squared_error(slope(lambda x: apply(params, x), x)).sum((1, 2, 3)).mean()
        return penalty + kfe.losses.squared_error(apply(params, x)).mean()

    layers = kfe.find_layers(loss_fn, params, x)

    @jax.jit
    def found(params, x):
        taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, x)[2]
        return kfe.factors.estimate(kfe.factors.kfac(), taps)["c"]

    ((a, g),) = found(params, x)
    assert_close((a, g), factors_by_hand(params, x), 1e-10)


@jax.jit
def factors_by_hand(params, x):
    kernel, weights = params["c"]["kernel"], params["o"]["kernel"]

    def by_hand(added):
        h = jnp.tanh(conv(x, kernel) + params["c"]["bias"] + added["z"])
        v = (1 - h**2) * weights[:, 0].reshape(h.shape[1:])
        u = conv(v, jnp.flip(kernel, (0, 1)).swapaxes(2, 3)) + added["u"]
        return jnp.concatenate([u.reshape(N, -1), h.reshape(N, -1) @ weights], 1), v

    added = {"z": jnp.zeros((N, SIDE, SIDE, H)), "u": jnp.zeros_like(x)}
    # √2 ∂(each output)/∂(the product), (outputs, N, ...): −log p of each output has the second derivative 2.
    columns = jax.tree.map(
        lambda part: jnp.sqrt(2) * jnp.einsum("no...->on...", jnp.einsum("non...->no...", part)),
        jax.jacobian(lambda added: by_hand(added)[0])(added),
    )

    def patches(image):
        image = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [image[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)]
        return jnp.concatenate(windows, -1).reshape(-1, 9 * C)

    def gram(rows, count):
        rows = rows.reshape(-1, rows.shape[-1])
        return rows.T @ rows / count

    positions = N * SIDE**2
    ones = jnp.ones((positions, 1))
    first = gram(jnp.concatenate([patches(x), ones], 1), positions), gram(columns["z"], N)
    turned = jnp.concatenate([patches(column) for column in columns["u"]])
    turned = jnp.pad(turned, ((0, 0), (0, 1)))
    second = gram(turned, N), gram(by_hand(added)[1], positions)
    pairs = first, second
    sigma = sum(jnp.trace(a) * jnp.trace(g) for a, g in pairs)
    return sum(jnp.trace(g) * a for a, g in pairs) / sigma, sum(jnp.trace(a) * g for a, g in pairs)


def alone(p, x):
    """A decoder's layer as `nn.ConvTranspose(transpose_kernel=True)` computes it."""
    kernel, padding = jnp.flip(p["c"], (0, 1)), ((1, 2), (1, 2))
    return conv(x, kernel, ("NHWC", "HWOI", "NHWC"), padding=padding, lhs_dilation=(2, 2)) + p["b"]


def half(p, x):
    return conv(x, jnp.flip(p["c"], 0), numbers=("NHWC", "HWOI", "NHWC")) + p["b"]


@pytest.mark.parametrize(
    ("apply", "shapes", "reason"),
    [
        (alone, {"c": (3 * 3 * C + 1, H)}, None),
        (half, {"b": (H, 1, 1)}, "rev, then conv_general_dilated at test_flipped_kernels.py:"),
    ],
)
def test_a_layer_whose_kernel_is_flipped(apply, shapes, reason, x64):
    params = {"c": matrix(1, 3, 3, H, C), "b": matrix(2, H), "o": matrix(3, H, 1)}
    x = matrix(0, N, SIDE, SIDE, C)

    def loss_fn(params, x):
        return kfe.losses.squared_error(jnp.tanh(apply(params, x)).mean((1, 2)) @ params["o"]).mean()

    layers = kfe.find_layers(loss_fn, params, x)
    assert {name: layer.shape for name, layer in layers.items()} == {**shapes, "o": (H, 1)}
    assert all(reason in why for path, why in zip(layers.rest, layers.reasons, strict=True) if "c" in path)
    assert_gradients_and_rows(loss_fn, layers, params, x)
    if reason is None:
        matrices = layers["c"].to_matrix(params)
        assert_close(layers["c"].from_matrix(matrices)[("c",)], params["c"], 1e-10)


def test_what_transposed_uses_know_nothing_of(x64):
    (init, apply), x = CRITICS["SAME"], matrix(0, N, SIDE, SIDE, C)

    def loss_fn(params, x):
        return kfe.losses.squared_error(slope(lambda x: apply(params, x), x)).mean()

    layers = kfe.find_layers(loss_fn, init(x), x)
    with pytest.raises(ValueError, match="exchanged, of which approximation='sua'"):
        layers.configure("c", approximation="sua")
