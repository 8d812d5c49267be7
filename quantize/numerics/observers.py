"""Range observers: statistics of activations from one pass, in a few hundred kilobytes.

A static scale needs the range of every activation over the whole calibration set, which is too
large to keep. An observer counts |x| in a histogram, and keeps the largest |x| of each channel of
the last axis (SmoothQuant reads it). Everything else is computed from these afterwards.

**The bins are those of floating point itself.** The bits of positive float32 numbers, read as
integers, have the same order as the numbers, so bin = bits >> 15 cuts every octave into 256 equal
bins:

    sign 1 | exponent 8 | mantissa 23          bin = exponent and the first 8 mantissa bits

No range is chosen in advance, so no value ever lies outside it, and a bin is at most 0.4 % of its
value wide. Equal-width bins fail where it matters: one activation of 1000 above a body of σ = 1
leaves the body two bins out of 2048. Counts are integers on bins that never move, so merging
observers is addition: exact, in any order, and the same however the data was split (shards, a
resumed run). NaN and infinity have bins of their own after the finite ones, so that detecting them
costs nothing.

**From the histogram to the clip** c, beyond which values saturate (the scale is c / highest value
of the format). The density within a bin is assumed flat; given that, the rest is exact:

    max          c = max |x|.
    percentile   P(|x| ≤ c) = p.
    mse          minimises E (x − x̂)², rounding and clipping together: over the grid values gᵢ,
                 Σᵢ E (|x| − gᵢ)² on the cell [mᵢ, mᵢ₊₁] between midpoints that rounds to gᵢ,
                 the last cell being open. The grid is the format's own: uniform for int8,
                 E4M3's for fp8. Each term takes three moments of the histogram.
    entropy      minimises KL(P‖Q) = Σ p log(p/q), the criterion of TensorRT's former
                 calibrator, on 16 pieces of every cell. P is the distribution after clipping:
                 the mass beyond c is added to the last piece. Q is what the format keeps of it:
                 the mass below c, flat over the occupied pieces of each cell. Three things
                 differ from the original: the number of pieces per cell does not depend on c
                 (it was one at the smallest c, where Q equals P whatever was clipped), Q is not
                 scaled up to one (else a clip that keeps a single value would lose nothing),
                 and exact zeros are left out, since every clip represents them.

int8's −128 is left out of the grid, since |x| does not tell the sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from internvl_edge.errors import CalibrationError, UsageError
from internvl_edge.quantize.numerics.formats import Format, as_format, grid, scale_of
from internvl_edge.quantize.numerics.threads import each
from internvl_edge.types import Array

Floats = NDArray[np.float64]
RangeMethod = Literal["max", "percentile", "mse", "entropy"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("max", "percentile", "mse", "entropy")

_SHIFT = 15  # of 23 mantissa bits, 8 belong to the bin
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = 0x7F80_0000  # the bits of infinity; those of every NaN lie above
NUM_BINS = _INFINITY >> _SHIFT
_CHUNK = 1 << 17  # elements; a chunk and the occupied bins fit the cache
_PART = 1 << 22  # elements given to one thread at a time
_PIECES = 16  # of a cell, for the entropy
_OCTAVES, _PER_OCTAVE = 14, 8  # of the coarse search for a clip, downwards from max |x|


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """Counts of |x|: ``counts[i]`` values in [edges[i], edges[i + 1])."""

    edges: Floats  # (bins + 1,), ascending
    counts: NDArray[np.int64]  # (bins,)
    absmax: float


class RangeObserver:
    """The statistics of one activation that its static range is computed from."""

    def __init__(self, name: str = "activation") -> None:
        self.name = name  # for error messages
        self._counts: NDArray[np.int64] = np.zeros(NUM_BINS, np.int64)
        self._channels: NDArray[np.uint32] | None = None  # bits of each channel's largest |x|

    @property
    def num_values(self) -> int:
        """The number of values seen."""
        return int(self._counts.sum())

    @property
    def channel_absmax(self) -> NDArray[np.float32]:
        """The largest |x| of each index of the last axis."""
        if self._channels is None:
            raise CalibrationError(f"{self.name}: no activation was observed")
        return self._channels.view(np.float32).copy()

    @property
    def absmax(self) -> float:
        """The largest |x|."""
        return float(self.channel_absmax.max())

    def update(self, array: Array) -> None:
        """Count activations of any float type and shape, channels last.

        Raises:
            CalibrationError: there is NaN or infinity among them, or the number of channels
                differs from before; the observer is then unchanged.
        """
        if array.size == 0:
            return
        rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
        step = max(_PART // rows.shape[1], 1)
        for counts, channels in each(
            self._counted, [rows[start : start + step] for start in range(0, len(rows), step)]
        ):
            self._add(counts, channels)

    def _counted(self, rows: Array) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Count the values in each bin, and find the bits of each channel's largest |x|."""
        channels = np.zeros(rows.shape[1], np.uint32)
        counts = np.zeros(NUM_BINS, np.int64)
        step = max(_CHUNK // rows.shape[1], 1)
        # Reused: temporaries of this size would be returned to the system after every chunk.
        bits = np.empty((min(step, len(rows)), rows.shape[1]), np.uint32)
        bins = np.empty(bits.size, np.intp)
        for start in range(0, len(rows), step):
            with np.errstate(over="ignore"):  # what overflows float32 is refused as infinity
                values = np.ascontiguousarray(rows[start : start + step], np.float32)
            chunk, index = bits[: len(values)], bins[: values.size]
            np.bitwise_and(values.view(np.uint32), _MAGNITUDE, out=chunk)
            np.maximum(channels, chunk.max(axis=0), out=channels)
            if channels.max() >= _INFINITY:
                raise CalibrationError(
                    f"{self.name}: expected finite activations, found NaN or infinity (channel "
                    f"{int(channels.argmax())}); is the checkpoint sound?"
                )
            np.right_shift(chunk.reshape(-1), _SHIFT, out=index)
            counts += np.bincount(index, minlength=NUM_BINS)
        return counts, channels

    def merge(self, other: RangeObserver) -> None:
        """Add everything that ``other`` saw."""
        if other._channels is not None:
            self._add(other._counts, other._channels)

    def state(self) -> dict[str, Array]:
        """Return the state as arrays for ``np.savez``; :meth:`from_state` is the inverse."""
        bins = np.flatnonzero(self._counts).astype(np.uint32)
        channels = np.zeros(0, np.uint32) if self._channels is None else self._channels.copy()
        return {
            "bins": bins,
            "counts": self._counts[bins],
            "channel_absmax": channels.view(np.float32),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array], name: str = "activation") -> RangeObserver:
        """Restore the observer that ``state`` was taken from.

        Raises:
            CalibrationError: the arrays are not those of an observer.
        """
        observer = cls(name)
        try:
            bins, counts = state["bins"], state["counts"]
            channels = np.ascontiguousarray(state["channel_absmax"], np.float32)
            observer._counts[bins] = counts
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise CalibrationError(f"{name}: not the state of an observer: {error}") from error
        sound = bins.shape == counts.shape and (counts > 0).all() and np.isfinite(channels).all()
        if not sound or (channels < 0).any() or bool(bins.size) != bool(channels.size):
            raise CalibrationError(f"{name}: the state's counts and maxima do not fit together")
        observer._channels = channels.view(np.uint32).copy() if channels.size else None
        return observer

    def histogram(self) -> Histogram:
        """Return the occupied part of the histogram, with the bins' edges as values.

        Raises:
            CalibrationError: nothing was observed.
        """
        absmax = self.absmax  # first, since it refuses an observer that saw nothing
        used = np.flatnonzero(self._counts)
        first, last = int(used[0]), int(used[-1])
        bits = np.arange(first, last + 2, dtype=np.uint32) << np.uint32(_SHIFT)
        edges = bits.view(np.float32).astype(np.float64)
        edges[-1] = min(edges[-1], 2.0**128)  # where the last finite bin ends
        return Histogram(edges=edges, counts=self._counts[first : last + 1].copy(), absmax=absmax)

    def clip(self, method: RangeMethod, fmt: Format | str, percentile: float = 99.99) -> float:
        """Return the magnitude at which values saturate: at most max |x|, 0 if all were zero."""
        if method not in RANGE_METHODS:
            raise UsageError(
                f"range method: expected one of {', '.join(RANGE_METHODS)}, found {method!r}"
            )
        histogram = self.histogram()
        if method == "max" or histogram.absmax == 0.0:
            return histogram.absmax
        if method == "percentile":
            return percentile_clip(histogram, percentile)
        return (mse_clip if method == "mse" else entropy_clip)(histogram, fmt)

    def scale(self, method: RangeMethod, fmt: Format | str, percentile: float = 99.99) -> float:
        """Return the scale of the activation's Q/DQ pair, a float32 number."""
        return float(scale_of(self.clip(method, fmt, percentile), fmt))

    def _add(self, counts: NDArray[np.int64], channels: NDArray[np.uint32]) -> None:
        if self._channels is None:
            self._channels = np.zeros_like(channels)
        if self._channels.shape != channels.shape:
            raise CalibrationError(
                f"{self.name}: expected {self._channels.size} channels in the last axis as "
                f"before, found {channels.size}"
            )
        np.maximum(self._channels, channels, out=self._channels)
        self._counts += counts


