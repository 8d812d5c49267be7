"""Calibrate and quantize one block: ranges from its activations, 8-bit weights, folded factors.

The block is run once on what the previous block left. While it runs, every activation that enters
a linear layer is seen. What can be done about it depends on what made it (``Site``):

    behind a norm               SmoothQuant's factors s move from the gain into the readers' columns
    attention's output          s and a rotation of each head, from v's rows into the projection's
                                columns: attention only mixes rows of v, so both pass through it
    gate · up                   s, from up's rows into down's columns
    behind GELU                 a shift that makes its range symmetric; its sum with the weights
                                goes into the bias

The first three are spooled, since s is solved from maxima over all samples, and observed as x / s,
rotated. The others go straight into their observers. Then the range is chosen, each weight is
quantized per output channel and stored (K, N), as ``qdq`` needs it, and the mean error that the
rounding of x and W leaves in the output is taken out of the bias.

A layer that runs in several streams (texts, image queries, pairs) has one set of weights and one
smoothing, made from all of them, and one activation range per stream.

In memory are this block's weights, which are changed in place, and whatever of the activations
the spools' budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize import blockwise, choose, formats, smooth
from internvl_edge.quantize.attention import watching_attention
from internvl_edge.quantize.inputs import (
    Block,
    Group,
    Inputs,
    NewSpool,
    Stream,
    groups_of,
    head_rotation,
    is_changed,
    watching,
)
from internvl_edge.quantize.observers import RANGE_METHODS, RangeMethod, RangeObserver
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.quantize.rotation import rotate_heads
from internvl_edge.quantize.statistics import BEST_DB, LayerStatistics, input_sqnr_db
from internvl_edge.quantize.weights import QuantizedWeight, quantize_weight
from internvl_edge.spool import Spool

QUANTIZING_THREADS = 2
PRODUCT_ROWS = 64  # of a stored weight, whose floats a core's cache holds
SMOOTHING_SUFFIX = ".smoothing"  # of the factors in the columns of a site's readers
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedBlock:
    """What a block leaves behind: everything by full parameter name."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    # changed norm gains, biases and shifts; the factors of each site beside its first reader
    folded: dict[str, Array] = field(default_factory=dict)
    # stream → weight → scale; None: the activation stays as it is
    activations: dict[str, dict[str, float | None]] = field(default_factory=dict)
    statistics: list[LayerStatistics] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """A group's activation after folding, in one stream."""

    rows: Array  # of the sample
    scale: float
    shift: float
    absmax: float
    sqnr_db: float  # of everything seen


def is_quantized(recipe: Recipe, name: str, in_features: int, out_features: int) -> bool:
    """Whether a recipe puts the linear layer called ``name`` into 8 or 4 bits."""
    recipe = recipe.of(name)
    wide = min(in_features, out_features) >= recipe.min_features
    return wide and not recipe.excludes(name)


