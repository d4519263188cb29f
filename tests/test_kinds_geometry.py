"""Where every kind of convolution reads its input, against explicit loops and Flax itself."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfe_optax._tracing.adapters import convolutions

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


def compare(module, spatial, transposed, options):
    """Patches against the loops, and the loops' patches times the kernel against Flax."""
    window, channels = module.kernel_size, 2
    x = random(0, 2, *spatial, channels)
    own = tables(spatial, window, transposed, **options)
    expected = dk.patches(x, own)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(x))["params"]
    params = {name: random(1, *leaf.shape) for name, leaf in shapes.items()}
    kind = convolutions.conv_transpose(module) if transposed else convolutions.conv(module)
    patches, y = jax.jit(lambda x: (kind.geometry.patches(x), module.apply({"params": params}, x)))(x)
    kernel = params["kernel"]
    if kind.flipped:
        kernel = kernel[(slice(None, None, -1),) * len(window)].swapaxes(-1, -2)
    z = expected.reshape(*expected.shape[:2], -1) @ kernel.reshape(-1, module.features) + params["bias"]
    assert_close(y, z.reshape(y.shape), 1e-13)
    np.testing.assert_array_equal(patches, expected)
    assert kind.geometry.output_shape(spatial) == y.shape[1:-1]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_of_convolutions(name, x64):
    spatial, window, options = CONVOLUTIONS[name]
    module = nn.Conv(3, window, param_dtype=jnp.float64, **options)
    compare(module, spatial, False, options)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_patches_of_transposed_convolutions(name, flipped, x64):
    spatial, window, options = TRANSPOSED[name]
    module = nn.ConvTranspose(3, window, transpose_kernel=flipped, param_dtype=jnp.float64, **options)
    compare(module, spatial, True, options)