def percentile_clip(histogram: Histogram, percentile: float) -> float:
    """Return the magnitude that ``percentile`` percent of the values do not exceed.

    Raises:
        UsageError: the percentile is not in (0, 100].
    """
    if not 0.0 < percentile <= 100.0:
        raise UsageError(f"percentile: expected above 0 and at most 100, found {percentile}")
    if percentile == 100.0:
        return histogram.absmax
    below = np.cumsum(histogram.counts)
    wanted = percentile / 100.0 * float(below[-1])
    i = int(np.searchsorted(below, wanted))
    inside = (wanted - float(below[i] - histogram.counts[i])) / float(histogram.counts[i])
    low, high = histogram.edges[i], histogram.edges[i + 1]
    return min(float(low + inside * (high - low)), histogram.absmax)


def mse_clip(histogram: Histogram, fmt: Format | str) -> float:
    """Return the clip with the least mean squared error."""
    return _least(lambda clips: squared_error(histogram, clips, fmt), histogram.absmax)


def entropy_clip(histogram: Histogram, fmt: Format | str) -> float:
    """Return the clip that loses the least information, in the sense of KL(P‖Q)."""
    return _least(lambda clips: divergence(histogram, clips, fmt), histogram.absmax)


def squared_error(histogram: Histogram, clips: ArrayLike, fmt: Format | str) -> Floats:
    """Return the mean of (|x| − |x̂|)² when values saturate at each of ``clips``, in their shape."""
    levels, boundaries = _cells(clips, fmt, end=histogram.edges[-1])
    zeroth, first, second = (np.diff(m) for m in _moments(histogram, boundaries))
    error = (second - 2.0 * levels * first + levels**2 * zeroth).sum(axis=-1)
    return np.asarray(error / histogram.counts.sum())


