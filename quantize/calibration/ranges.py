"""The scale of an activation, chosen from its observations; and the bias corrected for the error.

After a block has run, its sites are folded, and only then are the final activations known. A range
is chosen for each of them, one per group of readers and stream: spooled activations go through the
change that folding makes and into the observer, and a range is chosen from the observer.

**The range choice "auto"** reaches a tenth beyond the largest value seen. This adds 0.8 dB of
rounding error at most, while inputs that exceed everything seen would saturate, which costs
several dB on such an input. A clip below the largest value always looks better on calibration data
than it is, so it is only chosen where it halves the squared error of the readers' outputs
(``output_error``): where single values are far above all others.

Activations do not depend on each other here, so two threads can process two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize.calibration.activations import Group, Inputs
from internvl_edge.quantize.numerics import formats, output_error
from internvl_edge.quantize.numerics.observers import RANGE_METHODS, RangeMethod, RangeObserver
from internvl_edge.quantize.numerics.output_error import Range
from internvl_edge.quantize.numerics.statistics import BEST_DB, LayerStatistics, input_sqnr_db
from internvl_edge.quantize.numerics.weights import QuantizedWeight
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

HEADROOM = 1.1  # of a range, over the largest value seen
PRODUCT_ROWS, PRODUCT_COLUMNS = 64, 2048  # of a stored weight; BLAS splits larger products


@dataclass(frozen=True, slots=True)
class Activation:
    """The activation that a group reads in one stream."""

    group: Group
    stream: str
    inputs: Inputs
    change: Callable[[Array], Array]  # the map that folding applies to the activation's rows
    is_only: bool  # whether this is the group's only stream


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRange:
    """The range chosen for an activation after folding."""

    rows: Array  # the sample's rows, after folding
    scale: float
    shift: float
    spread: Array | None  # factors of its channels; its readers' columns are divided by them
    absmax: float
    sqnr_db: float  # of everything seen


def choose_range(
    activation: Activation, weights: Mapping[str, Array], recipe: Recipe
) -> ChosenRange:
    """Observe the activations that were kept, and choose a range.

    Where outlier channels are divided, their readers' columns are multiplied, in place.
    """
    group, inputs, change = activation.group, activation.inputs, activation.change
    if inputs.kept is not None:
        for values in inputs.kept:
            inputs.observer.update(change(values))
        inputs.kept.close()
    rows = change(np.array(inputs.sample.rows))
    safe, clipped = _candidates(activation, recipe, may_clip=len(rows) >= output_error.ENOUGH_ROWS)
    if not all(np.isfinite(scale) and scale > 0 for scale, _ in (*safe, *clipped)):
        raise CalibrationError(
            f"{group.key}: expected positive, finite scales for the {activation.stream} stream, "
            f"found (scale, shift) {(*safe, *clipped)}"
        )
    best = wide = safe[0]
    spread, absmax = None, inputs.observer.absmax
    sample = output_error.sample_weights([weights[name] for name in group.readers])
    if len(safe) + len(clipped) > 1:
        best, wide = output_error.best_scale(rows, sample, safe, clipped, recipe.weights)
    if _may_spread(activation, recipe) and len(rows) >= output_error.ENOUGH_ROWS:
        peaks, fmt = inputs.observer.channel_absmax, recipe.weights
        # compared with the range that holds everything: where a clip pays, factors pay more
        better = output_error.best_spread(
            rows, sample, peaks, wide, partial(_around, activation, recipe), fmt
        )
        if better is not None:
            best, spread = better
            rows, absmax = rows * spread, float((peaks * spread).max())
            for name in group.readers:
                np.divide(weights[name], spread, out=weights[name])
    scale, shift = best
    return ChosenRange(
        rows=rows,
        scale=scale,
        shift=shift,
        spread=spread,
        absmax=absmax,
        sqnr_db=_input_sqnr_db(
            inputs.observer if spread is None else None, rows, scale, shift, recipe.weights
        ),
    )


def _may_spread(activation: Activation, recipe: Recipe) -> bool:
    site = activation.group.site
    return recipe.spread and activation.is_only and site is not None and site.spread is not None


def _around(activation: Activation, recipe: Recipe, absmax: float) -> list[Range]:
    """Return the ranges that hold this largest value and, with "auto", some headroom."""
    is_auto = recipe.range_method == "auto"
    widest = min(HEADROOM * absmax, float(np.finfo(np.float32).max)) if is_auto else absmax
    site = activation.group.site
    has_shift = site is not None and site.shift is not None
    return list(_ranges(activation.inputs, lambda _: widest, recipe.weights, has_shift=has_shift))


def _input_sqnr_db(
    observer: RangeObserver | None, rows: Array, scale: float, shift: float, fmt: str
) -> float:
    """Compute the SQNR from the histogram; where signs or channels matter, from the sample."""
    if observer is not None and not shift:
        return input_sqnr_db(observer, scale, fmt)
    moved = rows - np.float32(shift)
    rounded = formats.fake_quantize(moved, scale, fmt) + np.float32(shift)
    return min(formats.sqnr_db(rows, rounded), BEST_DB)


def _candidates(
    activation: Activation, recipe: Recipe, *, may_clip: bool
) -> tuple[list[Range], list[Range]]:
    """Return the ranges that hold everything seen, and clips that have to pay to be chosen."""
    observer, site = activation.inputs.observer, activation.group.site
    has_shift = site is not None and site.shift is not None

    def ranges(method: RangeMethod) -> Iterator[Range]:
        def clip(fmt: formats.Format) -> float:
            return observer.clip(method, fmt, recipe.percentile)

        return _ranges(activation.inputs, clip, recipe.weights, has_shift=has_shift)

    if recipe.range_method != "auto":
        return list(ranges(recipe.range_method)), []
    safe = _around(activation, recipe, observer.absmax)
    methods = RANGE_METHODS if may_clip else ()
    return safe, [clipped for method in methods for clipped in ranges(method)]


def _ranges(
    inputs: Inputs, clip: Callable[[formats.Format], float], fmt: str, *, has_shift: bool
) -> Iterator[Range]:
    """Yield the scale of a clip without a shift and, if allowed, with the middle moved to zero."""
    plain = formats.as_format(fmt)
    yield float(formats.scale_of(clip(plain), plain)), 0.0
    if has_shift:
        high = clip(formats.SHIFTED_INT8)
        low = max(inputs.low, -high)
        shift = float(np.float32((high + low) / 2.0))
        yield float(formats.scale_of(high - low, formats.SHIFTED_INT8)), shift


def corrected_bias(
    linear: nn.Linear, chosen: ChosenRange, weight: QuantizedWeight, recipe: Recipe
) -> Array | None:
    """Return the bias, compensating a shift of x and the output's mean error; None: unchanged.

        x W + b   ≈   x̂ Ŵ + b + E[x] W − E[x̂] Ŵ       x̂ = round(x − shift)

    The means are those of the sample rows.
    """
    if linear.bias is None or not (recipe.correct_bias or chosen.shift):
        return None
    error = np.full(linear.in_features, chosen.shift, np.float32)  # of x̂, to be compensated
    bias = linear.bias.detach().numpy()
    if recipe.correct_bias:
        moved = chosen.rows - np.float32(chosen.shift)
        rounded = formats.fake_quantize(moved, chosen.scale, recipe.weights)
        mean = chosen.rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        error = -rounded.mean(axis=0, dtype=np.float64).astype(np.float32)
        bias = bias + linear.weight.detach().numpy() @ mean
    return np.asarray(bias + _product(error, weight.values) * weight.scales)


def _product(error: Array, values: Array) -> Array:
    """Compute ``error @ values`` for a stored weight (K, N), in pieces that fit a core's cache."""
    result = np.zeros(values.shape[1], np.float32)
    for first in range(0, values.shape[1], PRODUCT_COLUMNS):
        columns = slice(first, first + PRODUCT_COLUMNS)
        for start in range(0, len(values), PRODUCT_ROWS):
            rows = slice(start, start + PRODUCT_ROWS)
            result[columns] += error[rows] @ values[rows, columns].astype(np.float32)
    return result


def statistics_of(
    activations: Sequence[Activation],
    ranges: Sequence[ChosenRange],
    weights: Mapping[str, QuantizedWeight],
    recipe: Recipe,
) -> Iterator[LayerStatistics]:
    """Describe the quantization of every linear layer, one figure set per stream it runs in."""
    for activation, chosen in zip(activations, ranges, strict=False):
        for name in activation.group.readers:
            yield LayerStatistics(
                stream=activation.stream,
                weight=f"{name}.weight",
                absmax=chosen.absmax,
                clip=chosen.scale * formats.as_format(recipe.weights).max_value,
                scale=chosen.scale,
                input_sqnr_db=chosen.sqnr_db,
                weight_sqnr_db=weights[f"{name}.weight"].sqnr_db,
            )
