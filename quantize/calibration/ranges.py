"""From what was seen of an activation to its scale, and what is left of the error in the output.

When a block has run, its sites are folded and it is known what the activations behind them are
from now on. Each is settled by itself, one for every group of readers and every stream: what was
spooled goes through its change into the observer, and a range is taken.

**The range of the choice "auto"** reaches a tenth beyond the largest value seen. That costs 0.8 dB
of rounding error at most, and of the inputs still to come some exceed every one seen: saturation
then costs several dB, on that input alone. A clip within what was seen always looks better on
calibration data than it is, so that one is only taken where it halves the squared error of the
readers' outputs (``choose``): where single values are far above all others.

Activations do not depend on each other here, so that two threads settle two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize.calibration.activations import Group, Inputs
from internvl_edge.quantize.numerics import formats, output_error
from internvl_edge.quantize.numerics.observers import RANGE_METHODS, RangeMethod, RangeObserver
from internvl_edge.quantize.numerics.output_error import Range
from internvl_edge.quantize.numerics.statistics import BEST_DB, input_sqnr_db
from internvl_edge.quantize.numerics.weights import QuantizedWeight
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

HEADROOM = 1.1  # of a range, over the largest value seen
PRODUCT_ROWS, PRODUCT_COLUMNS = 64, 2048  # of a stored weight; BLAS splits what is larger


@dataclass(frozen=True, slots=True)
class Use:
    """A group in one stream."""

    group: Group
    stream: str
    inputs: Inputs
    change: Callable[[Array], Array]  # what folding does to the activation's rows
    is_only: bool  # whether it is the group's only stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A group's activation after folding, in one stream."""

    rows: Array  # of the sample
    scale: float
    shift: float
    spread: Array | None  # factors that its channels were multiplied by, its readers' divided
    absmax: float
    sqnr_db: float  # of everything seen


def settle(use: Use, weights: Mapping[str, Array], recipe: Recipe) -> Settled:
    """Observe what was kept of an activation, and choose its range.

    Where outlier channels are divided, their readers' columns are multiplied, in place.
    """
    group, inputs, change = use.group, use.inputs, use.change
    if inputs.kept is not None:
        for values in inputs.kept:
            inputs.observer.update(change(values))
        inputs.kept.close()
    rows = change(np.array(inputs.sample.rows))
    safe, clipped = _candidates(use, recipe, is_chosen=len(rows) >= output_error.ENOUGH_ROWS)
    if not all(np.isfinite(scale) and scale > 0 for scale, _ in (*safe, *clipped)):
        raise CalibrationError(
            f"{group.key}: the {use.stream} stream gave an unusable scale {(*safe, *clipped)}"
        )
    best = wide = safe[0]
    spread, absmax = None, inputs.observer.absmax
    sample = output_error.sample_weights([weights[name] for name in group.readers])
    if len(safe) + len(clipped) > 1:
        best, wide = output_error.best_scale(rows, sample, safe, clipped, recipe.weights)
    if _may_spread(use, recipe) and len(rows) >= output_error.ENOUGH_ROWS:
        peaks, fmt = inputs.observer.channel_absmax, recipe.weights
        # beside what holds everything seen: where a clip is worth it, factors are the better way
        found = output_error.best_spread(
            rows, sample, peaks, wide, partial(_around, use, recipe), fmt
        )
        if found is not None:
            best, spread = found
            rows, absmax = rows * spread, float((peaks * spread).max())
            for name in group.readers:
                np.divide(weights[name], spread, out=weights[name])
    scale, shift = best
    return Settled(
        rows=rows,
        scale=scale,
        shift=shift,
        spread=spread,
        absmax=absmax,
        sqnr_db=_input_sqnr_db(
            inputs.observer if spread is None else None, rows, scale, shift, recipe.weights
        ),
    )


def _may_spread(use: Use, recipe: Recipe) -> bool:
    site = use.group.site
    return recipe.spread and use.is_only and site is not None and site.spread is not None