def divergence(histogram: Histogram, clips: ArrayLike, fmt: Format | str) -> Floats:
    """Return KL(P‖Q) in nats when values saturate at each of ``clips``, in their shape."""
    first = 1 if histogram.edges[0] == 0.0 else 0  # zero is represented exactly at every clip
    nonzero = replace(histogram, edges=histogram.edges[first:], counts=histogram.counts[first:])
    total = float(nonzero.counts.sum())
    clips = np.asarray(clips, np.float64)
    if total == 0.0:
        return np.full(clips.shape, np.inf)
    _, boundaries = _cells(clips, fmt, end=clips)
    low, high = boundaries[..., :-1, None], boundaries[..., 1:, None]
    points = low + (high - low) * np.linspace(0.0, 1.0, _PIECES + 1)  # (…, cells, pieces + 1)
    p = np.diff(_moments(nonzero, points)[0]) / total
    occupied = p > 0.0
    q = p.sum(axis=-1, keepdims=True) / np.maximum(occupied.sum(axis=-1, keepdims=True), 1)
    q = np.broadcast_to(q, p.shape).reshape(*clips.shape, -1)
    p, occupied = p.reshape(q.shape), occupied.reshape(q.shape)
    # The clipped mass goes onto the last occupied piece: Q has no mass on an empty one.
    last = q.shape[-1] - 1 - np.argmax(occupied[..., ::-1], axis=-1)
    clipped = 1.0 - p.sum(axis=-1)
    p = p + clipped[..., None] * (np.arange(q.shape[-1]) == last[..., None])
    ratio = np.divide(p, q, out=np.ones_like(p), where=occupied)
    return np.where(occupied.any(axis=-1), (p * np.log(ratio)).sum(axis=-1), np.inf)


def _cells(clips: ArrayLike, fmt: Format | str, end: ArrayLike) -> tuple[Floats, Floats]:
    """Return the format's magnitudes at each clip (…, n), and their cells' ends (…, n + 1)."""
    fmt = as_format(fmt)
    clips = np.asarray(clips, np.float64)[..., None]
    levels = grid(fmt) * (clips / fmt.max_value)
    ends = np.broadcast_to(np.asarray(end, np.float64)[..., None], clips.shape)
    midpoints = (levels[..., :-1] + levels[..., 1:]) / 2.0
    return levels, np.concatenate((np.zeros_like(clips), midpoints, ends), axis=-1)


def _moments(histogram: Histogram, points: Floats) -> tuple[Floats, Floats, Floats]:
    """Return Σ 1, Σ |x| and Σ |x|² over the values below each point; density is flat per bin."""
    edges, density = histogram.edges, histogram.counts / np.diff(histogram.edges)
    t = np.clip(points, edges[0], edges[-1])
    bins = np.minimum(np.searchsorted(edges, t, side="right") - 1, len(density) - 1)
    results = []
    for power in (1, 2, 3):
        antiderivative = edges**power / power
        whole = np.concatenate(([0.0], np.cumsum(density * np.diff(antiderivative))))
        piece = density[bins] * (t**power / power - antiderivative[bins])
        results.append(np.asarray(whole[bins] + piece))
    return results[0], results[1], results[2]


def _least(loss: Callable[[Floats], Floats], absmax: float) -> float:
    """Find the clip with the least loss: on a geometric grid below ``absmax``, then a finer one."""
    coarse = absmax * np.exp2(-np.arange(_OCTAVES * _PER_OCTAVE + 1) / _PER_OCTAVE)
    best = coarse[np.argmin(loss(coarse))]
    around = best * np.exp2(np.linspace(-1.0, 1.0, 2 * _PER_OCTAVE + 1) / _PER_OCTAVE)
    fine = np.minimum(around, absmax)
    return float(fine[np.argmin(loss(fine))])
