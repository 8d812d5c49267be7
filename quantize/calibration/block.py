"""Calibrate and quantize one block: ranges from its activations, 8-bit weights, folded factors.

The block is run once on the previous block's outputs. While it runs, every activation that enters
a linear layer is observed. How it can be made easier to quantize depends on what produces it
(``Site``):

    a norm's output             SmoothQuant's factors s move from the gain into the readers' columns
    attention's output          s and a rotation of each head, from v's rows into the projection's
                                columns: attention only mixes rows of v, so both pass through it
    gate · up                   s, from up's rows into down's columns
    GELU's output               a shift that makes its range symmetric; its product with the weights
                                goes into the bias. Factors for outlier channels, where they pay

The first three are spooled, because s is computed from maxima over all samples; they are then
observed as x / s, rotated. The others go straight into their observers. Then the range is chosen,
each weight is quantized per output channel and stored (K, N), as ``qdq`` needs it, and the mean
error that rounding x and W leaves in the output is subtracted from the bias.

A layer that runs in several streams (texts, image queries, pairs) has one set of weights and one
set of smoothing factors, computed from all of them, and one activation range per stream.

Memory holds this block's weights, which are changed in place, and as many of the activations as
the spools' budget allows; where weights are rounded by ``gptq``, also K × K products for each
activation with K channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from internvl_edge.export.towers.blocks import Block
from internvl_edge.export.towers.streams import SampleStream
from internvl_edge.files.spool import Spool
from internvl_edge.quantize.calibration.activations import (
    Group,
    Inputs,
    NewSpool,
    groups_of,
    watching,
)
from internvl_edge.quantize.calibration.attention import watching_attention
from internvl_edge.quantize.calibration.folding import fold, fold_products
from internvl_edge.quantize.calibration.ranges import (
    Activation,
    ChosenRange,
    choose_range,
    corrected_bias,
    statistics_of,
)
from internvl_edge.quantize.numerics.gptq import Factor
from internvl_edge.quantize.numerics.observers import RangeMethod
from internvl_edge.quantize.numerics.statistics import LayerStatistics
from internvl_edge.quantize.numerics.threads import each
from internvl_edge.quantize.numerics.weights import QuantizedWeight, quantize_weight
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

THREADS = 2  # each holds copies of activations or weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedBlock:
    """The results of calibrating a block, by full parameter name."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    # changed norm gains, biases and shifts; the factors of each site under its first reader's name
    folded: dict[str, Array] = field(default_factory=dict)
    # stream → weight → scale; None: the activation is not quantized
    activations: dict[str, dict[str, float | None]] = field(default_factory=dict)
    statistics: list[LayerStatistics] = field(default_factory=list)


def is_quantized(recipe: Recipe, name: str, in_features: int, out_features: int) -> bool:
    """Tell whether a recipe quantizes the linear layer called ``name``."""
    recipe = recipe.of(name)
    wide = min(in_features, out_features) >= recipe.min_features
    return wide and not recipe.excludes(name)


@torch.inference_mode()
def calibrate_block(
    block: Block,
    streams: Mapping[str, SampleStream],
    recipe: Recipe,
    new_hidden: Callable[[str], Spool],
    new_spool: NewSpool,
) -> CalibratedBlock:
    """Run a block on every stream, replace the hidden states by its outputs, quantize its weights.

    Args:
        block: its weights are folded in place; it cannot be used afterwards.
        streams: the samples of each stream that runs through the block, by name.
        recipe: what to quantize, and how.
        new_hidden: makes a spool for a stream's hidden states after the block.
        new_spool: makes a spool for what is kept while the block runs.

    Raises:
        CalibrationError: an activation or weight is not finite; names it.
    """
    recipe = recipe.of(block.name)
    linears = {
        name: linear
        for name, linear in block.linears().items()
        if is_quantized(recipe, name, linear.in_features, linear.out_features)
    }
    groups = groups_of(block, linears)
    products: dict[str, Array] = {}
    result = CalibratedBlock(activations={stream: {} for stream in streams})
    seen = _run(block, streams, linears, groups, recipe, new_hidden, new_spool, products, result)
    weights = {name: linear.weight.detach().numpy() for name, linear in linears.items()}
    activations: list[Activation] = []
    for group in groups:  # in order: a group's fold changes weights that the next ones read
        inputs = {
            stream: by_group[group.key]
            for stream, by_group in seen.items()
            if group.key in by_group
        }
        change = fold(block, group, weights, inputs, recipe, result.folded)
        is_only = len(inputs) == 1
        activations += [
            Activation(group, stream, one, change, is_only) for stream, one in inputs.items()
        ]
    ranges: list[ChosenRange] = []
    if not recipe.is_weight_only:
        ranges += each(lambda one: choose_range(one, weights, recipe), activations, THREADS)
    only_ranges = {
        reader: chosen
        for activation, chosen in zip(activations, ranges, strict=False)
        for reader in activation.group.readers
        if activation.is_only
    }
    fold_products(products, activations, only_ranges, recipe)
    _round(groups, weights, products, recipe, result)
    _correct_biases(linears, only_ranges, recipe, result)
    scales: list[float | None] = [chosen.scale for chosen in ranges]
    for activation, scale in zip(activations, scales or [None] * len(activations), strict=True):
        names = (f"{reader}.weight" for reader in activation.group.readers)
        result.activations[activation.stream] |= dict.fromkeys(names, scale)
    _store_shifts(block, groups, only_ranges, result)
    result.statistics.extend(statistics_of(activations, ranges, result.weights, recipe))
    return result