def _around(use: Use, recipe: Recipe, absmax: float) -> list[Range]:
    """The ranges that hold an activation of this largest value, and what is still to come."""
    is_auto = recipe.range_method == "auto"
    widest = min(HEADROOM * absmax, float(np.finfo(np.float32).max)) if is_auto else absmax
    has_shift = use.group.site is not None and use.group.site.shift is not None
    return list(_ranges(use.inputs, lambda _: widest, recipe.weights, has_shift=has_shift))


def _input_sqnr_db(
    observer: RangeObserver | None, rows: Array, scale: float, shift: float, fmt: str
) -> float:
    """From the histogram, which does not know of signs or channels; else from the sample."""
    if observer is not None and not shift:
        return input_sqnr_db(observer, scale, fmt)
    moved = rows - np.float32(shift)
    rounded = formats.fake_quantize(moved, scale, fmt) + np.float32(shift)
    return min(formats.sqnr_db(rows, rounded), BEST_DB)


def _candidates(use: Use, recipe: Recipe, *, is_chosen: bool) -> tuple[list[Range], list[Range]]:
    """Ranges that hold for inputs to come, and clips that have to be worth it."""
    observer = use.inputs.observer
    has_shift = use.group.site is not None and use.group.site.shift is not None

    def ranges(method: RangeMethod) -> Iterator[Range]:
        def clip(fmt: formats.Format) -> float:
            return observer.clip(method, fmt, recipe.percentile)

        return _ranges(use.inputs, clip, recipe.weights, has_shift=has_shift)

    if recipe.range_method != "auto":
        return list(ranges(recipe.range_method)), []
    safe = _around(use, recipe, observer.absmax)
    methods = RANGE_METHODS if is_chosen else ()
    return safe, [found for method in methods for found in ranges(method)]


def _ranges(
    inputs: Inputs, clip: Callable[[formats.Format], float], fmt: str, *, has_shift: bool
) -> Iterator[Range]:
    """The scale of a clip with no shift and, where there is one, with the middle moved to zero."""
    plain = formats.as_format(fmt)
    yield float(formats.scale_of(clip(plain), plain)), 0.0
    if has_shift:
        high = clip(formats.SHIFTED_INT8)
        low = max(inputs.low, -high)
        shift = float(np.float32((high + low) / 2.0))
        yield float(formats.scale_of(high - low, formats.SHIFTED_INT8)), shift


def corrected_bias(
    linear: nn.Linear, settled: Settled, weight: QuantizedWeight, recipe: Recipe
) -> Array | None:
    """Let the bias take up a shift of x, and the mean error of the output; None: it stays.

        x W + b   ≈   x̂ Ŵ + b + E[x] W − E[x̂] Ŵ       x̂ = round(x − shift)

    The means are those of the sample rows.
    """
    if linear.bias is None or not (recipe.correct_bias or settled.shift):
        return None
    error = np.full(linear.in_features, settled.shift, np.float32)  # of x̂, to be made good
    bias = linear.bias.detach().numpy()
    if recipe.correct_bias:
        moved = settled.rows - np.float32(settled.shift)
        rounded = formats.fake_quantize(moved, settled.scale, recipe.weights)
        mean = settled.rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        error = -rounded.mean(axis=0, dtype=np.float64).astype(np.float32)
        bias = bias + linear.weight.detach().numpy() @ mean
    return np.asarray(bias + _product(error, weight.values) * weight.scales)


def _product(error: Array, values: Array) -> Array:
    """``error @ values`` of a stored weight (K, N), in pieces that a core's cache holds."""
    result = np.zeros(values.shape[1], np.float32)
    for first in range(0, values.shape[1], PRODUCT_COLUMNS):
        columns = slice(first, first + PRODUCT_COLUMNS)
        for start in range(0, len(values), PRODUCT_ROWS):
            rows = slice(start, start + PRODUCT_ROWS)
            result[columns] += error[rows] @ values[rows, columns].astype(np.float32)
    return result
