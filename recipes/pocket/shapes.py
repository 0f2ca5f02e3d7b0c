"""Eight flat shapes as signed distance functions, drawn with analytic anti-aliasing.

Every function takes coordinates `x` (right) and `y` (down), in units of the shape's radius and
with the shape at the origin, and returns the signed distance to its outline (negative inside).
The formulas follow Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIDE = 64
"""Pixels a side of every picture."""


def _box(x: Array, y: Array, half_x: float, half_y: float) -> Array:
    dx, dy = np.abs(x) - half_x, np.abs(y) - half_y
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.74, 0.74) - 0.1


def diamond(x: Array, y: Array) -> Array:
    half_x, half_y = 0.82, 1.1
    return (
        (np.abs(x) / half_x + np.abs(y) / half_y - 1) * half_x * half_y / np.hypot(half_x, half_y)
    )


def triangle(x: Array, y: Array) -> Array:
    half, root3 = 1.0, np.sqrt(3.0)
    x, y = np.abs(x) - half, half / root3 - (y - 0.2)
    fold = x + root3 * y > 0
    x, y = np.where(fold, (x - root3 * y) / 2, x), np.where(fold, (-root3 * x - y) / 2, y)
    x = x - np.clip(x, -2 * half, 0)
    return -np.hypot(x, y) * np.sign(y)


def star(x: Array, y: Array) -> Array:
    radius, inner = 1.1, 0.45
    k1x, k1y, k2x, k2y = 0.809016994, -0.587785252, -0.809016994, -0.587785252
    x, y = np.abs(x), -(y - 0.06)
    for kx, ky in ((k1x, k1y), (k2x, k2y)):
        along = 2 * np.maximum(kx * x + ky * y, 0)
        x, y = x - along * kx, y - along * ky
    x, y = np.abs(x), y - radius
    ax, ay = inner * -k1y, inner * k1x - 1
    h = np.clip((x * ax + y * ay) / (ax * ax + ay * ay), 0, radius)
    return np.hypot(x - ax * h, y - ay * h) * np.sign(y * ax - x * ay)


def heart(x: Array, y: Array) -> Array:
    scale = 1.75
    x, y = np.abs(x) / scale, 0.56 - y / scale
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    low = 0.5 * np.maximum(x + y, 0)
    point = np.minimum(np.hypot(x, y - 1), np.hypot(x - low, y - low)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, point) * scale


def ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.74) - 0.26


def cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.98, 0.32), _box(x, y, 0.32, 0.98))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "ring": ring,
    "diamond": diamond,
    "cross": cross,
}


def coverage(shape: str, x_px: Array, y_px: Array, radius_px: Array) -> Array:
    """How much of each pixel the shape covers, 0 to 1: (N,), (N,), (N,) -> (N, SIDE, SIDE)."""
    axis = np.arange(SIDE, dtype=np.float32) + 0.5
    radius = np.asarray(radius_px, np.float32)[:, None, None]
    x = (axis[None, None, :] - np.asarray(x_px, np.float32)[:, None, None]) / radius
    y = (axis[None, :, None] - np.asarray(y_px, np.float32)[:, None, None]) / radius
    x, y = np.broadcast_arrays(x, y)
    return np.clip(0.5 - SHAPES[shape](x, y) * radius, 0, 1).astype(np.float32)


@cache
def unit_moments(shape: str) -> tuple[float, float, float]:
    """The area of the shape of radius 1, and its centroid (x, y) from the shape's origin."""
    radius = 24.0
    middle = np.array([SIDE / 2], np.float32)
    mask = coverage(shape, middle, middle, np.array([radius], np.float32))[0]
    axis = np.arange(SIDE) + 0.5 - SIDE / 2
    area = float(mask.sum())
    return (
        area / radius**2,
        float((mask.sum(0) * axis).sum()) / area / radius,
        float((mask.sum(1) * axis).sum()) / area / radius,
    )
