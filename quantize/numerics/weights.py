"""A linear layer's weight as it is stored: INT8 or FP8 per output, or INT4 in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize.numerics import formats, int4
from internvl_edge.quantize.numerics.gptq import Factor, improved
from internvl_edge.quantize.numerics.statistics import BEST_DB, decibels, weight_squares
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

Layout = tuple[np.dtype[Any], tuple[int, ...]]
ROWS = 256  # of a weight at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear layer's weight in 8 or 4 bits."""

    values: Array  # (K, N) int8 or float8_e4m3fn; for int4 (K · N / 2,) uint8, packed
    scales: Array  # (N,) float32; for int4 (K / block, N)
    sqnr_db: float  # compared with the original weight


def quantize_weight(
    weight: Array, name: str, recipe: Recipe, factor: Factor | None = None
) -> QuantizedWeight:
    """Quantize a weight (N, K) to the format of a recipe.

    Args:
        weight: finite.
        name: name of its layer.
        recipe: says the format, granularity and block size.
        factor: GPTQ's factor of the layer's input; None rounds to nearest.

    Raises:
        CalibrationError: it holds NaN or infinity.
    """
    if not (np.isfinite(weight.min()) and np.isfinite(weight.max())):  # NaN is its own extreme
        raise CalibrationError(f"{name}.weight holds NaN or infinity")
    if recipe.weights == "int4":
        block = int4.block_of(weight.shape[1], recipe.block_size)
        values, scales = int4.quantize_blocks(weight, block)
        if factor is not None:
            values = improved(weight, values, scales, recipe.weights, factor)
        sqnr = formats.sqnr_db(weight, int4.dequantize_blocks(values, scales))
        packed = int4.pack(np.ascontiguousarray(values.T))
        per_block = np.ascontiguousarray(scales.T)
        return QuantizedWeight(values=packed, scales=per_block, sqnr_db=min(sqnr, BEST_DB))
    scales = formats.weight_scale(weight, recipe.weights, axis=0)
    if recipe.granularity == "per-tensor":
        scales[:] = scales.max()
    chosen: Array | None = None  # by GPTQ; else row by row
    if factor is not None:
        nearest = formats.quantize(weight, scales, recipe.weights, axis=0)
        chosen = improved(weight, nearest, scales, recipe.weights, factor)
    stored = np.empty(weight.shape[::-1], formats.FORMATS[recipe.weights].dtype)
    signal = noise = 0.0
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        w, s = weight[rows], scales[rows]
        some = formats.quantize(w, s, recipe.weights, axis=0) if chosen is None else chosen[rows]
        stored[:, rows] = _transposed(some)
        squares = weight_squares(w, some, s)
        signal, noise = signal + squares[0], noise + squares[1]
    return QuantizedWeight(values=stored, scales=scales, sqnr_db=decibels(signal, noise))


def _transposed(values: Array) -> Array:
    """Transpose (N, K) bytes to contiguous (K, N); PyTorch goes tile by tile, NumPy does not."""
    rows = torch.from_numpy(values.view(np.uint8))
    return rows.T.contiguous().numpy().view(values.dtype)


def stored_layout(shape: tuple[int, int], recipe: Recipe) -> tuple[Layout, Layout]:
    """Return dtype and shape of the stored values, and of the scales, of a weight (N, K)."""
    outputs, inputs = shape
    wide = np.dtype(np.float32)
    if recipe.weights == "int4":
        count = inputs // int4.block_of(inputs, recipe.block_size)
        packed = -(-inputs * outputs // 2)
        return (np.dtype(np.uint8), (packed,)), (wide, (count, outputs))
    return (formats.FORMATS[recipe.weights].dtype, (inputs, outputs)), (wide, (outputs,))
