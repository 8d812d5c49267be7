"""Weights alone in few bits: blocks of INT4, and factors that spare the columns that matter.

Decoding one token reads every weight once and computes little with it, so its time is the bytes of
the weights. Weight-only formats store W in 8 or 4 bits and compute in floats: x is not rounded.

**Blocks.** 4 bits have 15 levels, too few for a whole output channel. Each run of B inputs of an
output has a scale of its own, s = max|w| / 7 over the block,

    q = clip(rint(w / s), −8, 7)        ŵ = q · s        W (N, K) → q (K, N), s (K / B, N)

which costs 32 / B bits per weight more. B is 128, or where the layer's inputs are no multiple of
128, the largest power of two down to 16 that divides them, or else all of them: kernels know no
incomplete block. Two values share a byte, the first of a pair (row by row of q) in its low half,
as ONNX packs INT4.

**Factors** (AWQ; Lin et al., 2023). A few channels of x are large, and errors of the columns that
read them dominate the output. Multiplied by a factor above 1 before rounding, a column's rounding
error relative to it shrinks as long as its block's maximum stays another's; the factor's inverse
goes into what made x (``calibrate``), where that is exact. The factors are

    sⱼ = (mean |xⱼ|)^α        scaled to a geometric mean of one

with the α in 0, 0.1 … 1 of the least output error ‖X (Ŵ / s)ᵀ − X Wᵀ‖² on samples of X and W. α = 0
changes nothing and is among them. Too few rows choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.numerics.output_error import ENOUGH_ROWS, product
from internvl_edge.quantize.numerics.smooth import MAX_FACTOR
from internvl_edge.types import Array

MIN_BLOCK = 16  # of ONNX Runtime's kernels
ALPHAS = tuple(i / 10 for i in range(11))
_ROWS = 256  # of a weight at once: temporaries stay small


def block_of(inputs: int, wanted: int) -> int:
    """The block size of a layer with so many inputs: ``wanted``, or the next that fits."""
    size = wanted
    while size >= MIN_BLOCK:
        if inputs % size == 0:
            return size
        size //= 2
    return inputs


def quantize_blocks(weight: Array, block: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """INT4 values and scales of a weight.

    Args:
        weight: (N, K), finite.
        block: inputs that share a scale; divides K.

    Returns:
        q (N, K), −8 … 7, and scales (N, K / block).
    """
    outputs, inputs = weight.shape
    values = np.empty((outputs, inputs), np.int8)
    scales = np.empty((outputs, inputs // block), np.float32)
    for start in range(0, outputs, _ROWS):
        rows = slice(start, start + _ROWS)
        blocks = np.asarray(weight[rows], np.float32).reshape(-1, block)
        found = formats.weight_scale(blocks, formats.INT4, 0)
        values[rows] = formats.quantize(blocks, found, formats.INT4, 0).reshape(-1, inputs)
        scales[rows] = found.reshape(-1, inputs // block)
    return values, scales


def dequantize_blocks(values: Array, scales: Array) -> NDArray[np.float32]:
    """The weight (N, K) that values (N, K) and scales (N, K / block) stand for."""
    outputs, count = scales.shape
    blocks = values.reshape(outputs, count, -1).astype(np.float32)
    weight: NDArray[np.float32] = (blocks * scales[..., None]).reshape(values.shape)
    return weight


def pack(values: Array) -> NDArray[np.uint8]:
    """INT4 values two to a byte, the first in the low half; an odd last one is alone."""
    flat = values.reshape(-1).astype(np.uint8) & 0xF
    flat = np.pad(flat, (0, flat.size % 2))
    return np.asarray(flat[::2] | (flat[1::2] << 4), np.uint8)


def unpack(packed: Array, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The inverse of :func:`pack`."""
    halves = np.stack((packed & 0xF, packed >> 4), axis=1).reshape(-1)[: int(np.prod(shape))]
    values: NDArray[np.int8] = ((halves ^ 8).astype(np.int8) - 8).reshape(shape)
    return values


def rounded(weight: Array, fmt: str, block: int) -> NDArray[np.float32]:
    """What is left of a weight (N, K) behind INT4 in blocks, or INT8 per output."""
    if fmt == "int4":
        return dequantize_blocks(*quantize_blocks(weight, block))
    return formats.fake_quantize(weight, formats.weight_scale(weight, fmt, 0), fmt, 0)


def best_factors(
    samples: Sequence[Array], weight: Array, turn: Callable[[Array], Array], fmt: str, block: int
) -> NDArray[np.float32]:
    """AWQ's factors at the alpha of the least output error.

    Args:
        samples: rows (rows, channels) of the activation, per stream.
        weight: some outputs of all its readers, (outputs, channels).
        turn: an orthogonal map of rows that follows the factors on both sides.
        fmt: of the weight.
        block: its block size, where the format has blocks.

    Returns:
        s (channels,), that x is divided by.
    """
    rows = np.concatenate(samples)
    none = np.ones(weight.shape[1], np.float32)
    if len(rows) < ENOUGH_ROWS:
        return none
    exact = product(rows, weight)
    size = np.abs(rows).mean(axis=0, dtype=np.float64)

    def error(factors: Array) -> float:
        rough = rounded(turn(weight * factors), fmt, block)
        return float((product(turn(rows / factors), rough) - exact).square().sum())

    return min((_factors(size, alpha) for alpha in ALPHAS), key=error)


def _factors(size: Array, alpha: float) -> NDArray[np.float32]:
    """size^alpha of geometric mean one; 1 where nothing is known of a channel."""
    live = size > 0
    factors = np.ones(size.shape, np.float32)
    if live.any():
        log = alpha * np.log(size[live])
        bound = np.log(MAX_FACTOR)
        factors[live] = np.exp(np.clip(log - log.mean(), -bound, bound))
    return factors
