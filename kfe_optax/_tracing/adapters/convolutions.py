"""The kinds of Flax's convolutions, Linen's and NNX's, whose modules have the same fields."""

from __future__ import annotations

from typing import Any

from flax.linen.linear import canonicalize_padding

from kfe_optax._layers.kinds.base import Kind
from kfe_optax._layers.kinds.conv import Conv
from kfe_optax._layers.kinds.conv_local import ConvLocal
from kfe_optax._layers.kinds.patches import Geometry


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _window(module: Any) -> tuple[int, ...]:
    return _tuple(module.kernel_size, 1)


def _padding(module: Any, rank: int) -> Any:
    padding = canonicalize_padding(module.padding, rank)
    return padding.upper() if isinstance(padding, str) else tuple((int(a), int(b)) for a, b in padding)


def _geometry(module: Any) -> Geometry:
    window = _window(module)
    rank = len(window)
    return Geometry(
        window,
        _tuple(module.strides, rank),
        _padding(module, rank),
        _tuple(module.input_dilation, rank),
        _tuple(module.kernel_dilation, rank),
    )


def conv(module: Any) -> Kind | str:
    """The kind of an `nn.Conv` or `nnx.Conv`, or why it has none."""
    if module.mask is not None:
        return "changed before the layer uses it (by the mask)"
    return Conv(geometry=_geometry(module), feature_groups=module.feature_group_count)


def conv_local(module: Any) -> Kind | str:
    """The kind of an `nn.ConvLocal`, or why it has none."""
    if module.mask is not None:
        return "changed before the layer uses it (by the mask)"
    return ConvLocal(geometry=_geometry(module))


def conv_transpose(module: Any) -> Kind | str:
    """The kind of a `ConvTranspose`: a convolution of the input with stride − 1 zeros in between; or why it has none."""
    if module.mask is not None:
        return "changed before the layer uses it (by the mask)"
    window = _window(module)
    rank = len(window)
    strides, dilation = _tuple(module.strides, rank), _tuple(module.kernel_dilation, rank)
    padding = _padding(module, rank)
    if padding == "CIRCULAR":
        return "a transposed convolution with circular padding, whose output is folded, has no patches"
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        padding = tuple(_transposed_pad(k, s, padding) for k, s in zip(reach, strides, strict=True))
    geometry = Geometry(window, (1,) * rank, padding, strides, dilation)
    return Conv(geometry=geometry, flipped=module.transpose_kernel)


def _transposed_pad(reach: int, stride: int, padding: str) -> tuple[int, int]:
    """Padding of the dilated input for which the output has length × stride ("SAME") or all positions ("VALID")."""
    if padding == "SAME":
        total = reach + stride - 2
        before = reach - 1 if stride > reach - 1 else -(-total // 2)
    else:
        total = reach + stride - 2 + max(reach - stride, 0)
        before = reach - 1
    return before, total - before
