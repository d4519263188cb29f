"""The CURVES data: images of smooth curves through three random points.

A stand-in for the synthetic set of Hinton and Salakhutdinov (2006), whose six degrees of freedom
(three points in the plane) are what the six units of the usual code layer have to find.
"""

from __future__ import annotations

import numpy as np

SIDE = 28

# Points of a curve that are drawn. The longest curves measure about 60 pixels, so neighbors are at
# most two thirds of a pixel apart, less than the stroke's width: no beads.
_SAMPLES = 96

# The standard deviation of the stroke's Gaussian cross-section, in pixels.
_STROKE = 0.7

# Control points and curves keep this distance from the border, in pixels.
_MARGIN = 2.0


def curve_images(count: int, seed: int) -> np.ndarray:
    """Draws ``count`` curves as rows of 784 pixels in [0, 1]; the same seed gives the same images.

    Example::

        images = curve_images(20_000, seed=0)           # (20000, 784) float32
    """
    generator = np.random.default_rng(seed)
    images = np.empty((count, SIDE * SIDE), np.float32)
    filled = 0
    while filled < count:
        # Blocks of a fixed size bound the memory, and make image i independent of ``count``.
        points = _curve_points(generator.uniform(_MARGIN, SIDE - 1 - _MARGIN, (2048, 3, 2)))
        # A parabola through three points inside the image may leave it; such curves are redrawn.
        inside = ((points > _MARGIN / 2) & (points < SIDE - 1 - _MARGIN / 2)).all(axis=(1, 2))
        block = _draw(points[inside].astype(np.float32))[: count - filled]
        images[filled : filled + len(block)] = block
        filled += len(block)
    return images


def _curve_points(control: np.ndarray) -> np.ndarray:
    """Points (n, samples, 2) on the parabolas through the control points (n, 3, 2), in order.

    The middle point is passed at a time proportional to its distance from the first, which keeps
    the curve from swinging far outside when the three points are unevenly spaced.
    """
    first = np.linalg.norm(control[:, 1] - control[:, 0], axis=1)
    second = np.linalg.norm(control[:, 2] - control[:, 1], axis=1)
    middle = (first / (first + second))[:, None]  # (n, 1), in (0, 1)
    time = np.linspace(0.0, 1.0, _SAMPLES)[None, :]
    # Lagrange's basis for the times 0, middle and 1.
    weights = np.stack(
        [
            (time - middle) * (time - 1.0) / middle,
            time * (time - 1.0) / (middle * (middle - 1.0)),
            time * (time - middle) / (1.0 - middle),
        ],
        axis=2,
    )
    return weights @ control


def _draw(points: np.ndarray) -> np.ndarray:
    """Antialiased strokes along the points (n, samples, 2), as (n, 784).

    The image is the integral along the curve of a two-dimensional Gaussian, scaled to 1 on a
    straight stroke. A Gaussian is a product of its two axes, so that the integral over all samples
    is one small matrix product an image.
    """
    steps = np.linalg.norm(np.diff(points, axis=1), axis=2)
    # The trapezoidal rule: every sample stands for half of the two steps beside it.
    lengths = 0.5 * (np.pad(steps, ((0, 0), (1, 0))) + np.pad(steps, ((0, 0), (0, 1))))
    grid = np.arange(SIDE, dtype=np.float32)
    profile = np.exp(-0.5 * ((points[:, :, :, None] - grid) / _STROKE) ** 2)  # (n, samples, 2, 28)
    weighted = profile[:, :, 1] * (lengths / (_STROKE * np.sqrt(2 * np.pi)))[:, :, None]
    images = np.swapaxes(weighted, 1, 2) @ profile[:, :, 0]
    # Where a curve turns back on itself the strokes add up.
    return np.minimum(images, 1.0).reshape(len(points), SIDE * SIDE).astype(np.float32)
