"""INT8, INT4 and FP8 in numpy: what a stored byte means, and how a number is rounded to one.

Quantization is symmetric, without a zero point. A tensor or a channel shares one scale s > 0:

    q = cast(clip(x / s, lowest, highest))        quantize
    x̂ = q · s                                     dequantize

    format   values                                        lowest   highest   s for a range a
    int8     the integers                                   -128       127         a / 127
    int4     the integers                                     -8         7         a / 7
    fp8      E4M3FN: 4 exponent and 3 mantissa bits,        -448       448         a / 448
             no infinities, subnormals down to 2⁻⁹

Everything is computed in float32: the quotient is a division (multiplying by 1/s differs in the
last bit and moves values across a tie), ties go to the even neighbour (`rint`, and the IEEE
rounding of the FP8 cast), and values outside the range saturate. This is bit-exact with ONNX's
QuantizeLinear (saturate=1) and DequantizeLinear, so a weight stored in 8 bits equals one that a
graph would quantize itself.

int8 uses -128 although no scale is chosen for it: the range is solved for ±127 s, and a value at
-127.6 s is closer to -128 s than to -127 s.

Clipping precedes the FP8 cast because E4M3FN has no infinity: the cast alone would turn 465 into
NaN. A finite number therefore never becomes NaN. NaN and infinity themselves are refused with the
tensor's name (`require_finite`) where numbers enter: weights of a checkpoint, activations during
calibration.

A scale and its reciprocal are always normal float32 numbers, because kernels flush denormals to
zero and multiply by 1/s. The floor 2⁻¹²⁶ applies to channels that are zero or denormal; zero
quantizes to zero at any scale, so a dead channel dequantizes to exactly zero.

Scales are numbers that bfloat16 holds, stored in float32: graphs have them in both types
(``graph.qdq``), and a value is rounded by the very scale that it is multiplied by. That moves the
end of a range by 0.4 % at most, half an int8 step. float16 would not do: the scale of a
channel whose weights stay below 0.0078 is denormal in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from internvl_edge.errors import CalibrationError, InputError, UsageError, VerificationError
from internvl_edge.types import Array

MIN_SCALE = float(np.finfo(np.float32).tiny)  # 2⁻¹²⁶
_CHUNK = 1 << 18  # elements per step where a copy in a wider type is made


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A number format that values are quantized to."""

    name: str  # as in recipes and manifests
    lowest: float
    max_value: float  # the value that the end of the range maps to
    dtype: np.dtype[Any]
    onnx_type: str  # a member of TensorProto.DataType


INT8 = Format(
    name="int8", lowest=-128.0, max_value=127.0, dtype=np.dtype(np.int8), onnx_type="INT8"
)
FP8 = Format(
    name="fp8",
    lowest=-448.0,
    max_value=448.0,
    dtype=np.dtype(ml_dtypes.float8_e4m3fn),
    onnx_type="FLOAT8E4M3FN",
)
# The grid of int8 for a range that begins at zero: 255 steps, which a shift makes symmetric.
SHIFTED_INT8 = Format(
    name="shifted int8",
    lowest=0.0,
    max_value=255.0,
    dtype=np.dtype(np.uint8),
    onnx_type="UINT8",
)
# For weights only; one value per byte here, two per byte where they are stored (``int4.pack``).
INT4 = Format(name="int4", lowest=-8.0, max_value=7.0, dtype=np.dtype(np.int8), onnx_type="INT4")
FORMATS = {fmt.name: fmt for fmt in (INT8, FP8)}  # for weights and activations
WEIGHT_FORMATS = FORMATS | {INT4.name: INT4}


def as_format(fmt: Format | str) -> Format:
    """Return the format called ``fmt``; a format is returned as it is.

    Raises:
        UsageError: there is no format of that name.
    """
    if isinstance(fmt, Format):
        return fmt
    if fmt not in WEIGHT_FORMATS:
        raise UsageError(f"expected one of the formats {', '.join(WEIGHT_FORMATS)}, found {fmt!r}")
    return WEIGHT_FORMATS[fmt]


def quantize(x: Array, scale: ArrayLike, fmt: Format | str, axis: int | None = None) -> Array:
    """Quantize ``x``: divide by the scale, clip, and round to the format.

    Args:
        x: finite values of any float type; computed in float32.
        scale: one positive scale or, with ``axis``, one per index of that axis.
        fmt: the format to store, or its name.
        axis: the axis of the channels; None for one scale per tensor.

    Returns:
        An array of ``fmt.dtype``, shaped as ``x``.
    """
    fmt = as_format(fmt)
    x = np.asarray(x)
    divisor = np.broadcast_to(_broadcast(scale, x.ndim, axis), x.shape)
    result = np.empty(x.shape, fmt.dtype)
    for block in _blocks(x.shape):
        with np.errstate(over="ignore"):  # an overflowing quotient saturates like any other
            q = np.asarray(np.divide(np.asarray(x[block], np.float32), divisor[block]))
        if fmt.dtype == np.int8:
            np.rint(q, out=q)
        result[block] = np.clip(q, fmt.lowest, fmt.max_value, out=q).astype(fmt.dtype)
    return result


