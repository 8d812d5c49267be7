"""From what was seen of an activation to its scale, and what is left of the error in the output.

When a block has run, its sites are folded and it is known what the activations behind them are
from now on. Each is settled by itself, one for every group of readers and every stream: what was
spooled goes through its change into the observer, the range methods propose clips, and the one
whose rounding leaves the readers' outputs nearest to what they were is taken (``choose``).

Activations do not depend on each other here, so that two threads settle two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize import choose, formats
from internvl_edge.quantize.inputs import Group, Inputs
from internvl_edge.quantize.observers import RANGE_METHODS, RangeMethod, RangeObserver
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.quantize.statistics import BEST_DB, input_sqnr_db
from internvl_edge.quantize.weights import QuantizedWeight

Array = np.ndarray[Any, Any]
PRODUCT_ROWS = 64  # of a stored weight, whose floats a core's cache holds


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
    absmax: float
    sqnr_db: float  # of everything seen


def settle(use: Use, weights: Mapping[str, Array], recipe: Recipe) -> Settled:
    """Observe what was kept of an activation, and choose its range."""
    group, inputs, change = use.group, use.inputs, use.change
    if inputs.kept is not None:
        for values in inputs.kept:
            inputs.observer.update(change(values))
        inputs.kept.close()
    rows = change(np.array(inputs.sample.rows))
    has_shift = group.site is not None and group.site.shift is not None
    methods: tuple[RangeMethod, ...] = (
        (recipe.range_method if recipe.range_method != "auto" else "mse"),
    )
    if recipe.range_method == "auto" and len(rows) >= choose.ENOUGH_ROWS:
        methods = RANGE_METHODS
    pairs = [
        pair for method in methods for pair in _ranges(inputs, method, recipe, has_shift=has_shift)
    ]
    if not all(np.isfinite(scale) and scale > 0 for scale, _ in pairs):
        raise CalibrationError(
            f"{group.key}: the {use.stream} stream gave an unusable scale {pairs}"
        )
    scale, shift = pairs[0]
    if len(pairs) > 1:
        sample = choose.sample_weights([weights[name] for name in group.readers])
        scale, shift = choose.best_scale(rows, sample, pairs, recipe.weights)
    return Settled(
        rows=rows,
        scale=scale,
        shift=shift,
        absmax=inputs.observer.absmax,
        sqnr_db=_input_sqnr_db(inputs.observer, rows, scale, shift, recipe.weights),
    )


def _input_sqnr_db(
    observer: RangeObserver, rows: Array, scale: float, shift: float, fmt: str
) -> float:
    """From the histogram, which does not know of signs; with a shift, from the sample."""
    if not shift:
        return input_sqnr_db(observer, scale, fmt)
    moved = rows - np.float32(shift)
    rounded = formats.fake_quantize(moved, scale, fmt) + np.float32(shift)
    return min(formats.sqnr_db(rows, rounded), BEST_DB)


def _ranges(
    inputs: Inputs, method: RangeMethod, recipe: Recipe, *, has_shift: bool
) -> Iterator[tuple[float, float]]:
    """The scales, each with its shift, that a method has to offer."""
    yield inputs.observer.scale(method, recipe.weights, recipe.percentile), 0.0
    if has_shift:
        high = inputs.observer.clip(method, formats.SHIFTED_INT8, recipe.percentile)
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
    """``error @ values`` of a stored weight (K, N), a few rows at a time."""
    result = np.zeros(values.shape[1], np.float32)
    for start in range(0, len(values), PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        result += error[rows] @ values[rows].astype(np.float32)
    return result
