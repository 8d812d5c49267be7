"""SmoothQuant: moving outlier channels from activations, where they hurt, into weights.

An activation has one scale for all its channels. If one channel is a hundred times the others,
the others are left with a hundredth of the levels. A weight has a scale per output, so that it
suffers less from a large input channel. Between a norm and the linear layers that read it, a
positive factor per channel moves range from the activation into the weights and changes nothing
else (Xiao et al., 2023):

    y = (g ⊙ x̂ + b) Wᵀ = ((g / s) ⊙ x̂ + b / s) (W · diag(s))ᵀ

The division goes into the norm's gain and bias, the product into the columns of W: it costs
nothing at inference. All layers that read the norm (q, k and v; gate and up) share one s, computed
from the largest column of any of them:

    sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1−α)

α = 0.5 gives channel j the same maximum √(max|Xⱼ| max|Wⱼ|) on both sides; a function-preserving
outlier (gain × 100, columns / 100) gets 100 times its usual factor and is undone entirely.

Three details:
- A factor common to all s cancels between the two scales. It is chosen such that the geometric
  mean of s is one, which keeps gains and weights near the size they were trained at.
- s lies between 1 / ``MAX_FACTOR`` and ``MAX_FACTOR``, so that neither g / s nor W s leaves
  float16's range.
- A channel whose activations or weights are all zero says nothing about s: it keeps s = 1.

s is computed in float64 and stored in float32; g / s and W s are rounded once each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_edge.errors import CalibrationError, UsageError
from internvl_edge.quantize.numerics.formats import require_finite
from internvl_edge.types import Array

MAX_FACTOR = 4096.0


def column_absmax(linear_weights: Sequence[Array]) -> Array:
    """Return the largest magnitude of each input channel over all weights (outputs, channels)."""
    # Not the maximum of |w|: that would copy weights of hundreds of megabytes.
    maxima = [np.maximum(w.max(axis=0), -w.min(axis=0)) for w in linear_weights]
    return np.asarray(np.maximum.reduce(maxima))


def smoothing_factors(
    channel_absmax: Array, weight_absmax: Array, alpha: float
) -> NDArray[np.float32]:
    """Return the factors s that a norm's output is divided by.

    Args:
        channel_absmax: largest |x| of each channel of the norm's output, (channels,).
        weight_absmax: largest weight of each input channel over all readers, (channels,).
        alpha: how much of the activations' range moves into the weights, in [0, 1].

    Returns:
        float32 (channels,), positive; their geometric mean over live channels is one before they
        are bounded.

    Raises:
        CalibrationError: maxima that are not finite.
        UsageError: alpha outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise UsageError(f"smoothing: expected alpha in [0, 1], found {alpha}")
    require_finite(channel_absmax, "smoothing: maxima of activations")
    require_finite(weight_absmax, "smoothing: maxima of weights")
    live = (channel_absmax > 0) & (weight_absmax > 0)
    factors = np.ones(channel_absmax.shape, np.float32)
    if live.any():
        log_x = np.log(channel_absmax[live].astype(np.float64))
        log_w = np.log(weight_absmax[live].astype(np.float64))
        log_s = alpha * log_x - (1.0 - alpha) * log_w
        bound = np.log(MAX_FACTOR)
        factors[live] = np.exp(np.clip(log_s - log_s.mean(), -bound, bound))
    return factors


def fold(
    norm_weight: Array,
    norm_bias: Array | None,
    linear_weights: Sequence[Array],
    factors: Array,
) -> tuple[Array, Array | None]:
    """Divide a norm's output by ``factors`` and multiply its readers' columns by them.

    Args:
        norm_weight: the gain (channels,).
        norm_bias: the bias (channels,) of a LayerNorm; None for RMSNorm.
        linear_weights: every weight (outputs, channels) that reads the norm; a reader left out
            would see the divided activations. Changed in place: they are large.
        factors: s (channels,), from :func:`smoothing_factors`.

    Returns:
        New gain and bias, in their original types.

    Raises:
        CalibrationError: the numbers of channels differ.
    """
    arrays = [norm_weight, *([] if norm_bias is None else [norm_bias]), *linear_weights]
    widths = {array.shape[-1] for array in arrays}
    if widths != {factors.size}:
        raise CalibrationError(
            f"smoothing: expected {factors.size} channels in the norm and every reader, "
            f"found {sorted(widths)}"
        )

    for weight in linear_weights:
        np.multiply(weight, factors, out=weight, casting="same_kind")

    def divided(values: Array) -> Array:
        return (values / factors).astype(values.dtype, copy=False)

    return divided(norm_weight), None if norm_bias is None else divided(norm_bias)


def fold_rows(
    producer: Array,
    bias: Array | None,
    rows: slice,
    linear_weights: Sequence[Array],
    factors: Array,
) -> None:
    """Do the same as :func:`fold` with rows of a linear layer instead of a norm; all in place.

    Args:
        producer: those rows of its weight, (channels, inputs).
        bias: its whole bias, or None.
        rows: the elements of the bias that belong to these rows.
        linear_weights: every weight (outputs, channels) that reads the channels.
        factors: s (channels,).

    Raises:
        CalibrationError: the numbers of channels differ.
    """
    widths = {len(producer), *(weight.shape[-1] for weight in linear_weights)}
    if widths != {factors.size}:
        raise CalibrationError(
            f"smoothing: expected {factors.size} channels in the producer and every reader, "
            f"found {sorted(widths)}"
        )
    for weight in linear_weights:
        np.multiply(weight, factors, out=weight, casting="same_kind")
    np.divide(producer, factors[:, None], out=producer, casting="same_kind")
    if bias is not None:
        bias[rows] /= factors
