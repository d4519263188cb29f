"""Where every kind of convolution reads its input, against explicit loops and Flax itself."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from . import dense_kinds as dk
from .dense import assert_close

# name: (spatial shape, kernel_size, options); strides, dilations and padding as in Flax.
CONVOLUTIONS = {
    "same": ((6,), (3,), {}),
    "same, even kernel": ((6,), (4,), {}),
    "same lower": ((5,), (4,), {"padding": "SAME_LOWER", "strides": 2}),
    "same, stride": ((7,), (3,), {"strides": 2}),
    "same, stride larger than kernel": ((8,), (2,), {"strides": 3}),
    "valid": ((6,), (3,), {"padding": "VALID"}),
    "valid, stride larger than kernel": ((9,), (2,), {"padding": "VALID", "strides": 4}),
    "valid, a rest is left over": ((8,), (3,), {"padding": "VALID", "strides": 2}),
    "asymmetric": ((5,), (3,), {"padding": [(2, 0)]}),
    "one number of padding": ((5,), (2,), {"padding": 2}),
    "negative padding": ((7,), (2,), {"padding": [(-1, -2)]}),
    "negative padding of a dilated input": ((4,), (2,), {"padding": [(-2, -1)], "input_dilation": 2}),
    "causal": ((5,), (3,), {"padding": "CAUSAL"}),
    "causal, dilated": ((6,), (3,), {"padding": "CAUSAL", "kernel_dilation": 2, "strides": 2}),
    "circular": ((5,), (3,), {"padding": "CIRCULAR"}),
    "circular, even kernel, stride": ((6,), (4,), {"padding": "CIRCULAR", "strides": 2}),
    "circular, dilated": ((5,), (3,), {"padding": "CIRCULAR", "kernel_dilation": 2}),
    "circular, longer than the input": ((2,), (3,), {"padding": "CIRCULAR", "kernel_dilation": 3}),
    "reflect": ((5,), (4,), {"padding": "REFLECT"}),
    "reflect, dilated": ((6,), (3,), {"padding": "REFLECT", "kernel_dilation": 2, "strides": 2}),
    "kernel dilation": ((7,), (3,), {"kernel_dilation": 2}),
    "valid, kernel dilation, stride": ((9,), (3,), {"padding": "VALID", "kernel_dilation": 3, "strides": 2}),
    # JAX takes no names of paddings beside an input dilation.
    "input dilation": ((4,), (3,), {"padding": [(1, 1)], "input_dilation": 2}),
    "input dilation, stride": ((5,), (3,), {"padding": [(0, 2)], "input_dilation": 3, "strides": 2}),
    "both dilations": ((4,), (2,), {"padding": 0, "input_dilation": 3, "kernel_dilation": 2}),
    "pointwise": ((4,), (1,), {"strides": 2}),
    "whole input": ((4,), (4,), {"padding": "VALID"}),
    "two axes": ((5, 4), (3, 2), {}),
    "two axes, everything different": (
        (6, 5),
        (2, 3),
        {"strides": (2, 1), "kernel_dilation": (1, 2), "padding": [(1, 0), (2, 1)]},
    ),
    "two axes, input dilation": (
        (3, 4),
        (2, 3),
        {"input_dilation": (2, 1), "strides": (1, 3), "padding": [(0, 0), (1, 2)]},
    ),
    "two axes, circular": ((4, 3), (2, 3), {"padding": "CIRCULAR", "kernel_dilation": (2, 1)}),
    "two axes, long and thin": ((7, 1), (3, 1), {"padding": "VALID", "strides": (3, 1)}),
    "three axes": ((3, 4, 2), (2, 3, 1), {}),
    "three axes, everything different": (
        (4, 3, 3),
        (2, 2, 3),
        {"strides": (2, 1, 2), "kernel_dilation": (1, 2, 1), "padding": [(0, 1), (1, 1), (2, 0)]},
    ),
}
TRANSPOSED = {
    "same": ((4,), (3,), {"strides": 2}),
    "same, even kernel": ((3,), (4,), {"strides": 3}),
    "same, stride larger than kernel": ((3,), (2,), {"strides": 4}),
    "same, dilated": ((4,), (3,), {"strides": 2, "kernel_dilation": 2}),
    "valid": ((4,), (3,), {"strides": 2, "padding": "VALID"}),
    "valid, stride larger than kernel": ((3,), (2,), {"strides": 3, "padding": "VALID"}),
    "valid, dilated": ((3,), (2,), {"strides": 2, "padding": "VALID", "kernel_dilation": 3}),
    "explicit": ((4,), (3,), {"strides": 2, "padding": [(2, 1)]}),
    "no strides": ((4,), (3,), {}),
    "two axes": ((3, 2), (2, 3), {"strides": (2, 3), "kernel_dilation": (2, 1)}),
    "two axes, explicit": ((3, 2), (2, 3), {"strides": (1, 2), "padding": [(0, 2), (3, 1)]}),
    "three axes": ((2, 3, 2), (2, 1, 3), {"strides": (2, 1, 2), "padding": "VALID"}),
}


def tables(spatial, window, transposed=False, **options):
    """One table of sources a spatial axis."""
    per_axis = lambda value: value if isinstance(value, (tuple, list)) else [value] * len(spatial)
    options = {
        **options,
        "padding": [(p, p) if isinstance(p, int) else p for p in per_axis(options.get("padding", "SAME"))],
    }
    names = {"strides": "stride"}
    axes = [{names.get(k, k): per_axis(v)[i] for k, v in options.items()} for i in range(len(spatial))]
    table = dk.transposed_sources if transposed else dk.sources
    return [table(s, k, **axis) for s, k, axis in zip(spatial, window, axes, strict=True)]


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


CASES = {name: (*case[:2], False, case[2]) for name, case in CONVOLUTIONS.items()}
CASES |= {f"transposed, {name}": (*case[:2], True, case[2]) for name, case in TRANSPOSED.items()}
CASES |= {
    f"flipped, {name}": (*case[:2], True, {**case[2], "transpose_kernel": True})
    for name, case in TRANSPOSED.items()
}
WRAPPED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def as_given(x, module):
    """The input as the equation of the convolution has it, wrapped around before where Flax does so."""
    mode = WRAPPED.get(module.padding) if isinstance(module.padding, str) else None
    dilations = (
        module.kernel_dilation
        if isinstance(module.kernel_dilation, tuple)
        else [module.kernel_dilation or 1] * 9
    )
    reaches = [(k - 1) * d for k, d in zip(module.kernel_size, dilations, strict=False)]
    if mode:
        return np.pad(x, [(0, 0), *((r // 2, r - r // 2) for r in reaches), (0, 0)], mode=mode)
    return np.pad(x, [(0, 0), (reaches[0], 0), (0, 0)]) if module.padding == "CAUSAL" else x


@pytest.mark.parametrize("name", CASES)
def test_patches(name, x64):
    """The patches of the kind that is found are the loops', and these times the kernel are what Flax computes."""
    spatial, window, transposed, options = CASES[name]
    module = (nn.ConvTranspose if transposed else nn.Conv)(3, window, param_dtype=jnp.float64, **options)
    x = random(0, 2, *spatial, 2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = {name: random(1, *leaf.shape) for name, leaf in shapes.items()}

    def loss_fn(params, x):
        return kfe.losses.squared_error(module.apply({"params": params}, x)).sum((1, -1)).mean()

    (layer,) = kfe.find_layers(loss_fn, params, x).values()
    kind, given = layer.kind, as_given(x, module)
    patches, y = jax.jit(
        lambda x, given: (kind.geometry.patches(given), module.apply({"params": params}, x))
    )(x, given)
    own = {name: value for name, value in options.items() if name != "transpose_kernel"}
    expected = dk.patches(x, tables(spatial, window, transposed, **own))
    np.testing.assert_array_equal(patches, expected)
    rows = np.concatenate([expected.reshape(*expected.shape[:2], -1), np.ones((*expected.shape[:2], 1))], -1)
    assert_close(y, (rows @ layer.to_matrix(params)).reshape(y.shape), 1e-13)
    assert kind.geometry.output_shape(given.shape[1:-1]) == y.shape[1:-1]


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID", [(1, 1)]])
def test_images_of_another_size(padding, x64):
    """What was found on one size holds on another, with the approximations, and both may be in one loss."""
    module = nn.Conv(3, (3,), strides=2, padding=padding, param_dtype=jnp.float64)
    params = module.init(jax.random.key(0), jnp.ones((2, 9, 2)))["params"]

    def loss_fn(params, *inputs):
        outputs = (module.apply({"params": params}, x).mean(1) for x in inputs)
        return sum(kfe.losses.squared_error(y).sum(-1).mean() for y in outputs)

    (found,) = kfe.find_layers(loss_fn, params, random(0, 4, 9, 2))
    layers = kfe.find_layers(loss_fn, params, random(0, 4, 9, 2)).configure(approximation="sua")
    collect = jax.jit(kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical"))
    other = random(1, 4, 8, 2)
    _, _, taps = collect(params, other)
    again = kfe.find_layers(loss_fn, params, other).configure(approximation="sua")
    _, _, expected = jax.jit(kfe.value_grad_and_taps(loss_fn, again, fisher="empirical"))(params, other)
    assert_close(taps[found].covariances(), expected[found].covariances(), 1e-14)
    assert list(kfe.find_layers(loss_fn, params, random(0, 4, 9, 2), other)) == [found]
