"""Weight-only quantization: blocks of INT4, and factors that protect the columns that matter.

Decoding one token reads every weight once and computes little with it, so its time is set by the
bytes of the weights. Weight-only formats store W in 8 or 4 bits and compute in floats: x is not
rounded.

**Blocks.** 4 bits have 15 levels, too few for a whole output channel. Each run of B inputs of an
output has a scale of its own, s = max|w| / 7 over the block,

    q = clip(rint(w / s), −8, 7)        ŵ = q · s        W (N, K) → q (K, N), s (K / B, N)

which costs 32 / B more bits per weight. B is 128; where the layer's number of inputs is no
multiple of 128, it is the largest power of two, at least 16, that divides it, and else that number
itself: kernels do not support incomplete blocks. Two values share a byte, the first of a pair (row
by row of q) in its low half, as ONNX packs INT4.

**Factors** (AWQ; Lin et al., 2023). A few channels of x are large, and errors of the columns that
read them dominate the output. If a column is multiplied by a factor above 1 before rounding, its
relative rounding error shrinks, as long as another column holds its block's maximum; the inverse
factor goes into the layer that produces x (``calibration.block``), where that is exact. The
factors are

    sⱼ = (mean |xⱼ|)^α        scaled to a geometric mean of one

with the α in 0, 0.1 … 1 that gives the least output error ‖X (Ŵ / s)ᵀ − X Wᵀ‖² on samples of X and
W. α = 0, which changes nothing, is among them, and is used where there are too few rows to choose.
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
_ROWS = 256  # of a weight at a time: temporaries stay small


def block_of(inputs: int, wanted: int) -> int:
    """Return the block size of a layer with so many inputs: ``wanted``, or the next that fits."""
    size = wanted
    while size >= MIN_BLOCK:
        if inputs % size == 0:
            return size
        size //= 2
    return inputs


def quantize_blocks(weight: Array, block: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize a weight to INT4 in blocks.

    Args:
        weight: (N, K), finite.
        block: number of inputs that share a scale; divides K.

    Returns:
        q (N, K), −8 … 7, and scales (N, K / block).
    """
    outputs, inputs = weight.shape
    values = np.empty((outputs, inputs), np.int8)
    scales = np.empty((outputs, inputs // block), np.float32)
    for start in range(0, outputs, _ROWS):
        rows = slice(start, start + _ROWS)
        blocks = np.asarray(weight[rows], np.float32).reshape(-1, block)
        scale = formats.weight_scale(blocks, formats.INT4, 0)
        values[rows] = formats.quantize(blocks, scale, formats.INT4, 0).reshape(-1, inputs)
        scales[rows] = scale.reshape(-1, inputs // block)
    return values, scales


def dequantize_blocks(values: Array, scales: Array) -> NDArray[np.float32]:
    """Return the weight (N, K) that values (N, K) and scales (N, K / block) represent."""
    outputs, count = scales.shape
    blocks = values.reshape(outputs, count, -1).astype(np.float32)
    weight: NDArray[np.float32] = (blocks * scales[..., None]).reshape(values.shape)
    return weight


def pack(values: Array) -> NDArray[np.uint8]:
    """Pack INT4 values two to a byte, the first in the low half; an odd last one is alone."""
    flat = values.reshape(-1).astype(np.uint8) & 0xF
    flat = np.pad(flat, (0, flat.size % 2))
    return np.asarray(flat[::2] | (flat[1::2] << 4), np.uint8)


def unpack(packed: Array, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Unpack values into a shape; the inverse of :func:`pack`."""
    halves = np.stack((packed & 0xF, packed >> 4), axis=1).reshape(-1)[: int(np.prod(shape))]
    values: NDArray[np.int8] = ((halves ^ 8).astype(np.int8) - 8).reshape(shape)
    return values


def rounded(weight: Array, fmt: str, block: int) -> NDArray[np.float32]:
    """Return a weight (N, K) after rounding to INT4 in blocks, or to INT8 per output."""
    if fmt == "int4":
        return dequantize_blocks(*quantize_blocks(weight, block))
    return formats.fake_quantize(weight, formats.weight_scale(weight, fmt, 0), fmt, 0)


def best_factors(
    samples: Sequence[Array], weight: Array, turn: Callable[[Array], Array], fmt: str, block: int
) -> NDArray[np.float32]:
    """Return AWQ's factors at the alpha with the least output error.

    Args:
        samples: rows (rows, channels) of the activation, per stream.
        weight: some outputs of all its readers, (outputs, channels).
        turn: an orthogonal map of rows, applied after the factors on both sides.
        fmt: format of the weight.
        block: its block size, where the format has blocks.

    Returns:
        s (channels,), by which x is divided.
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
    """Return size^alpha scaled to geometric mean one; 1 for a channel of size zero."""
    live = size > 0
    factors = np.ones(size.shape, np.float32)
    if live.any():
        log = alpha * np.log(size[live])
        bound = np.log(MAX_FACTOR)
        factors[live] = np.exp(np.clip(log - log.mean(), -bound, bound))
    return factors