@torch.inference_mode()
def calibrate_block(
    block: Block,
    streams: Mapping[str, Stream],
    recipe: Recipe,
    behind: Callable[[str], Spool],
    new_spool: NewSpool,
) -> CalibratedBlock:
    """Run a block on every stream, replace the hidden states by its outputs, quantize its weights.

    Args:
        block: its weights are folded in place; it is of no use afterwards.
        streams: the uses of the block.
        recipe: what to quantize, and how.
        behind: a spool for the hidden states of a stream behind the block.
        new_spool: a spool for what is kept while the block runs.

    Raises:
        CalibrationError: an activation or weight is not finite, by name.
    """
    recipe = recipe.of(block.name)
    linears = {
        name: linear
        for name, linear in block.linears().items()
        if is_quantized(recipe, name, linear.in_features, linear.out_features)
    }
    groups = groups_of(block, linears)
    attentions = {
        name: module
        for name, module in block.attentions().items()
        if recipe.attention is not None and not recipe.excludes(name)
    }
    result = CalibratedBlock(activations={stream: {} for stream in streams})
    seen: dict[str, dict[str, Inputs]] = {name: {} for name in streams}
    for name, stream in streams.items():
        outputs = behind(name)
        with (
            watching(linears, groups, recipe, seen[name], new_spool) as look_at,
            watching_attention(attentions) as operands,
        ):
            for x, context in zip(stream.hidden, stream.contexts, strict=True):
                look_at(getattr(context, "rows", None))
                outputs.append(block.run(torch.from_numpy(x), context).numpy())
        stream.hidden.close()
        stream.hidden = outputs
        method: RangeMethod = "mse" if recipe.range_method == "auto" else recipe.range_method
        result.activations[name] |= {
            operand: observer.scale(method, recipe.weights, recipe.percentile)
            for operand, observer in operands.items()
        }

    weights = {name: linear.weight.detach().numpy() for name, linear in linears.items()}
    corrections: dict[str, _Settled] = {}
    ranges: list[tuple[str, str, _Settled]] = []  # stream, linear layer
    for group in groups:
        inputs = {stream: found[group.key] for stream, found in seen.items() if group.key in found}
        change = _fold(block, group, weights, inputs, recipe, result)
        if recipe.is_weight_only:
            for scales in result.activations.values():
                scales.update({f"{reader}.weight": None for reader in group.readers})
            continue
        for name, one in inputs.items():
            settled = _settle(group, weights, name, one, change, recipe)
            result.activations[name].update(
                {f"{reader}.weight": settled.scale for reader in group.readers}
            )
            ranges += [(name, reader, settled) for reader in group.readers]
            if len(inputs) == 1:
                corrections |= dict.fromkeys(group.readers, settled)
    with ThreadPoolExecutor(QUANTIZING_THREADS) as pool:
        quantized = pool.map(
            lambda item: quantize_weight(item[1], item[0], recipe), weights.items()
        )
        for name, weight in zip(weights, quantized, strict=True):
            result.weights[f"{name}.weight"] = weight
    for name, settled in corrections.items():
        _correct_bias(block, name, linears[name], settled, recipe, result)
    _store_shifts(block, groups, corrections, result)
    result.statistics.extend(_statistics(ranges, result.weights, recipe))
    return result


def _statistics(
    ranges: Sequence[tuple[str, str, _Settled]],
    weights: Mapping[str, QuantizedWeight],
    recipe: Recipe,
) -> Iterator[LayerStatistics]:
    for stream, name, found in ranges:
        yield LayerStatistics(
            stream=stream,
            weight=f"{name}.weight",
            absmax=found.absmax,
            clip=found.scale * formats.as_format(recipe.weights).max_value,
            scale=found.scale,
            input_sqnr_db=found.sqnr_db,
            weight_sqnr_db=weights[f"{name}.weight"].sqnr_db,
        )


def _fold(
    block: Block,
    group: Group,
    weights: dict[str, Array],
    inputs: Mapping[str, Inputs],
    recipe: Recipe,
    result: CalibratedBlock,
) -> Callable[[Array], Array]:
    """Move factors, and a rotation of each head, from what makes an activation into its readers.

    Returns:
        What becomes of the activation's rows.
    """
    site = group.site
    if site is None or not inputs or not is_changed(group, recipe):
        return lambda x: x
    head = head_rotation(group, recipe)

    def turn(x: Array) -> Array:
        return x if head is None else rotate_heads(x, head)

    readers = [weights[name] for name in group.readers]
    factors = _factors(readers, inputs, turn, recipe)
    if site.norm is not None:
        gain, bias = smooth.fold(*_arrays(block, site.norm), readers, factors)
        result.folded[f"{block.name}.{site.norm}.weight"] = gain
        if bias is not None:
            result.folded[f"{block.name}.{site.norm}.bias"] = bias
    else:
        producer = f"{block.name}.{site.producer}"
        rows = slice(site.first_row, site.first_row + factors.size)
        bias = _arrays(block, str(site.producer))[1]
        smooth.fold_rows(weights[producer][rows], bias, rows, readers, factors)
        if head is not None:
            rotate_heads(weights[producer][rows], head, axis=0, in_place=True)
            for weight in readers:
                rotate_heads(weight, head, in_place=True)
            if bias is not None:
                rotate_heads(bias[rows], head, in_place=True)
        if bias is not None:
            result.folded[f"{producer}.bias"] = bias
    result.folded[f"{group.key}{SMOOTHING_SUFFIX}"] = factors
    return lambda x: turn(x / factors)