def _run(
    block: Block,
    streams: Mapping[str, SampleStream],
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Group],
    recipe: Recipe,
    new_hidden: Callable[[str], Spool],
    new_spool: NewSpool,
    products: dict[str, Array],
    result: CalibratedBlock,
) -> dict[str, dict[str, Inputs]]:
    """Run the block on every stream; return its linear layers' inputs by stream and group."""
    attentions = {
        name: module
        for name, module in block.attentions().items()
        if recipe.attention is not None and not recipe.excludes(name)
    }
    method: RangeMethod = "mse" if recipe.range_method == "auto" else recipe.range_method
    seen: dict[str, dict[str, Inputs]] = {name: {} for name in streams}
    for name, stream in streams.items():
        outputs = new_hidden(name)
        with (
            watching(linears, groups, recipe, seen[name], products, new_spool) as look_at,
            watching_attention(attentions) as operands,
        ):
            for x, context in zip(stream.hidden, stream.contexts, strict=True):
                look_at(getattr(context, "rows", None))
                outputs.append(block.run(torch.from_numpy(x), context).numpy())
        stream.hidden.close()
        stream.hidden = outputs
        result.activations[name] |= {
            operand: observer.scale(method, recipe.weights, recipe.percentile)
            for operand, observer in operands.items()
        }
    return seen


def _round(
    groups: Sequence[Group],
    weights: Mapping[str, Array],
    products: dict[str, Array],
    recipe: Recipe,
    result: CalibratedBlock,
) -> None:
    """Quantize every weight; with GPTQ group by group, so that memory holds one factor."""

    def rounded(names: Sequence[str], factor: Factor | None) -> dict[str, QuantizedWeight]:
        done = each(
            lambda name: quantize_weight(weights[name], name, recipe, factor), names, THREADS
        )
        return dict(zip(names, done, strict=True))

    quantized: dict[str, QuantizedWeight] = {}
    if recipe.rounding == "nearest":
        quantized = rounded(sorted(weights, key=lambda name: -weights[name].size), None)
    else:
        for group in groups:
            h = products.pop(group.key, None)  # None: no stream runs through this group
            quantized |= rounded(group.readers, None if h is None else Factor(h, group.key))
    result.weights.update((f"{name}.weight", quantized[name]) for name in weights)


def _correct_biases(
    linears: Mapping[str, nn.Linear],
    ranges: Mapping[str, ChosenRange],
    recipe: Recipe,
    result: CalibratedBlock,
) -> None:
    def corrected(name: str) -> Array | None:
        weight = result.weights[f"{name}.weight"]
        return corrected_bias(linears[name], ranges[name], weight, recipe)

    for name, bias in zip(ranges, each(corrected, [*ranges]), strict=True):
        if bias is not None:
            result.folded[f"{name}.bias"] = bias


def _store_shifts(
    block: Block,
    groups: Sequence[Group],
    ranges: Mapping[str, ChosenRange],
    result: CalibratedBlock,
) -> None:
    for group in groups:
        if group.site is None or group.site.shift is None or group.key not in ranges:
            continue
        chosen = ranges[group.key]
        result.folded[f"{block.name}.{group.site.shift}"] = np.array(chosen.shift, np.float32)
        if chosen.spread is not None:
            result.folded[f"{block.name}.{group.site.spread}"] = chosen.spread
