"""Choices compared by the error of a linear layer's output, on a sample of rows.

A range or a smoothing factor is good if X̂ Ŵᵀ stays near X Wᵀ, not if X̂ stays near X: errors in
channels whose weights are small cost nothing, and moving range from X into W makes W's error
larger. So choices are compared by

    ‖X̂ Ŵᵀ − X Wᵀ‖²        X some rows of the activation, W some outputs of its readers

with both sides rounded as they will be. A few hundred rows on either side can distinguish choices
that differ by a few percent, and cost a thousandth of the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.quantize.numerics import formats, smooth
from internvl_edge.quantize.numerics.observers import RangeObserver
from internvl_edge.quantize.numerics.threads import each
from internvl_edge.types import Array

Range = tuple[float, float]  # scale, shift
SAMPLE_ROWS = 256  # of activations, per stream, and of weights
ENOUGH_ROWS = 128  # with fewer, a choice made on them need not hold for other rows
ALPHAS = (0.35, 0.5, 0.65, 0.8)
# Smoothing is chosen if the error falls to this fraction: it puts every channel's largest value
# seen at the end of the range, so that more of the values not seen will saturate.
WORTHWHILE = 0.9
# The same for a clip, compared with a range that holds everything seen, and for factors after
# GELU: 3 dB.
WORTH_HALVING = 0.5
SPREAD_OCTAVES = 8  # how far below the largest channel limits are tried
SPREAD_LEAST = 3  # octaves from the largest channel to half the median one, else no outlier


@dataclass(slots=True)
class RowSample:
    """Rows sampled evenly from an activation; at least ``SAMPLE_ROWS`` if there are so many."""

    rows: list[Array] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def update(self, values: Array) -> None:
        """Sample from further activations (rows, channels)."""
        first = -self._seen % self._stride
        self.rows.extend(np.array(row, np.float32) for row in values[first :: self._stride])
        self._seen += len(values)
        while len(self.rows) >= 2 * SAMPLE_ROWS:
            self.rows = self.rows[::2]
            self._stride *= 2


def sample_weights(weights: Sequence[Array]) -> NDArray[np.float32]:
    """Sample outputs evenly from weights (outputs, channels): (≤ 2 · SAMPLE_ROWS, channels)."""
    step = max(sum(len(w) for w in weights) // SAMPLE_ROWS, 1)
    return np.concatenate([w[::step] for w in weights]).astype(np.float32)


def output_error(x: Array, w: Array, scale: float, fmt: str, shift: float = 0.0) -> float:
    """Compute ‖X̂ Ŵᵀ − X Wᵀ‖² for one scale of X and a scale per output of W.

    Args:
        x: activations (rows, channels).
        w: weights (outputs, channels).
        scale: scale of x.
        fmt: format of both.
        shift: subtracted from x before it is rounded, and added back afterwards.
    """
    return _error(product(x, w), x, _rounded(w, fmt), scale, shift, fmt)


def _error(exact: Tensor, x: Array, rough: Array, scale: float, shift: float, fmt: str) -> float:
    fine = formats.fake_quantize(x - np.float32(shift), scale, fmt) + np.float32(shift)
    return float((product(fine, rough) - exact).square().sum())


def product(x: Array, w: Array) -> Tensor:
    """Compute X Wᵀ in float32."""
    a, b = (torch.from_numpy(np.asarray(values, np.float32)) for values in (x, w))
    return a @ b.T


def _rounded(w: Array, fmt: str) -> Array:
    return formats.fake_quantize(w, formats.weight_scale(w, fmt, 0), fmt, 0)


def best_factors(
    samples: Sequence[Array],
    peaks: Array,
    columns: Array,
    w: Array,
    turn: Callable[[Array], Array],
    fmt: str,
) -> NDArray[np.float32]:
    """Return SmoothQuant's factors at the alpha with the least output error; ones if none pays.

    Args:
        samples: rows of the activation, per stream; with too few of them the result is ones.
        peaks: largest |x| of each channel over everything seen, (channels,).
        columns: largest |w| of each channel over all outputs, (channels,).
        w: from :func:`sample_weights`.
        turn: an orthogonal map of rows, applied after the factors on both sides.
        fmt: format of both.
    """
    exact = [product(rows, w) for rows in samples]  # the same for all factors

    def error(factors: Array) -> float:
        total, rough = 0.0, _rounded(turn(w * factors), fmt)
        for rows, product in zip(samples, exact, strict=True):
            x = turn(rows / factors)
            observer = RangeObserver()
            observer.update(x)
            total += _error(product, x, rough, observer.scale("mse", fmt), 0.0, fmt)
        return total

    none = np.ones(peaks.shape, np.float32)
    if sum(len(rows) for rows in samples) < ENOUGH_ROWS:
        return none
    tried = [smooth.smoothing_factors(peaks, columns, alpha) for alpha in ALPHAS]
    *errors, plain = each(error, [*tried, none])
    best = int(np.argmin(errors))
    return tried[best] if errors[best] < WORTHWHILE * plain else none


def best_scale(
    x: Array, w: Array, safe: Sequence[Range], clipped: Sequence[Range], fmt: str
) -> tuple[Range, Range]:
    """Return the (scale, shift) with the least output error; a clip only where it halves it.

    Args:
        x: rows of the activation.
        w: from :func:`sample_weights`.
        safe: ranges that hold everything seen.
        clipped: ranges fitted to what was seen, which look better there than they are elsewhere.
        fmt: format of both.

    Returns:
        The best of all under that rule, and the best of ``safe``.
    """
    exact, rough = product(x, w), _rounded(w, fmt)

    def best(ranges: Sequence[Range]) -> tuple[float, Range]:
        errors = ((_error(exact, x, rough, *r, fmt), r) for r in dict.fromkeys(ranges))
        return min(errors, default=(np.inf, (np.nan, 0.0)))

    wide_error, wide = best(safe)
    narrow_error, narrow = best(clipped)
    return narrow if narrow_error < WORTH_HALVING * wide_error else wide, wide


def best_spread(
    x: Array,
    w: Array,
    peaks: Array,
    scale: Range,
    ranges: Callable[[float], Sequence[Range]],
    fmt: str,
) -> tuple[Range, NDArray[np.float32]] | None:
    """Find factors that bring outlier channels down to a limit, and the range for them.

    The factors cost an operation after GELU, since nothing can be folded through GELU into the
    weights before it. So they are only worth it where they halve the error. Channels below the
    limit are left alone:

        fⱼ = min(1, limit / max|Xⱼ|)      X' = X diag(f)      W' = W diag(1 / f)

    f is rounded down to a power of two, which is exact in every type that a graph computes in.

    Args:
        x: rows of the activation, (rows, channels).
        w: from :func:`sample_weights`, (outputs, channels).
        peaks: largest |x| of each channel over everything seen, (channels,).
        scale: the best range without factors.
        ranges: gives the ranges to try for a largest |x|.
        fmt: format of both.

    Returns:
        The range of X', and f (channels,) in float32; None where no factors pay.
    """
    top, usual = float(peaks.max()), float(np.median(peaks))
    limits = top * np.exp2(-np.arange(1.0, SPREAD_OCTAVES + 1.0))
    limits = limits[limits > usual / 2]  # lower limits would divide all channels alike
    if limits.size < SPREAD_LEAST:
        return None
    exact = product(x, w)
    least, chosen = WORTH_HALVING * _error(exact, x, _rounded(w, fmt), *scale, fmt), None
    for limit in limits:
        f = np.exp2(np.floor(np.log2(limit / np.maximum(peaks, limit)))).astype(np.float32)
        rough = _rounded(w / f, fmt)
        for one in ranges(float(limit)):
            error = _error(exact, x * f, rough, *one, fmt)
            if error < least:
                least, chosen = error, (one, f)
    return chosen