def dequantize(q: Array, scale: ArrayLike, axis: int | None = None) -> NDArray[np.float32]:
    """Return the float32 values that ``q`` represents."""
    values = q.astype(np.float32)
    np.multiply(values, _broadcast(scale, q.ndim, axis), out=values)
    return values


def fake_quantize(
    x: Array, scale: ArrayLike, fmt: Format | str, axis: int | None = None
) -> NDArray[np.float32]:
    """Return ``x`` after a QuantizeLinear followed by a DequantizeLinear."""
    return dequantize(quantize(x, scale, fmt, axis), scale, axis)


def scale_of(absmax: ArrayLike, fmt: Format | str) -> NDArray[np.float32]:
    """Return the scale that maps the range ±``absmax`` onto the format; never a denormal."""
    highest = np.float32(as_format(fmt).max_value)
    scale = np.asarray(absmax, np.float32) / highest
    rounded = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    # A scale that was rounded up would dequantize the largest float32 to infinity.
    ceiling = _bfloat16_below(np.finfo(np.float32).max / highest)
    return np.asarray(np.clip(rounded, np.float32(MIN_SCALE), ceiling), np.float32)


def _bfloat16_below(x: np.float32) -> np.float32:
    """Return the largest bfloat16 below ``x``, positive and normal."""
    bits = (np.nextafter(x, np.float32(0.0)).view(np.uint32) >> 16) << 16
    return np.float32(bits.view(np.float32))


def weight_scale(w: Array, fmt: Format | str, axis: int | None) -> NDArray[np.float32]:
    """Return a weight's scales, which map each channel's largest magnitude to the format's end.

    Args:
        w: finite weights.
        fmt: the format they will be stored in.
        axis: the output channels' axis, or None for one scale for the whole weight.

    Returns:
        float32, one scale per channel (w.shape[axis],), or of shape () without an axis.
    """
    if axis is None:
        return scale_of(_absmax(w, None), fmt)
    channel = axis % w.ndim
    others = tuple(i for i in range(w.ndim) if i != channel)
    return scale_of(_absmax(w, others), fmt)


def grid(fmt: Format | str) -> NDArray[np.float64]:
    """Return the non-negative values of the format at scale 1, ascending: 0 … ``max_value``."""
    # Bytes 0 … 126 of E4M3FN are its non-negative finite values in order; 0 … 127 those of int8.
    fmt = as_format(fmt)
    last = 126 if fmt is FP8 else int(fmt.max_value)
    return np.arange(last + 1, dtype=np.uint8).view(fmt.dtype).astype(np.float64)


def require_finite(x: Array, name: str, error: type[InputError] = CalibrationError) -> None:
    """Refuse NaN and infinities.

    Raises:
        error: with the tensor's name, how many there are and the index of the first.
    """
    finite = np.isfinite(x)
    if finite.all():
        return
    first = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise error(
        f"{name}: expected finite values, found {int((~finite).sum())} NaN or infinite of "
        f"{x.size}, the first at {first}"
    )


def sqnr_db(reference: Array, approximation: Array) -> float:
    """Return signal to quantization noise in dB: 10 log₁₀(Σ r² / Σ (r − a)²), summed in float64.

    It is infinite where the two are equal, and minus infinity where the reference is zero and the
    approximation is not.

    Raises:
        VerificationError: the shapes differ.
    """
    if reference.shape != approximation.shape:
        raise VerificationError(
            f"expected an approximation of shape {reference.shape}, found {approximation.shape}"
        )
    signal = noise = 0.0
    for r, a in zip(_chunks(reference), _chunks(approximation), strict=True):
        signal += float(np.vdot(r, r))
        r -= a
        noise += float(np.vdot(r, r))
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _absmax(w: Array, axes: tuple[int, ...] | None) -> Array:
    # Two reductions instead of one over |w|, which would copy a weight of hundreds of megabytes.
    if w.size == 0:
        return np.zeros([n for i, n in enumerate(w.shape) if axes and i not in axes], np.float32)
    high, low = (np.asarray(f(w, axis=axes), np.float32) for f in (np.max, np.min))
    return np.asarray(np.maximum(np.abs(high), np.abs(low)))


def _broadcast(scale: ArrayLike, ndim: int, axis: int | None) -> NDArray[np.float32]:
    """Reshape a scale to broadcast along ``axis`` of an array of ``ndim`` dimensions."""
    value = np.asarray(scale, np.float32)
    if axis is None:
        return value.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return value.reshape(shape)


def _blocks(shape: tuple[int, ...]) -> Iterator[slice | EllipsisType]:
    """Yield slices of rows of a large array, so that temporaries stay small."""
    if not shape:
        yield ...
        return
    step = max(_CHUNK // max(math.prod(shape[1:]), 1), 1)
    yield from (slice(start, start + step) for start in range(0, shape[0], step))


def _chunks(x: Array) -> Iterator[NDArray[np.float64]]:
    flat = x.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK].astype(np.float64)
