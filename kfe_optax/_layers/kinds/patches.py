"""The patches of a convolution, by slicing: window, stride, padding and both dilations, in any number of dimensions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How the window of a convolution moves over its input.

    Attributes:
      window: the kernel's spatial shape; the other fields have as many entries.
      strides, input_dilation, kernel_dilation: as in `jax.lax.conv_general_dilated`.
      padding: (before, after) pairs; "SAME" or "SAME_LOWER" for uses on inputs of several sizes.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | Pairs
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    def __post_init__(self):
        lengths = {len(v) for v in (self.strides, self.input_dilation, self.kernel_dilation)}
        if lengths != {len(self.window)}:
            raise ValueError(f"a window of {len(self.window)} dimensions needs as many strides and dilations")

    def named(self, name: str) -> Geometry:
        """The same with the padding of this name, which strides make depend on the input's size."""
        return dataclasses.replace(self, padding=name)

    @property
    def _reach(self) -> tuple[int, ...]:
        return tuple((k - 1) * d + 1 for k, d in zip(self.window, self.kernel_dilation, strict=True))

    def pads(self, spatial: tuple[int, ...]) -> Pairs:
        """(before, after) of every spatial axis of the dilated input."""
        if not isinstance(self.padding, str):
            return self.padding
        return tuple(jax.lax.padtype_to_pads(spatial, self._reach, self.strides, self.padding))

    def output_shape(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial shape of the output for an input of this spatial shape."""
        dilated = [(s - 1) * d + 1 if s else 0 for s, d in zip(spatial, self.input_dilation, strict=True)]
        padded = [s + sum(pad) for s, pad in zip(dilated, self.pads(spatial), strict=True)]
        return tuple(
            (s - reach) // stride + 1
            for s, reach, stride in zip(padded, self._reach, self.strides, strict=True)
        )

    def transposed(self, spatial: tuple[int, ...], outputs: tuple[int, ...]) -> Geometry:
        """Of the convolution with the flipped kernel that takes cotangents of the output to those of the input.

        `spatial` and `outputs` are the spatial shapes of input and output.
        """
        pads = []
        for axis, (before, _) in enumerate(self.pads(spatial)):
            whole = (spatial[axis] - 1) * self.input_dilation[axis] + self._reach[axis]
            first = self._reach[axis] - 1 - before
            pads.append((first, whole - (outputs[axis] - 1) * self.strides[axis] - 1 - first))
        return Geometry(self.window, self.input_dilation, tuple(pads), self.strides, self.kernel_dilation)

    def patches(self, x: jax.Array) -> jax.Array:
        """(m, *spatial, c) → (m, T, K, c): for each of T output positions the K inputs under the window, row-major in both."""
        spatial, channels = x.shape[1:-1], x.shape[-1]
        outputs = self.output_shape(spatial)
        x = self._padded(x)
        for axis, count in enumerate(outputs):
            # Axis by axis, so that there are as many slices as the window's sides have together, not as it has elements. An
            # axis that is done has become two: the positions, and the offsets in the window.
            place, dilation, stride = 1 + 2 * axis, self.kernel_dilation[axis], self.strides[axis]
            slices = [
                jax.lax.slice_in_dim(x, k * dilation, k * dilation + (count - 1) * stride + 1, stride, place)
                for k in range(self.window[axis])
            ]
            x = jnp.stack(slices, place + 1)
        rank = len(spatial)
        x = x.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
        return x.reshape(x.shape[0], math.prod(outputs), math.prod(self.window), channels)

    def _padded(self, x: jax.Array) -> jax.Array:
        pads: Any = self.pads(x.shape[1:-1])
        inner = [d - 1 for d in self.input_dilation]
        config = [(0, 0, 0), *((*pad, i) for pad, i in zip(pads, inner, strict=True)), (0, 0, 0)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), config)