def _factors(
    readers: Sequence[Array],
    inputs: Mapping[str, Inputs],
    turn: Callable[[Array], Array],
    recipe: Recipe,
) -> Array:
    if recipe.smooth is None:
        return np.ones(readers[0].shape[1], np.float32)
    samples = [np.array(one.sample.rows) for one in inputs.values()]
    sample = choose.sample_weights(readers)
    if recipe.is_weight_only:
        block = blockwise.block_of(sample.shape[1], recipe.block_size)
        return blockwise.best_factors(samples, sample, turn, recipe.weights, block)
    peaks = np.max([one.peaks for one in inputs.values() if one.peaks is not None], axis=0)
    columns, alpha = smooth.column_absmax(readers), recipe.smooth
    if alpha == "auto":
        return choose.best_factors(samples, peaks, columns, sample, turn, recipe.weights)
    return smooth.smoothing_factors(peaks, columns, alpha)


def _arrays(block: Block, path: str) -> tuple[Array, Array | None]:
    """Weight and bias of a submodule."""
    module = block.module.get_submodule(path)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.detach().numpy(), bias.detach().numpy() if isinstance(bias, Tensor) else None


def _settle(
    group: Group,
    weights: Mapping[str, Array],
    stream: str,
    inputs: Inputs,
    change: Callable[[Array], Array],
    recipe: Recipe,
) -> _Settled:
    """Observe what was kept of an activation, and choose its range."""
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
        raise CalibrationError(f"{group.key}: the {stream} stream gave an unusable scale {pairs}")
    scale, shift = pairs[0]
    if len(pairs) > 1:
        sample = choose.sample_weights([weights[name] for name in group.readers])
        scale, shift = choose.best_scale(rows, sample, pairs, recipe.weights)
    return _Settled(
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


def _correct_bias(
    block: Block,
    name: str,
    linear: nn.Linear,
    settled: _Settled,
    recipe: Recipe,
    result: CalibratedBlock,
) -> None:
    """Let the bias take up a shift of x, and the mean error of the output.

        x W + b   ≈   x̂ Ŵ + b + E[x] W − E[x̂] Ŵ       x̂ = round(x − shift)

    The means are those of the sample rows.
    """
    if linear.bias is None or not (recipe.correct_bias or settled.shift):
        return
    weight = result.weights[f"{name}.weight"]
    error = np.full(linear.in_features, settled.shift, np.float32)  # of x̂, to be made good
    bias = linear.bias.detach().numpy()
    if recipe.correct_bias:
        moved = settled.rows - np.float32(settled.shift)
        rounded = formats.fake_quantize(moved, settled.scale, recipe.weights)
        mean = settled.rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        error = -rounded.mean(axis=0, dtype=np.float64).astype(np.float32)
        bias = bias + linear.weight.detach().numpy() @ mean
    bias = bias + _product(error, weight.values) * weight.scales
    result.folded[f"{name}.bias"] = bias


def _product(error: Array, values: Array) -> Array:
    """``error @ values`` of a stored weight (K, N), a few rows at a time."""
    result = np.zeros(values.shape[1], np.float32)
    for start in range(0, len(values), PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        result += error[rows] @ values[rows].astype(np.float32)
    return result


def _store_shifts(
    block: Block,
    groups: Sequence[Group],
    settled: Mapping[str, _Settled],
    result: CalibratedBlock,
) -> None:
    for group in groups:
        if group.site is not None and group.site.shift is not None and group.key in settled:
            value = np.array(settled[group.key].shift, np.float32)
            result.folded[f"{block.name}.{group.site.shift}"] = value
