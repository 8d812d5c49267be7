"""Resizing as Pillow does, also of a part: what a crop keeps, without the rest.

A picture of 1 x 5000 has its shorter side brought to S before its middle is cropped: at S 224 it
would be 224 x 1,120,000. Where so much would be made to be thrown away, the rows and columns that
stay are computed alone, in Pillow's own arithmetic: two passes, columns first (as Pillow does where
the height does not shrink), each with

    y = (Σ x · k + 2²¹) >> 22, cut to 0 … 255       k = w · 2²² to the nearest integer

and w the bicubic kernel (a = −0.5) at the distance from the middle of the pixel, stretched where
the picture shrinks, and divided by its sum.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.types import Array

__all__ = ["cropped", "resized"]

WHOLE_RESIZED = 50_000_000  # pixels; more of them are not made to be cropped
PRECISION = 22  # bits of a weight after the point
SUPPORT = 2.0  # of the kernel, in pixels
SHARPNESS = -0.5  # a


def resized(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Resize by Pillow's antialiased bicubic filter."""
    return image.resize(shape, Image.Resampling.BICUBIC)


def cropped(
    image: Image.Image, shape: tuple[int, int], box: tuple[int, int, int, int]
) -> Image.Image:
    """Resize to ``shape`` and crop to ``box`` (left, top, right, bottom); equal to doing both."""
    if math.prod(shape) <= WHOLE_RESIZED or shape[1] < image.height:  # or less than there is
        return resized(image, shape).crop(box)
    return resized_part(image, shape, box)


def resized_part(
    image: Image.Image, shape: tuple[int, int], box: tuple[int, int, int, int]
) -> Image.Image:
    """Compute what ``resized(image, shape).crop(box)`` gives where the height does not shrink."""
    left, top, right, bottom = box
    columns = _weights(image.width, shape[0], left, right)
    rows = _weights(image.height, shape[1], top, bottom)
    first_row, last_row = _span(rows)
    first, last = _span(columns)
    part = image.crop((first, first_row, last, last_row))
    levels = np.asarray(part).astype(np.int64)  # (H, W, 3)
    if image.width != shape[0]:
        levels = _pass(levels, columns, first, axis=1)
    else:
        levels = levels[:, left - first : right - first]
    if image.height != shape[1]:
        levels = _pass(levels, rows, first_row, axis=0)
    else:
        levels = levels[top - first_row : bottom - first_row]
    return Image.fromarray(levels.astype(np.uint8))


def _weights(size: int, new: int, start: int, stop: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Compute the weights of pixels start…stop of a side: the first one's place, and all."""
    scale = size / new
    stretch = max(scale, 1.0)
    reach = SUPPORT * stretch
    result = []
    for at in range(start, stop):
        centre = (at + 0.5) * scale
        low = max(int(centre - reach + 0.5), 0)
        high = min(int(centre + reach + 0.5), size)
        weights = _kernel((np.arange(low, high) - centre + 0.5) * (1.0 / stretch))
        total = weights.sum()
        fractions = (weights / total if total else weights) * (1 << PRECISION)
        result.append((low, np.trunc(fractions + np.copysign(0.5, fractions)).astype(np.int64)))
    return result


def _kernel(distance: Array) -> Array:
    x, a = np.abs(distance), SHARPNESS
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _span(weights: list[tuple[int, NDArray[np.int64]]]) -> tuple[int, int]:
    return min(low for low, _ in weights), max(low + len(some) for low, some in weights)


def _pass(
    levels: Array, weights: list[tuple[int, NDArray[np.int64]]], first: int, axis: int
) -> Array:
    """Filter along one axis of (H, W, 3); ``first`` is the place of its first pixel."""
    moved = np.moveaxis(levels, axis, 0)
    sums = np.stack(
        [
            np.tensordot(some, moved[low - first : low - first + len(some)], 1)
            for low, some in weights
        ]
    )
    values = (sums + (1 << (PRECISION - 1))) >> PRECISION
    return np.moveaxis(values.clip(0, 255), 0, axis)
